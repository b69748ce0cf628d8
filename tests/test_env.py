"""env.py: how environments are found, split and checked. What they ask and pay for is in test_tasks.py."""

import asyncio
import collections
import doctest
import itertools
import os
import pathlib
import re
import subprocess
import sys
import threading
from random import Random

import pytest

import env
from agent import Agent, Chat, Script, small_tokenizer
from env import (
    ENVIRONMENTS,
    EnvError,
    check_env,
    demonstrator,
    make_env,
    seeds,
    split,
    task_hash,
    tasks_of,
)
from tools import tools_of

HERE = pathlib.Path(env.__file__).parent
CHAT = Chat(small_tokenizer(["what is the answer to the question"], 300))
NAMES = ", ".join(ENVIRONMENTS)
every_environment = pytest.mark.parametrize("name", ENVIRONMENTS)


def play(task, messages, **options):
    """An episode of a policy that writes these messages, on an environment and the seed of a task."""
    environment, seed = task
    options = {"max_turns": 6, "max_new_tokens": 1500, "context": 10**5} | options
    return asyncio.run(Agent(Script(CHAT, messages), CHAT, **options).run(environment, seed))


# ---- seeds and the held-out split ----


@pytest.mark.parametrize("spec", [*ENVIRONMENTS, "calculator:digits=1", "maze:map=0"])
def test_one_task_in_five_is_held_out_for_ever(spec):
    """A split by seed puts the same task on both sides: small task spaces leaked into the evaluation.

    And a maze without its map had seven texts for all its tasks: of the shortest ones none was held out, and the search for one
    did not end.
    """
    factory = make_env(spec)
    environment = factory()
    tasks = [environment.reset(seed) for seed in range(1000)]
    assert 0.15 < sum(split(task) != "train" for task in tasks) / 1000 < 0.25
    training = itertools.islice(tasks_of(factory, evaluation=False), 200)
    evaluation = itertools.islice(tasks_of(factory, evaluation=True, start=10**6), 50)
    assert not {task_hash(task) for _, task in training} & {task_hash(task) for _, task in evaluation}


def test_seeds_begin_where_they_are_told():
    factory = make_env("calculator")
    first = list(itertools.islice(seeds(factory, evaluation=False), 20))
    assert list(itertools.islice(seeds(factory, evaluation=False, start=first[7]), 13)) == first[7:]
    others = [seeds(factory, evaluation=True, final=final) for final in (False, True)]
    upto = [itertools.takewhile(lambda s: s <= first[-1], side) for side in others]
    assert sorted([*first, *itertools.chain(*upto)]) == list(range(first[-1] + 1)), "each seed is on one side"


def test_final_figures_are_of_tasks_that_nothing_was_chosen_on():
    """Half of those held out. Settings were chosen on the very tasks that the evidence was of."""
    factory = make_env("calculator")
    for final, side in ((False, "tune"), (True, "final")):
        found = itertools.islice(tasks_of(factory, evaluation=True, final=final), 100)
        assert {split(task) for _, task in found} == {side}
    counts = collections.Counter(split(task) for task in map(factory().reset, range(2000)))
    assert 160 < counts["tune"] < 240 and 160 < counts["final"] < 240


def test_the_same_seed_gives_the_same_task_in_every_process():
    """`hash` of a string differs between processes: a run that was resumed had other tasks."""
    code = "import env; print([[e.reset(s) for s in range(5)] for make in env.ENVIRONMENTS.values() for e in [make()]])"
    here = [[e.reset(s) for s in range(5)] for make in ENVIRONMENTS.values() for e in [make()]]
    for hash_seed in ("1", "2"):
        settings = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=settings, capture_output=True, text=True, check=True)
        assert there.stdout == f"{here}\n"


# ---- make_env ----


