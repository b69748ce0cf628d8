"""What each part of the default run buys: reinforcement learning again, from a run's warm start, without it.

    python tests/ablation.py runs/0     # needs the run's first checkpoint; about 2 minutes for each row

Each variant is a run of its own, runs/0-without-..., that begins with the checkpoint step-000000.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402

PLAIN = {"negative_weight": 1.0, "temperature": 1.0, "epochs": 1}
VARIANTS = {"negative_weight": {"negative_weight": 1.0}, "temperature": {"temperature": 1.0}, "epochs": {"epochs": 1},
            "all": PLAIN}


def prepare(run: Path, name: str, options: dict) -> Path:
    """A run that has made the warm start of `run`, and nothing else, with other options."""
    variant = run.with_name(f"{run.name}-without-{name}")
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(run / "checkpoints" / "step-000000", variant / "checkpoints" / "step-000000")
    stored = json.loads((run / "run.json").read_text())
    stored["config"] |= options
    (variant / "run.json").write_text(json.dumps(stored))
    return variant


def row(name: str, run: Path) -> str:
    rates = json.loads((run / "summary.json").read_text())["after"]
    after = {spec: of["sampled"] for spec, of in rates.items()}
    greedy = [of["greedy"] for of in rates.values()]
    worst = min(after, key=after.get)
    mean = sum(after.values()) / len(after)
    return f"| {name} | {mean:.1%} ({sum(greedy) / len(greedy):.1%}) | {worst} {after[worst]:.1%} |"


def main() -> None:
    run = Path(sys.argv[1])
    rows = [row("the default", run)]
    for name, options in VARIANTS.items():
        variant = prepare(run, name, options)
        train.train(train.Config(resume=str(variant)))
        rows.append(row(f"without {name}", variant))
        print("\n".join(rows))


if __name__ == "__main__":
    main()
