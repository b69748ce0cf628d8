"""What a run's episodes have in common, and what it buys to compute that once.

    python tests/bench_sharing.py runs/1     # a finished run; some of its steps (--steps 3 20 60)

For each step: the tokens of all rows with signal, and the nodes of their trees; the tokens that
were sampled, and the distinct contexts that had to be decoded for them; and the seconds of a
forward and backward pass over the rows as trees, and over the same rows one by one, in packs of the
same size. Both take turns, with the run's own model; medians of three.
"""

import argparse
import gzip
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import grpo  # noqa: E402
import train  # noqa: E402


def episodes_of(run: Path, steps: list[int]) -> dict[int, list]:
    found = {step: [] for step in steps}
    for line in gzip.open(run / train.EPISODES, "rt"):
        e = json.loads(line)
        if e["step"] in found:
            segments = [SimpleNamespace(**s) for s in e["segments"]]
            episode = {**e, "segments": segments, "group": (e["env"], e["seed"])}
            found[e["step"]].append(SimpleNamespace(**episode))
    return found


def contexts(episodes: list) -> tuple[int, int]:
    """(tokens sampled, distinct contexts they were sampled in)"""
    sampled, seen = 0, set()
    for s in (s for e in episodes for s in e.segments):
        context = 0
        for token, was_sampled in zip(s.ids, s.sampled):
            sampled += was_sampled
            if was_sampled:
                seen.add(context)
            context = hash((context, token))
    return sampled, len(seen)


def rows_alone(rows: list, config) -> list:
    """Packs in which no row shares a tree with another."""
    with mock.patch.object(grpo.Tree, "shared", lambda *_: 0):
        return grpo.make_packs(rows, config)


def seconds(model, packs: list, config) -> float:
    began = time.perf_counter()
    for pack in packs:
        grpo.pack_loss(model, pack, config)[0].backward()
    model.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 20, 60])
    options = parser.parse_args()
    if not (options.run / "summary.json").exists():
        print(f"bench_sharing.py: not a finished run: {options.run}", file=sys.stderr)
        sys.exit(2)
    _, config = train.read_run(str(options.run))
    model = AutoModelForCausalLM.from_pretrained(options.run / "model", dtype=torch.float32)
    for step, episodes in episodes_of(options.run, options.steps).items():
        rows, _, _ = grpo.make_rows(episodes, config)
        if not rows:
            print(f"step {step}: no group with signal, or no such step")
            continue
        sampled, distinct = contexts(episodes)
        ways = {"trees": grpo.make_packs(rows, config), "alone": rows_alone(rows, config)}
        times = {name: [] for name in ways}
        for _ in range(4):
            for name, packs in ways.items():
                times[name].append(seconds(model, packs, config))
        trees, alone = (statistics.median(t[1:]) for t in times.values())
        nodes = sum(p.ids.numel() for p in ways["trees"])
        tokens = sum(len(r.ids) for r in rows)
        print(f"step {step}: {tokens:,} tokens in {len(rows)} rows, {nodes:,} in trees: "
              f"{alone:.2f} s and {trees:.2f} s, {alone / trees:.1f} times; "
              f"{sampled:,} tokens sampled in {distinct:,} contexts, "
              f"{sampled / distinct:.1f} times", flush=True)


if __name__ == "__main__":
    main()