def test_a_reset_that_hangs_costs_its_seed_only(monkeypatch):
    """The search for tasks stood still for ever. What hangs may still change its instance, so a new one goes on."""
    monkeypatch.setattr(env, "CALL_SECONDS", 0.2)

    training = [seed for seed in range(100) if split(str(seed)) == "train"]
    hangs = training[0]

    class Slow(Fine):
        def reset(self, seed):
            if seed == hangs:
                threading.Event().wait()
            return str(seed)

    found = [seed for seed, _ in itertools.islice(env.tasks_of(Slow, evaluation=False), 12)]
    assert found == training[1:13]


@pytest.mark.parametrize("evaluation", [False, True])
def test_an_environment_with_too_few_tasks_ends_the_search(evaluation):
    """All of its tasks are on one side of the split: the search for another one never ended."""

    class Few(Fine):
        def reset(self, seed):
            return next(text for text in map(str, range(100)) if (split(text) == "train") == evaluation)

    kind = "held out" if evaluation else "to train on"
    said = f"Few has too few tasks: of 2000 seeds up to 2006 none gives one that is {kind}"
    with pytest.raises(EnvError, match=f"^{said}$"):
        next(seeds(Few, evaluation=evaluation, start=7))


def test_a_search_for_tasks_ends_after_the_last_one():
    """The seeds are counted from the last task that was found."""

    class Ends(Fine):
        def reset(self, seed):
            texts = map(str, range(seed, 10**6))
            return next(text for text in texts if (split(text) == "train") == (seed <= 20))

    found = seeds(Ends, evaluation=False)
    assert list(itertools.islice(found, 21)) == list(range(21))
    with pytest.raises(EnvError, match="of 2000 seeds up to 2020 none"):
        next(found)


def test_a_reset_that_hangs_or_fails_is_passed_over(monkeypatch):
    """A reset that hung hung the run. What it left behind must not disturb the next one, either."""
    monkeypatch.setattr(env, "CALL_SECONDS", 0.05)

    class Slow(Fine):
        used = 0

        def reset(self, seed):
            if seed % 3 == 1:
                hang(self)
            if seed % 3 == 2:
                self.used += 1
                raise SystemExit(seed)
            return f"Task {seed + 1000 * self.used}"

    found = list(itertools.islice(tasks_of(Slow, evaluation=False), 5))
    assert all(seed % 3 == 0 and task == f"Task {seed}" for seed, task in found)


def hang(self, *_):
    threading.Event().wait()


@pytest.mark.parametrize("reset, last", [
    (hang, "took longer than 0.02 s"),
    (lambda self, seed: [].pop(), "raised IndexError: pop from empty list"),
    (lambda self, seed: None, "must be of type str, not None"),
])
def test_a_reset_that_always_fails_ends_the_search_with_one_line(reset, last, monkeypatch):
    """Each failure costs one instance: a call that hangs may go on changing its own."""
    monkeypatch.setattr(env, "CALL_SECONDS", 0.02 if reset is hang else 10.0)
    instances = []

    def factory():
        instances.append(type("Bad", (Fine,), {"reset": reset})())
        return instances[-1]

    with pytest.raises(EnvError, match=rf"^20 seeds failed in a row, at last: Bad\.reset\(19\) {last}$"):
        next(seeds(factory, evaluation=False))
    assert len(instances) == 20


def test_a_task_with_half_a_character_is_on_one_side_of_the_split():
    """A text that no file can hold: its hash raised."""
    assert split("\ud800") == split("?") and task_hash("\ud800") == task_hash("?")


def test_make_env_reads_difficulty():
    """And a constructor that refuses is named."""
    environment = make_env("lookup:people=12,hops=2")()
    assert (environment.people, environment.hops, environment.top) == (12, 2, 1)
    assert make_env("lookup")() is not make_env("lookup")()
    with pytest.raises(EnvError, match=r"^maze:size=2: ValueError: size must be 4 to 9"):
        make_env("maze:size=2")()


