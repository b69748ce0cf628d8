"""The README's pictures, drawn from a run, and the line numbers of its links.

    python tests/figures.py runs/0      # writes assets/learning_curves.svg and assets/episode.svg
    python tests/figures.py --links     # [`grpo.update`](grpo.py#L1) gets the line of `update`

The pictures are SVG, written as text: no plotting library is needed.
"""

import ast
import gzip
import json
import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from agent import COLOUR_OFF, COLOURS, Episode, Segment, transcript  # noqa: E402

DOCUMENTS = [ROOT / "README.md", ROOT / "tests" / "README.md"]


def svg(width: float, height: float, background: str, font: str, parts: list[str]) -> str:
    """A picture with a background of its own, so it can be read on a light and on a dark page."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" font-size="13" font-family="{font}">\n'
            f'<rect width="100%" height="100%" rx="6" fill="{background}"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def text(x: float, y: float, content: str, colour: str, anchor: str = "start") -> str:
    return (f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}" '
            f'xml:space="preserve">{escape(content)}</text>')


def line(start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> str:
    (x1, y1), (x2, y2) = start, end
    return (f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" '
            f'stroke-width="{width:g}"/>')


# --------------------------------------------------------------------------------------------------
# Learning curves

PAPER, INK, GRID = "#ffffff", "#333333", "#dddddd"
# Colours that colour-blind readers can tell apart (Okabe and Ito).
LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 80, 24, 480, 240
SMOOTHING = 0.25  # weight of the newest step


def curves(metrics: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """The smoothed success of each environment: points (step, success).

    A step in which no attempt of an environment counts has no point there.

    >>> curves([{"step": 1, "success/maze": 0.0}, {"step": 2, "success/maze": 1.0}, {"step": 3}])
    {'maze': [(1, 0.0), (2, 0.25)]}
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in metrics:
        for key, success in entry.items():
            if not key.startswith("success/") or success is None:
                continue
            points = found.setdefault(key.removeprefix("success/"), [])
            before = points[-1][1] if points else success
            points.append((entry["step"], before + SMOOTHING * (success - before)))
    return found


def place(step: int, success: float, steps: int) -> tuple[float, float]:
    """Where a point stands in the picture. Step 1 is at the left edge of the plot."""
    x = LEFT + PLOT_WIDTH * (step - 1) / max(1, steps - 1)
    return x, TOP + PLOT_HEIGHT * (1 - success)


