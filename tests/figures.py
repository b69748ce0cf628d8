"""Pictures of a run, for the README, and the line numbers of its links.

    python tests/figures.py runs/0      # writes assets/learning_curves.svg and assets/episode.svg
    python tests/figures.py --links     # makes links such as [`grpo.update`](grpo.py#L1) up to date
"""

import ast
import gzip
import json
import re
import sys
from html import escape
from itertools import groupby
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "tests" / "README.md"]
COLOURS = ["#1f77b4", "#d95f02", "#2ca02c", "#c2185b", "#7b1fa2", "#8d6e63"]
STYLE = """<style>
text { font: 13px sans-serif }
.token { font: 12px monospace; white-space: pre } .policy { font-weight: bold }
@media (prefers-color-scheme: dark) { text { fill: #ccc } .policy { fill: #81c784 }
.environment { fill: #ffb74d } .prompt { fill: #999 } }
</style>"""
INK = {"policy": "#2e7d32", "environment": "#b26a00", "prompt": "#777"}  # on a light page


# --------------------------------------------------------------------------------------------------
# Learning curves

WIDTH, HEIGHT, LEFT, TOP = 640, 300, 50, 20


def curves(metrics: list[dict]) -> dict[str, list[float]]:
    """Success of each environment after each step, smoothed over about four steps.

    >>> curves([{"success/maze": 0.0}, {"success/maze": 1.0}])
    {'maze': [0.0, 0.25]}
    """
    smooth: dict[str, list[float]] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith("success/") and value is not None:
                curve = smooth.setdefault(key.removeprefix("success/"), [])
                before = curve[-1] if curve else value
                curve.append(before + 0.25 * (value - before))
    return smooth


def at(step: float, success: float, steps: int) -> tuple[float, float]:
    """Where a point of the plot is drawn."""
    return LEFT + step / steps * (WIDTH - LEFT - 130), TOP + (1 - success) * (HEIGHT - TOP - 50)


def draw_curves(metrics: list[dict]) -> str:
    steps = len(metrics)
    parts = [STYLE]
    for percent in (0, 25, 50, 75, 100):
        (x, y), (end, _) = at(0, percent / 100, steps), at(steps, 0, steps)
        parts.append(f'<line stroke="#bbb" x1="{x}" x2="{end}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" fill="#666" text-anchor="end">{percent} %</text>')
    for number, (name, curve) in enumerate(curves(metrics).items()):
        points = [at(step, success, steps) for step, success in enumerate(curve, 1)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        colour, y = COLOURS[number % len(COLOURS)], TOP + 20 + 22 * number
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        parts.append(f'<text x="{WIDTH - 115}" y="{y}" style="fill: {colour}">{escape(name)}</text>')
    x, y = at(steps / 2, 0, steps)
    parts.append(f'<text x="{x}" y="{y + 40}" fill="#666" text-anchor="middle">updates by reinforcement '
                 f"learning (1 to {steps}); success of the attempts, smoothed</text>")
    return svg(parts, WIDTH, HEIGHT)


# --------------------------------------------------------------------------------------------------
# One episode, by who wrote each token

COLUMNS = 96  # characters in a line


def choose(episodes: list[dict]) -> dict:
    """The last successful episode of `lookup`, or of any environment: it shows what was learned."""
    right = [e for e in episodes if e["success"] and len(e["segments"]) == 1]
    return ([e for e in right if e["env"] == "lookup"] or right)[-1]


def writers(segment: dict) -> list[tuple[str, list[int]]]:
    """Runs of tokens with the same writer: prompt, policy or environment."""
    names = []
    for sampled, turn in zip(segment["sampled"], segment["turn"]):
        names.append("policy" if sampled else "prompt" if turn < 0 else "environment")
    pairs = zip(names, segment["ids"])
    return [(name, [i for _, i in run]) for name, run in groupby(pairs, key=lambda pair: pair[0])]


def draw_episode(episode: dict, tokenizer) -> str:
    lines, row = [STYLE], 1
    for name, ids in writers(episode["segments"][0]):
        for line in tokenizer.decode(ids).split("\n"):
            for begin in range(0, max(len(line), 1), COLUMNS):
                part = escape(line[begin : begin + COLUMNS])
                lines.append(f'<text class="token {name}" fill="{INK[name]}" font-size="12" '
                             f'font-family="monospace" x="10" y="{16 * row}">{part}</text>')
                row += 1
    legend = ", ".join(f'<tspan class="{name}" fill="{ink}">{name}</tspan>'
                       for name, ink in INK.items())
    lines.append(f'<text x="10" y="{16 * row + 8}" fill="#666">written by: {legend}</text>')
    return svg(lines, 720, 16 * row + 20)


def svg(parts: list[str], width: int, height: int) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"


# --------------------------------------------------------------------------------------------------
# Links to lines

LINK = re.compile(r"\[`(\w+)\.(\w+)`\]\(((?:\.\./)?)(\w+)\.py#L(\d+)\)")


def line_of(module: str, name: str) -> int:
    """The line in which a module defines a name. Raises LookupError if it does not."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name == name:
                return node.lineno
    raise LookupError(f"{module}.py defines no {name}")


def with_lines(text: str) -> str:
    """A document whose links point at the lines of what they name."""
    def renew(link: re.Match) -> str:
        module, name, up = link[1], link[2], link[3]
        return f"[`{module}.{name}`]({up}{module}.py#L{line_of(module, name)})"

    return LINK.sub(renew, text)


def main() -> None:
    if sys.argv[1:] == ["--links"]:
        for path in DOCUMENTS:
            path.write_text(with_lines(path.read_text()))
        return
    run, assets = Path(sys.argv[1]), ROOT / "assets"
    assets.mkdir(exist_ok=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (assets / "learning_curves.svg").write_text(draw_curves(metrics))
    with gzip.open(run / "episodes.jsonl.gz", "rt") as file:
        episode = choose([json.loads(line) for line in file])
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoints" / "step-000000")
    (assets / "episode.svg").write_text(draw_episode(episode, tokenizer))


if __name__ == "__main__":
    main()