@pytest.mark.parametrize("spec, message", [
    ("looklup", f"unknown environment 'looklup': choose from {NAMES}, FILE.py:Class"), ("", "unknown environment ''"),
    ("lookup:hop=2", "lookup:hop=2: TypeError: "), ("lookup:hop=2", "'hop'. lookup takes NAME=VALUE of (hops: int = 3, people:"),
    ("lookup:hops", "lookup:hops: ValueError: "), ("lookup:hops=two", "'two'. lookup takes NAME=VALUE of (hops: int = 3,"),
    ("lookup:hops=--2", "'--2'"), ("lookup:hops=²", "'²'"), ("lookup:hops=2=3", "lookup takes NAME=VALUE of"),
    ("nowhere.py:A", "nowhere.py cannot be loaded: FileNotFoundError"),
])
def test_make_env_says_what_is_wrong_in_one_line(spec, message):
    with pytest.raises(EnvError) as error:
        make_env(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


MINE = '''
class Echo:
    def __init__(self, size: int = 1):
        self.size = size
    def reset(self, seed):
        self.word, self.given = str(seed) * self.size, None
        return f"Say {self.word}"
    def final_answer(self, answer: str):
        """Answer.

        Args:
            answer: The answer
        """
        self.given = answer
    def get_reward(self): return float(self.given == self.word)
    done = property(lambda self: self.given is not None)
    state = property(lambda self: "")

def demonstrate_echo(env, random):
    yield env.word if random.random() < 0.3 else "no"
'''


def test_an_environment_of_ones_own_in_under_20_lines(tmp_path):
    """`inspect.getmodule` knew nothing of a class loaded from a file: its demonstrator was never found."""
    assert MINE.strip().count("\n") < 20
    (tmp_path / "mine.py").write_text(MINE)
    factory = make_env(f"{tmp_path}/mine.py:Echo:size=3")
    check_env(factory)
    environment = factory()
    assert environment.reset(7) == "Say 777"
    found = demonstrator(factory)
    rewards = [play((environment, seed), found(environment, Random(seed))).reward for seed in range(60)]
    assert 0 < sum(rewards) < 30


def test_a_file_takes_no_other_modules_place(tmp_path):
    """Named random.py, it would have been Python's `random` for all that came later; and two env.py are two."""
    (tmp_path / "a").mkdir()
    (tmp_path / "random.py").write_text(MINE)
    (tmp_path / "a" / "random.py").write_text(MINE.replace('"no"', '"other"'))
    one, two = make_env(f"{tmp_path}/random.py:Echo"), make_env(f"{tmp_path}/a/random.py:Echo")
    assert sys.modules["random"].Random is Random
    said = [set().union(*(demonstrator(f)(e, Random(n)) for n in range(9) if e.reset(1))) for f in (one, two) for e in [f()]]
    assert "no" in said[0] and "other" in said[1] and "no" not in said[1]


def test_a_class_is_found_by_any_name_it_has_in_its_file(tmp_path):
    (tmp_path / "mine.py").write_text(MINE + "\n\nOther = Echo\n")
    assert make_env(f"{tmp_path}/mine.py:Other:size=2")().reset(4) == "Say 44"


@pytest.mark.parametrize("code, message", [
    ("class A(:", "cannot be loaded: SyntaxError"), ("import no_such_module_", "cannot be loaded: ModuleNotFoundError"),
    ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
    ("from pathlib import Path as A", "unknown environment 'A': choose from FILE.py:Class"), ("A = 3", "unknown environment 'A': choose from FILE.py:Class"),
    ("class B: pass", "unknown environment 'A': choose from B, FILE.py:Class"),
])
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(EnvError, match=re.escape(message)) as error:
        make_env(f"{tmp_path}/bad.py:A")
    assert "\n" not in str(error.value)


def test_a_constructor_that_raises_is_one_clear_line(tmp_path):
    (tmp_path / "bad.py").write_text("class A:\n    def __init__(self, size=1, *rest, **more): raise RuntimeError('no\\nroom')")
    for options in ("size=3", "more=3", ""):
        with pytest.raises(EnvError, match=re.escape(f"bad.py:A:{options}: RuntimeError: no room. A takes NAME=VALUE of (size=1, ")):
            make_env(f"{tmp_path}/bad.py:A:{options}")


# ---- check_env: one class for each way not to fit ----


@every_environment
def test_the_environments_here_fit(name):
    check_env(make_env(name))


class Fine:
    """An environment that fits; those below break one thing each."""

    state = ""

    def reset(self, seed):
        self.given = None
        return f"Say {seed}"

    def final_answer(self, answer: str) -> str:
        """Answer.

        Args:
            answer: The answer
        """
        self.given = answer

    def get_reward(self):
        return float(self.given is not None)

    @property
    def done(self):
        return self.given is not None


class Lonely(Fine):
    pass


def fail(self, *_):
    raise OSError("no\ndisk")


def undocumented(self, x):
    return x


def no_arguments(self) -> str:
    """Answer."""
    return ""


def remember(self, answer: str) -> None:
    """Answer.

    Args:
        answer: The answer
    """
    type(self).given = answer


def reset_of_shared(self, seed):
    type(self).given = None if seed else getattr(type(self), "given", None)
    return f"Say {seed}"


def reset_that_keeps(self, seed):
    self.given = getattr(self, "given", None)
    return f"Say {seed}"


BROKEN = {
    "reset returns nothing": ({"reset": lambda self, seed: None}, "reset(0) must be of type str, not None"),
    "reset raises": ({"reset": fail}, "reset(0) raised OSError: no disk"),
    "reset takes no seed": ({"reset": lambda self: "x"}, "reset(0) raised TypeError"),
    "reset is missing": ({"reset": None}, "reset(0) raised TypeError"),
    "reset is random": ({"reset": lambda self, seed: str(Random().random())}, "reset(0) must always give the same task"),
    "reset ignores the seed": ({"reset": lambda self, seed: setattr(self, "given", None) or "x"}, "must depend on the seed"),
    "state is a method": ({"state": lambda self: ""}, "state must be of type str, not <bound method"),
    "state is a number": ({"state": 3}, "state must be of type str, not 3"),
    "state raises": ({"state": property(fail)}, "state raised OSError: no disk"),
    "done is no bool": ({"done": property(lambda self: None)}, "done must be of type bool, not None"),
    "done from the start": ({"done": True}, "done must be False after reset"),
    "reward is too large": ({"get_reward": lambda self: 10}, "get_reward() must be from 0 to 1, not 10.0"),
    "reward is NaN": ({"get_reward": lambda self: float("nan")}, "must be from 0 to 1, not nan"),
    "reward is nothing": ({"get_reward": lambda self: None}, "get_reward() raised TypeError"),
    "reward too large when done": ({"get_reward": lambda self: 2 if self.given else 0}, "must be from 0 to 1, not 2.0"),
    "reward raises": ({"get_reward": fail}, "get_reward() raised OSError: no disk"),
    "reward is missing": ({"get_reward": property(lambda self: self.nothing)}, "get_reward() raised AttributeError"),
    "behaviour is a list": ({"behaviour": [1]}, "behaviour must be of type dict, not [1]"),
    "a tool without docstring": ({"look": undocumented}, "look, whose type hints and docstring describe it as a tool, raised"),
    "no tools": ({"final_answer": None}, "Mine has no public method: these are the tools"),
    "final_answer of nothing": ({"final_answer": no_arguments}, "final_answer must have one argument, answer: str"),
    "instances share": ({"reset": reset_of_shared, "final_answer": remember, "given": None}, "instances must share nothing"),
    "reset keeps the last attempt": ({"reset": reset_that_keeps}, "reset(0) must clear the last attempt"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_check_env_names_the_method_and_what_it_gave(way):
    """"Your environment is invalid" and a traceback from inside the trainer help nobody."""
    members, message = BROKEN[way]
    cls = type("Mine", (Fine,), members)
    check_env(Fine)
    with pytest.raises(EnvError) as error:
        check_env(cls)
    assert message in str(error.value) and str(error.value).startswith("Mine") and "\n" not in str(error.value)


def look(self) -> str:
    """Look."""
    threading.Event().wait()


@pytest.mark.parametrize("members, what", [
    ({"look": look}, "look"), ({"reset": hang}, "reset(0)"), ({"get_reward": hang}, "get_reward()"),
    ({"done": property(hang)}, "done"), ({"state": property(hang)}, "state"),
    ({"behaviour": property(hang)}, "behaviour")])
def test_check_env_names_what_hangs(members, what, monkeypatch):
    """A tool waited for a server that was not there: the run printed nothing, and did not begin."""
    monkeypatch.setattr(env, "CALL_SECONDS", 0.2)
    with pytest.raises(EnvError, match=re.escape(f"Mine.{what} took longer than 0.2 s")):
        check_env(type("Mine", (Fine,), members))


def test_check_env_uses_every_tool():
    """Only final_answer was tried: a class-level list that another tool appends to went unseen."""

    class Shared(Fine):
        log: list = []

        def walk(self, way: str, steps: int) -> None:
            """Walk.

            Args:
                way: Where to (choices: ["north", "south"])
                steps: How far
            """
            assert way == "north" and steps == 1
            self.log.append(way)

        @property
        def state(self):
            return str(self.log)

    with pytest.raises(EnvError, match="instances must share nothing.*north"):
        check_env(Shared)


def test_check_env_accepts_tools_that_fail_or_wait():
    class Odd(Fine):
        def fail(self) -> str:
            """Fail."""
            raise RuntimeError

        async def wait(self) -> str:
            """Wait."""
            return "done"

    check_env(Odd)


# ---- playing by hand ----


@pytest.fixture
def by_hand(monkeypatch, capsys):
    """Play with prepared lines of input; gives what was printed. After the last line, the end of the input or another key."""

    def play_by_hand(spec, *lines, then=EOFError):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, None)
            if line is None:
                raise then
            return line

        monkeypatch.setattr("builtins.input", read)
        env._play(spec)
        return capsys.readouterr().out

    return play_by_hand


def test_playing_in_the_terminal(by_hand):
    """The tools are functions; a mistake is one line. Ctrl-C or the end of the input in the middle is no traceback."""
    out = by_hand("lookup", 'search("lies")', "", "search()", "serach", 'final_answer("Willow City")')
    assert "lies on the" in out and "SyntaxError: " in out and "NameError: name 'serach'" in out
    assert "missing 1 required positional argument: 'query'" in out and out.endswith("The answer was taken.\nreward 0\n")
    for how in (EOFError, KeyboardInterrupt):
        assert by_hand("calculator", 'calculator("6 * 7")', then=how).endswith("42\nreward 0\n")


WALK = '''
class Walk:
    state = ""
    def reset(self, seed):
        self.done = False
        return f"Walk {seed}"
    def walk(self, way: str, steps: int):
        """Walk.

        Args:
            way: Where to
            steps: How far
        """
        self.done = steps == 3
    async def wait(self):
        """Wait."""
        return "waited"
    def get_reward(self): return float(self.done)
'''


def test_playing_what_has_no_final_answer(by_hand, tmp_path):
    """Whatever the arguments are, and if a tool waits."""
    (tmp_path / "walk.py").write_text(WALK)
    out = by_hand(f"{tmp_path}/walk.py:Walk", "wait()", "walk('north', steps=2)", "walk('north', 3)")
    assert out.endswith("waited\nNone\nNone\nreward 1\n")


def test_an_unknown_name_is_one_line_and_exit_code_2():
    command = [sys.executable, "env.py", "nowhere"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"unknown environment 'nowhere': choose from {NAMES}, FILE.py:Class\n"


def test_doctests():
    """What a docstring shows is run: the hash in one was never right."""
    assert doctest.testmod(env).failed == 0


def test_tools_are_the_public_methods():
    """Helpers, reset, get_reward, state, done and behaviour are none; final_answer comes with the base class."""
    assert {name: sorted(tools_of(make_env(name)())) for name in ENVIRONMENTS} == {
        "calculator": ["calculator", "final_answer"], "lookup": ["final_answer", "search"], "maze": ["walk"],
        "chain": ["final_answer"], "recall": ["final_answer", "next_page", "recall", "remember"], "mastermind": ["guess"]}