def draw_axes(steps: int) -> list[str]:
    parts = []
    bottom, middle = TOP + PLOT_HEIGHT, TOP + PLOT_HEIGHT / 2
    for percent in (0, 25, 50, 75, 100):
        x, y = place(1, percent / 100, steps)
        parts.append(line((x, y), (x + PLOT_WIDTH, y), GRID, 1))
        parts.append(text(x - 8, y + 4, f"{percent} %", INK, "end"))
    for step in sorted({1 + (steps - 1) * part // 4 for part in range(5)}):
        x, _ = place(step, 0, steps)
        parts.append(text(x, bottom + 20, str(step), INK, "middle"))
    parts.append(text(LEFT + PLOT_WIDTH / 2, bottom + 42, "update by reinforcement learning", INK,
                      "middle"))
    parts.append(f'<g transform="rotate(-90 20 {middle:g})">'
                 + text(20, middle, "successful attempts", INK, "middle") + "</g>")
    return parts


def draw_curves(metrics: list[dict]) -> str:
    """One line for each environment, with a legend at the right."""
    steps = max(entry["step"] for entry in metrics)
    parts = draw_axes(steps)
    key = LEFT + PLOT_WIDTH + 20
    for number, (name, points) in enumerate(curves(metrics).items()):
        colour, y = LINES[number % len(LINES)], TOP + 16 + 24 * number
        placed = [place(step, success, steps) for step, success in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2.5" '
                     f'points="{path}"/>')
        parts.append(line((key, y - 4), (key + 20, y - 4), colour, 2.5))
        parts.append(text(key + 28, y, name, INK))
    return svg(key + 120, TOP + PLOT_HEIGHT + 60, PAPER, "sans-serif", parts)


# --------------------------------------------------------------------------------------------------
# One episode, as the terminal prints it

SCREEN = "#16191d"
SHADES = {"policy": "#7ee787", "environment": "#f2cc60", "prompt": "#9aa4af", "": "#e6e6e6"}
LINE_HEIGHT, CHARACTER = 18, 7.85  # pixels
LEGEND = {"policy": "green: sampled by the policy, so trained",
          "environment": "yellow: written by the environment, only read",
          "prompt": "grey: the prompt, only read"}


def choose(records: list[dict], env: str = "lookup") -> dict:
    """The last success of `env` that had something to teach: two turns or more, an advantage.

    Only episodes of one segment: the window never filled up. If there is none, any success.
    """
    successes = [e for e in records if e["success"] and len(e["segments"]) == 1]
    if not successes:
        raise SystemExit("figures.py: no attempt of this run succeeded within one context window")
    wanted = [e for e in successes if e["env"] == env and e["turns"] > 1 and e["advantage"] > 0]
    return (wanted or successes)[-1]


def episode_of(record: dict) -> Episode:
    """A line of episodes.jsonl.gz as an Episode, with what a transcript shows."""
    segments = [Segment(**segment) for segment in record["segments"]]
    return Episode(seed=record["seed"], segments=segments, reward=record["reward"],
                   finish=record["finish"], turns=record["turns"], env=record["env"])


def writer_of(printed: str) -> tuple[str, str]:
    """(who wrote it, the text without codes) of a line of a coloured transcript.

    >>> writer_of(COLOURS["policy"] + "turn 0 > 12" + COLOUR_OFF)
    ('policy', 'turn 0 > 12')
    >>> writer_of("--- context 1 of 1")
    ('', '--- context 1 of 1')
    """
    for who, code in COLOURS.items():
        if printed.startswith(code):
            return who, printed.removeprefix(code).removesuffix(COLOUR_OFF)
    return "", printed


def draw_episode(record: dict, tokenizer) -> str:
    """The coloured transcript of an episode, and what its colours mean."""
    lines = transcript(episode_of(record), tokenizer, colour=True).split("\n")[1:]
    heading = (f"{record['env']}, update {record['step']}: reward {record['reward']:g}, "
               f"advantage {record['advantage']:+g}")
    content = [("", heading), *map(writer_of, lines), ("", ""), *LEGEND.items()]
    parts = []
    for number, (who, line_text) in enumerate(content, 1):
        parts.append(text(14, 6 + LINE_HEIGHT * number, line_text, SHADES[who]))
    width = 28 + CHARACTER * max(len(line_text) for _, line_text in content)
    return svg(round(width), LINE_HEIGHT * (len(content) + 1), SCREEN, "monospace", parts)


# --------------------------------------------------------------------------------------------------
# Links to lines

# [`grpo.GRPOConfig.epochs`](grpo.py#L77); in tests/README.md with ../ before the file.
LINK = re.compile(r"\[`(\w+)\.([\w.]+)`\]\(((?:\.\./)?)(\w+)\.py#L\d+\)")


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement defines.

    >>> [names_of(node) for node in ast.parse("def f(): pass").body + ast.parse("a = b = 1").body]
    [['f'], ['a', 'b']]
    """
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def line_of(module: str, path: str) -> int:
    """The line that defines `path` ("update", "Agent.run") in a module. Else a LookupError."""
    node = ast.parse((ROOT / f"{module}.py").read_text())
    for name in path.split("."):
        inside = [child for child in getattr(node, "body", []) if name in names_of(child)]
        if not inside:
            raise LookupError(f"{module}.py does not define {path}")
        node = inside[0]
    return node.lineno


def with_lines(document: str) -> str:
    """A document whose links point at the lines of what they name."""
    def renew(link: re.Match) -> str:
        module, path, up, file = link.groups()
        if module != file:
            raise LookupError(f"{link[0]} names {module} and points at {file}.py")
        return f"[`{module}.{path}`]({up}{module}.py#L{line_of(module, path)})"

    return LINK.sub(renew, document)


# --------------------------------------------------------------------------------------------------


def draw(run: Path, assets: Path) -> None:
    """Write both pictures of a run."""
    from transformers import AutoTokenizer  # here, so that --links is quick

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with gzip.open(run / "episodes.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoints" / "step-000000")
    assets.mkdir(exist_ok=True)
    (assets / "learning_curves.svg").write_text(draw_curves(metrics))
    (assets / "episode.svg").write_text(draw_episode(choose(records), tokenizer))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if sys.argv[1] != "--links":
        draw(Path(sys.argv[1]), ROOT / "assets")
        return
    for document in DOCUMENTS:
        document.write_text(with_lines(document.read_text()))


if __name__ == "__main__":
    main()
