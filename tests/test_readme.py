"""README.md and tests/README.md: what they say exists, and the modules keep to the house's rules of reading."""

import ast
import dataclasses
import doctest
import io
import re
import tokenize
from pathlib import Path

import figures
import pytest

import train

ROOT = Path(__file__).parent.parent
MODULES = ["agent", "env", "tools", "memory", "rollout", "grpo", "kernels", "train"]
documents = pytest.mark.parametrize("document", figures.DOCUMENTS, ids=["README", "tests/README"])


def test_the_readme_is_short():
    words = [word for word in (ROOT / "README.md").read_text().split() if any(map(str.isalnum, word))]  # not the bars of tables
    assert len(words) <= 1500


@documents
def test_links_to_lines_point_at_what_they_name(document):
    """`python tests/figures.py --links` renews them."""
    text = document.read_text()
    assert figures.LINK.search(text) and figures.with_lines(text) == text


@documents
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#L\d+)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


@documents
def test_options_of_commands_exist(document):
    options = {field.name for field in dataclasses.fields(train.Config)}
    for command in re.findall(r"python train\.py((?:[^`\n]|\\\n)*)", document.read_text()):
        for name in re.findall(r"--([a-z-]+)", command):
            assert name == "help" or name.replace("-", "_") in options, command


def test_figures_draw_what_they_are_given():
    assert doctest.testmod(figures).failed == 0
    metrics = [{"success/maze": 0.0, "success/chain": 1.0}, {"success/maze": 1.0, "success/chain": None}]
    drawn = figures.draw_curves(metrics)
    assert drawn.count("<polyline") == 2 and "maze" in drawn and "1 to 2" in drawn
    segment = {"ids": [1, 2, 3, 4], "sampled": [False, True, True, False], "turn": [-1, 0, 0, 0]}
    assert figures.writers(segment) == [("prompt", [1]), ("policy", [2, 3]), ("environment", [4])]


def code_lines(source):
    """Numbers of the lines that hold code: no blank lines, comments or docstrings."""
    found, documented = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found - documented


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_made_to_be_read(module):
    """At most 100 columns, and no function of more than 40 lines of code but `train`, which is read straight down."""
    source = (ROOT / f"{module}.py").read_text()
    assert max(map(len, source.splitlines())) <= 100
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (module, node.name) != ("train", "train"):
            assert len([n for n in lines if node.lineno <= n <= node.end_lineno]) <= 40, node.name
