"""The evidence for each capability, in one table: what was learned, from what, and what it cannot do without.

    python tests/evidence.py runs/1 runs/2 runs/3                     # finished runs of `python train.py --seed N`
    python tests/evidence.py runs/1 runs/2 --without runs/4 runs/5    # and of the same without the mechanisms:
    python train.py --seed 1 --env calculator:tool=0 lookup:open=0 maze:map=0 chain:think=0 recall:notes=0 mastermind:feedback=0

A row per environment, success on held-out tasks at temperature 1, all seeds together, with 95 % intervals: acting at random,
the demonstrator, the model after imitation, after imitating only what succeeded (from the same checkpoint, for as many seconds
as the run spent on rollouts and updates), after reinforcement learning, the same without the mechanism, and a scripted oracle
that reads what the policy reads. Runs that are only being scored take seconds, imitation takes minutes. Writes RUN/imitation.json.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

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
    """Successes of policy(environment, seed) -> messages, on the held-out tasks that models are scored on."""
    factory, successes = make_env(spec), []
    for seed in islice(seeds(factory, evaluation=True), tasks):
        environment = factory()
        environment.reset(seed)
        successes.append(int(play((environment, seed), policy(environment, seed), max_turns=50).success))
    return successes


def imitate_right_ones(run: Path) -> dict:
    """Scores of the run's warm start after imitating only demonstrations that succeeded, other ones than it was warmed up with."""
    if (run / "imitation.json").exists():
        return json.loads((run / "imitation.json").read_text())
    spent = json.loads((run / "summary.json").read_text())["seconds"]
    _, config = train.read_run(str(run))
    factories, checkpoint = train.make_envs(config), run / "checkpoints" / "step-000000"
    model, tokenizer = train.load_model(config, factories, checkpoint)
    chat, engine = train.make_engine(model, tokenizer, config)
    # As many updates as the time should allow, so that the learning rate comes down.
    seconds = spent["rollouts"] + spent["update"]
    options = replace(config, warmup_steps=max(1, int(config.warmup_steps * seconds / spent["warm start"])), seed=config.seed + 1000)
    train.imitate(model, chat, factories, options, keep=lambda episode: episode.success, seconds=seconds)
    scores = train.evaluate(engine, chat, factories, config)
    (run / "imitation.json").write_text(json.dumps(scores))
    return scores


def cell(successes: list[int]) -> str:
    low, high = train.interval(successes)
    return f"{train.rate(successes):.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def trained(runs: list[Path], key: str) -> dict[str, list[int]]:
    """{environment without its options: successes of all runs}"""
    pooled: dict[str, list[int]] = {}
    for run in runs:
        for spec, scores in json.loads((run / "scores.json").read_text())[key].items():
            pooled.setdefault(spec.partition(":")[0], []).extend(scores["sampled"])
    return pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--without", nargs="*", type=Path, default=[], help="runs without the mechanisms")
    options = parser.parse_args()
    missing = [str(run) for run in options.runs + options.without if not (run / "scores.json").exists()]
    if missing:
        print(f"evidence.py: not a finished run: {', '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    before, after, without = trained(options.runs, "before"), trained(options.runs, "after"), trained(options.without, "after")
    imitation: dict[str, list[int]] = {}
    for run in options.runs:
        for spec, scores in imitate_right_ones(run).items():
            imitation.setdefault(spec, []).extend(scores["sampled"])
    columns = ("environment", "at random", "demonstrator", "imitation", "imitation of right ones", "reinforcement learning",
               "without the mechanism", "oracle")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for spec in after:
        tasks = len(after[spec])
        fixed = [scripted(spec, policy, tasks) for policy in (
            lambda e, seed, spec=spec: perform(e, seed, lambda task: RANDOM[spec](task, Random(seed))),
            lambda e, seed, spec=spec: demonstrator(make_env(spec))(e, Random(seed)),
            lambda e, seed, spec=spec: perform(e, seed, ORACLES[spec]))]
        row = [fixed[0], fixed[1], before[spec], imitation[spec], after[spec], without.get(spec), fixed[2]]
        print(f"| {spec} | " + " | ".join(cell(successes) if successes else "not run" for successes in row) + " |", flush=True)


if __name__ == "__main__":
    main()
