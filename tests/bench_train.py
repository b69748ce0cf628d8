"""How much of a run is spent inside the model's forward and backward passes, and where the rest is.

    python tests/bench_train.py --seed 1             # takes the options of train.py, makes that run
    python tests/bench_train.py --env calculator     # a minute

Clocks stand around three functions: the layers and the head in rollout.py, and add_gradients
(forward, loss and backward) in grpo.py. All else is the rest, by phase: tokens sampled and agents
run in "rollouts" and "evaluation", packs and the optimizer in "update", demonstrations in "warm
start". On a CPU only: a GPU's work is not done when a call returns.
"""

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

phase = "other"  # of the run
phases: Counter = Counter()  # seconds of each
inside: Counter = Counter()  # (phase of the run, what): seconds
train_make_engine = train.make_engine


def as_phase(name: str, function):
    """A function whose time counts as a phase of its own, unless another phase calls it."""
    def wrapped(*args, **kwargs):
        global phase
        if phase != "other":
            return function(*args, **kwargs)
        phase, began = name, time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            phases[name] += time.perf_counter() - began
            phase = "other"

    return wrapped


def timed(what: str, function):
    def wrapped(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            inside[phase, what] += time.perf_counter() - began

    return wrapped


def make_engine(*args):
    chat, engine = train_make_engine(*args)
    engine.decoder._logits = timed("forward, sampling", engine.decoder._logits)
    return chat, engine


def main() -> None:
    train.make_engine = make_engine
    rollout.forward = timed("forward, sampling", rollout.forward)
    grpo.add_gradients = timed("forward, loss, backward", grpo.add_gradients)
    train.warm_start = as_phase("warm start", train.warm_start)
    train.evaluate = as_phase("evaluation", train.evaluate)
    train.roll_out = as_phase("rollouts", train.roll_out)
    grpo.update = as_phase("update", grpo.update)
    began = time.perf_counter()
    train.command_line()
    total = time.perf_counter() - began
    phases["other"] = total - phases.total()
    print(f"inside the model's passes: {sum(inside.values()) / total:.0%} of {total:.0f} s")
    for name, seconds in phases.items():
        own = {what: s for (p, what), s in inside.items() if p == name}
        share = sum(own.values()) / max(seconds, 1e-9)
        print(f"  {name:12} {seconds:6.1f} s, {share:4.0%} inside: "
              + ", ".join(f"{what} {s:.1f}" for what, s in own.items()))


if __name__ == "__main__":
    main()
