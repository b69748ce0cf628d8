"""README.md, tests/README.md and their pictures: what they say exists and runs.

And the modules keep to the rules of reading: short lines, short functions.
"""

import ast
import dataclasses
import doctest
import io
import re
import shlex
import tokenize
import xml.etree.ElementTree
from pathlib import Path

import figures
import pytest

import train

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODULES = ["agent", "env", "tools", "memory", "rollout", "grpo", "kernels", "train"]
# So that a run takes seconds.
SMALL = ["--warmup-steps", "6", "--steps", "1", "--eval-tasks", "2", "--tasks-per-step", "2",
         "--group-size", "2"]
documents = pytest.mark.parametrize("document", figures.DOCUMENTS, ids=["README", "tests/README"])


# ---- words, links, formulas ----


def test_the_readme_is_short():
    """At most 1,500 words. Formulas and the bars of tables are none."""
    text = re.sub(r"\$\$.+?\$\$|\$.+?\$", "", README.read_text(), flags=re.DOTALL)
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    assert len(words) <= 1500


@documents
def test_links_to_lines_point_at_what_they_name(document):
    """`python tests/figures.py --links` renews them."""
    text = document.read_text()
    assert figures.LINK.search(text) and figures.with_lines(text) == text
    others = re.findall(r"\]\([^)]*#L\d+\)", figures.LINK.sub("", text))
    assert not others, "a link to a line must name what stands there"


def test_a_line_is_found_for_methods_and_fields_but_not_for_what_is_missing():
    source = (ROOT / "agent.py").read_text().splitlines()
    assert "def observe(" in source[figures.line_of("agent", "Agent.observe") - 1]
    assert "sampled: list[bool]" in source[figures.line_of("agent", "Segment.sampled") - 1]
    with pytest.raises(LookupError, match="does not define"):
        figures.line_of("agent", "Segment.observe")


@documents
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#L\d+)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_formulas_use_only_what_github_shows():
    """It drops the backslash of \\, and the like, may read }_ as emphasis, and forbids \\operatorname."""
    text = re.sub(r"```.*?```|`[^`]*`", "", README.read_text(), flags=re.DOTALL)
    formulas = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text)
    assert len(formulas) > 20
    for display, inline in formulas:
        assert not re.search(r"\\[,;:!{}\\ ]|\}_|\\operatorname|<", display or inline), display or inline


# ---- commands ----


def commands(document):
    """The commands of a document that run Python, each on one line, without comments."""
    text = document.read_text().replace("\\\n", " ")
    spans = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    lines = re.findall(r"^ {4}(?:.*&& )?((?:python|torchrun) .+)$", text, flags=re.MULTILINE)
    return [shlex.split(command, comments=True) for command in spans + lines]


@documents
def test_commands_name_files_and_options_that_exist(document):
    known = {"--help"} | {"--" + field.name.replace("_", "-")
                          for field in dataclasses.fields(train.Config)}
    found = commands(document)
    assert found
    for words in found:
        scripts = [word for word in words if word.endswith(".py")]
        for script in scripts:
            assert (ROOT / script).is_file(), words
        if "train.py" in words:
            options = words[words.index("train.py") + 1 :]
            assert known >= {word for word in options if word.startswith("--")}, words
        elif scripts and "pytest" not in words:
            source = (ROOT / scripts[0]).read_text()
            assert all(word in source for word in words if word.startswith("--")), words


def test_options_that_the_readme_names_are_options_of_train():
    named = re.findall(r"`--([a-z-]+)[^`]*`", README.read_text())
    assert named and {name.replace("-", "_") for name in named} <= {
        field.name for field in dataclasses.fields(train.Config)}


def test_the_two_first_commands_are_these():
    text = README.read_text()
    assert "python3 -m venv .venv && . .venv/bin/activate\n" in text
    assert "pip install -q -r requirements.txt && python train.py " in text
    assert "pip install -q -r requirements.txt && python -m pytest " in text


def test_your_own_tool_environment_and_model_work(tmp_path, here):
    """The README's code blocks as they stand, and its command, at a size of seconds.

    MODEL is what a first run with the same files has trained.
    """
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["buttons.py", "planner.py", "my_agent.py"]
    for name, code in blocks:
        assert code.count("\n") < 20
        (tmp_path / name).write_text(code)
    envs = ["buttons.py:Buttons", "lookup"]
    code, _, errors = here(tmp_path, "--name", "mine", *SMALL, "--env", *envs)
    assert code == 0, errors
    (command,) = [words for words in commands(README) if words[-2:] == ["--model", "MODEL"]]
    options = command[command.index("train.py") + 1 : -1] + ["runs/mine/model"]
    code, _, errors = here(tmp_path, "--name", "given", *SMALL, *options)
    assert code == 0, errors
    assert (tmp_path / "runs" / "given" / "model" / "model.safetensors").is_file()
    code, _, errors = here(tmp_path, "--name", "planner", *SMALL, "--env", "lookup", "--context", "500",
                           "--agent", "planner.py:plan_then_execute", *options[-2:])
    assert code == 0, errors
    pytest.importorskip("langchain_openai", reason="see tests/requirements-peers.txt")
    (command,) = [words for words in commands(README) if "--agent" in words]
    options = command[command.index("train.py") + 1 :]
    code, _, errors = here(tmp_path, "--name", "agent", *SMALL, *options)
    assert code == 0, errors


# ---- pictures ----


def test_examples_of_figures_are_true():
    failed, tried = doctest.testmod(figures)
    assert failed == 0 and tried


def test_learning_curves_have_a_line_and_a_name_for_each_environment():
    metrics = [{"step": 1, "success/maze": 0.0, "success/a<b": 1.0},
               {"step": 9, "success/maze": 1.0, "success/a<b": None}]
    drawn = figures.draw_curves(metrics)
    tree = xml.etree.ElementTree.fromstring(drawn)  # raises if a name was not escaped
    texts = ["".join(node.itertext()) for node in tree.iter() if node.tag.endswith("text")]
    assert {"maze", "a<b", "1", "9", "100 %", "successful attempts"} <= set(texts)
    assert drawn.count("<polyline") == 2


def test_a_picture_of_an_episode_colours_each_token_by_who_wrote_it():
    class Letters:
        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    segment = {"ids": [*map(ord, "ask\ncall\nsaid")], "sampled": [False] * 4 + [True] * 4 + [False] * 5,
               "logps": [0.0] * 13, "turn": [-1] * 4 + [0] * 9}
    record = {"env": "lookup", "step": 3, "seed": 1, "reward": 1.0, "advantage": 0.25, "turns": 2,
              "success": True, "finish": "answered", "segments": [segment]}
    assert figures.choose([{**record, "env": "maze"}, record, {**record, "advantage": 0.0}]) is record
    tree = xml.etree.ElementTree.fromstring(figures.draw_episode(record, Letters()))
    colour = {"".join(node.itertext()).strip(): node.get("fill") for node in tree.iter()}
    assert colour["prompt | ask"] == figures.SHADES["prompt"]
    assert colour["turn 0 > call"] == figures.SHADES["policy"]
    assert colour["| said"] == figures.SHADES["environment"]
    assert "advantage +0.25" in " ".join(colour)


# ---- the modules ----


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
