"""What reinforcement learning adds: the same model, for the same seconds, imitating only demonstrations that succeeded.

    python tests/compare_imitation.py runs/0 runs/1 runs/2     # finished runs, of several seeds

Each run's checkpoint after the warm start goes on by imitation for as long as the run spent on rollouts and updates (making
the demonstrations is not counted). Prints a table: held-out success after the warm start, after reinforcement learning
(both from the run's summary), after this. Writes RUN/imitation.json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train


def imitate_right_ones(run: Path, seconds: float, warm_seconds: float) -> dict:
    _, config = train.read_run(str(run))
    factories = train.make_envs(config)
    checkpoint = run / "checkpoints" / "step-000000"
    model, tokenizer = train.load_model(config, factories, checkpoint)
    chat, engine = train.make_engine(model, tokenizer, config)
    optimizer = train.Optimizer(model, config)
    optimizer.load_state_dict(torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer"])
    # As many updates as the time should allow, so that the learning rate comes down; other demonstrations than the warm start's.
    updates = max(1, int(config.warmup_steps * seconds / warm_seconds))
    options = replace(config, warmup_steps=updates, seed=config.seed + 1000)
    train.imitate(model, optimizer, chat, factories, options, keep=lambda episode: episode.success, seconds=seconds)
    return train.evaluate(engine, chat, factories, config)


def percent(scores: dict) -> str:
    low, high = train.interval(scores["sampled"])
    return f"{train.rate(scores['sampled']):.1%} [{low:.1%}, {high:.1%}] ({train.rate(scores['greedy']):.1%})"


def main(runs: list[str]) -> None:
    rows = []
    for run in map(Path, runs):
        summary = json.loads((run / "summary.json").read_text())
        spent = summary["seconds"]
        scores = imitate_right_ones(run, spent["rollouts"] + spent["update"], spent["warm start"])
        (run / "imitation.json").write_text(json.dumps(scores))
        for spec, e in summary["environments"].items():
            rows.append(f"| {summary['seed']} | {spec} | {e['before']:.1%} ({e['before_greedy']:.1%}) | {e['after']:.1%} "
                        f"[{e['ci_after'][0]:.1%}, {e['ci_after'][1]:.1%}] ({e['after_greedy']:.1%}) | {percent(scores[spec])} |")
            print(rows[-1], flush=True)
    print("\n| seed | environment | warm start | reinforcement learning | imitation of the right ones |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("which runs? python tests/compare_imitation.py runs/0 runs/1")
    main(sys.argv[1:])
