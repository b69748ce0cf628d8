"""The evidence for each capability, in one table: what was learned, from what, and what it cannot do without.

    python tests/evidence.py runs/1 runs/2 runs/3                     # finished runs of `python train.py --seed N`
    python tests/evidence.py runs/1 runs/2 --without runs/4 runs/5    # and of the same without the mechanisms:
    python train.py --seed 1 --env calculator:tool=0 lookup:open=0 maze:map=0 chain:think=0 recall:notes=0 mastermind:feedback=0

A row per environment: success at temperature 1 on 200 held-out tasks that no setting was chosen on (env.split). The
columns: acting at random, the demonstrator, the model after imitation, after imitating only what
succeeded (from the same checkpoint, with as many updates as fit the time that the run spent on
rollouts and updates), after reinforcement learning, the same without the mechanism, and a scripted
oracle that reads what the policy reads. Scoring takes seconds, imitation minutes. Writes
RUN/final.json.

A cell: the mean of all seeds [its 95 % interval over tasks] (each seed's own figure).
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_tasks import ORACLES, around, call_walk, perform, play, read_map  # noqa: E402

import train  # noqa: E402
from env import demonstrator, make_env, seeds  # noqa: E402
from tools import format_call  # noqa: E402

# ---- uniform over valid actions: each knows the language and the names it has seen, and nothing else ----


def random_calculator(task, random):
    a, b = re.findall(r"\d+", task)
    (result,) = yield format_call("calculator", expression=f"{a} {random.choice('+-*')} {b}")
    yield random.choice([a, b, result])


def random_lookup(task, random):
    seen = re.findall(r"[A-Z]\w+ [A-Z]\w+", task)[-1:]
    while random.random() < 0.5:
        (found,) = yield format_call("search", query=random.choice(seen))
        seen += re.findall(r"[A-Z]\w+(?: [A-Z]\w+)?", found)
    yield random.choice(seen)


def random_maze(task, random):
    free, here, _, _ = read_map(task)
    while True:
        here = random.choice(sorted(around(here) & free))
        yield call_walk([here])


def random_chain(task, random):
    yield random.choice("0123456789")


def random_recall(task, random):
    lines, towns, page = [], ["Oak"], ""
    while random.random() < 0.8:
        action = random.choice(["turn", "turn", "note", "look"])
        said = yield {"turn": format_call("next_page"), "note": format_call("remember", text=random.choice(lines or ["nothing"])),
                      "look": format_call("recall", query=random.choice(towns))}[action]
        page = said[0]
        lines += re.findall(r"[^.]+\.", page)
        towns += re.findall(r"[iI]n ([A-Z]\w+)", page)
    yield random.choice(towns)


def random_mastermind(task, random):
    while True:
        yield format_call("guess", code=f"{random.randrange(10**4):04}")


RANDOM = {"calculator": random_calculator, "lookup": random_lookup, "maze": random_maze, "chain": random_chain,
          "recall": random_recall, "mastermind": random_mastermind}


def scripted(spec: str, policy, tasks: int) -> list[int]:
    """Successes of policy(environment, seed) -> messages, on the tasks that models are scored on."""
    factory, successes = make_env(spec), []
    for seed in islice(seeds(factory, evaluation=True, final=True), tasks):
        environment = factory()
        environment.reset(seed)
        successes.append(int(play((environment, seed), policy(environment, seed), max_turns=50).success))
    return successes


def fixed_policies(spec: str) -> dict:
    """{column: policy} of those that learn nothing."""

    def at_random(environment, seed):
        return perform(environment, seed, lambda task: RANDOM[spec](task, Random(seed)))

    def demonstrate(environment, seed):
        return demonstrator(make_env(spec))(environment, Random(seed))

    def oracle(environment, seed):
        return perform(environment, seed, ORACLES[spec])

    return {"at random": at_random, "demonstrator": demonstrate, "oracle": oracle}


# ---- what was learned ----

LEARNED = ("imitation", "imitation of right ones", "reinforcement learning")


def final_scores(run: Path, what: str) -> dict[str, list[int]]:
    """{environment without its options: successes} of one of LEARNED; kept in RUN/final.json."""
    path = run / "final.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if what not in kept:
        kept[what] = score(run, what)
        path.write_text(json.dumps(kept))
    return kept[what]


def score(run: Path, what: str) -> dict[str, list[int]]:
    _, config = train.read_run(str(run))
    folder = run / "model" if what == "reinforcement learning" else run / "checkpoints" / "step-000000"
    setup = train.make_setup(config, folder)
    if what == "imitation of right ones":
        imitate_right_ones(run, setup)
    scores = train.evaluate(setup, final=True)
    return {spec.partition(":")[0]: of_env["sampled"] for spec, of_env in scores.items()}


def imitate_right_ones(run: Path, setup: train.Setup, parts: int = 4) -> None:
    """Imitate only demonstrations that succeeded, other ones than the run was warmed up with."""
    warmup_seconds = json.loads((run / "summary.json").read_text())["warmup_seconds"]
    steps_of_rl = (run / train.METRICS).read_text().splitlines()
    # As many updates as the time should allow, so that the learning rate comes down.
    share = sum(json.loads(line)["seconds"] for line in steps_of_rl) / warmup_seconds
    steps, seed = max(1, int(setup.config.warmup_steps * share)), setup.config.seed + 1000
    config = replace(setup.config, warmup_steps=steps, seed=seed)
    setup = replace(setup, config=config)
    right, counts, first = [], train.demonstration_counts(setup), (seed + 1) * train.DEMONSTRATION_SEEDS
    for part in range(parts):  # the demonstrators succeed about one time in three
        shown = train.demonstrations(setup, counts, start=first + part * 10**8)
        right += [episode for episode in shown if episode.success]
    train.imitate(setup.model, right, config)


def cell(runs: list[list[int]]) -> str:
    """Mean success of the runs, its 95 % interval, and each run's own figure.

    The runs are scored on the same tasks. So the interval is over tasks, each with its mean over the runs: it says how
    far other tasks may move the figure. How far other seeds may move it, the runs' own figures say.

    >>> cell([[1, 1, 0, 1], [1, 0, 0, 1]])
    '62.5% [21.9, 90.8] (75.0%, 50.0%)'
    """
    if not runs:
        return "not run"
    of_task = [sum(outcomes) / len(runs) for outcomes in zip(*runs, strict=True)]
    low, high = train.interval(of_task)
    text = f"{fmean(of_task):.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    if len(runs) == 1:
        return text
    return text + " (" + ", ".join(f"{fmean(run):.1%}" for run in runs) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--without", nargs="*", type=Path, default=[], help="runs without the mechanisms")
    options = parser.parse_args()
    missing = [str(run) for run in options.runs + options.without if not (run / "summary.json").exists()]
    if missing:
        print(f"evidence.py: not a finished run: {', '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    learned = {what: [final_scores(run, what) for run in options.runs] for what in LEARNED}
    learned["without the mechanism"] = [final_scores(run, "reinforcement learning") for run in options.without]
    columns = ("at random", "demonstrator", *learned, "oracle")
    print("| environment | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for spec, successes in learned["reinforcement learning"][0].items():
        cells = {what: cell([run[spec] for run in runs if spec in run]) for what, runs in learned.items()}
        for what, policy in fixed_policies(spec).items():
            cells[what] = cell([scripted(spec, policy, len(successes))])
        print(f"| {spec} | " + " | ".join(cells[what] for what in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
