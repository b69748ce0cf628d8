"""env.py: tasks that can be solved, demonstrators that mostly do not, and environments that do not fit."""

import asyncio
import doctest
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

import env
from agent import Agent, Chat, Script, small_tokenizer
from env import ENVIRONMENTS, EnvError, check_env, demonstrator, held_out, make_env, seeds, task_hash
from tools import format_call, tools_of

HERE = pathlib.Path(env.__file__).parent
CHAT = Chat(small_tokenizer(["what is the answer to the question"], 300))
NAMES = ", ".join(ENVIRONMENTS)
every_environment = pytest.mark.parametrize("name", ENVIRONMENTS)


def play(task, messages, **options):
    """An episode of a policy that writes these messages, on an environment and the seed of a task."""
    environment, seed = task
    options = {"max_turns": 6, "max_new_tokens": 1500, "context": 10**5} | options
    return asyncio.run(Agent(Script(CHAT, messages), CHAT, **options).run(environment, seed))


# ---- oracles: they read what a policy could read, nothing else ----


def solve_calculator(task, environment):
    a, b = re.findall(r"\d+", task)
    words = {"in each box": "*", "a day": "*", "times": "*", "buys": "+", "together": "+", "plus": "+", "leak": "-", "minus": "-"}
    (operator,) = {sign for word, sign in words.items() if word in task}
    return environment.calculator(f"{a} {operator} {b}")


def solve_lookup(task, environment):
    here = re.search(r"that (\w+ \w+) works for", task)[1]
    hops = ["works as an accountant for", "is based in"]
    hops += ["lies on the"] if "river" in task else []
    for relation in hops:
        here = re.search(rf"^{here} {relation} (.*)\.$", environment.search(here), re.MULTILINE)[1]
    return here


ORACLES = {"calculator": solve_calculator, "lookup": solve_lookup}


@every_environment
def test_every_task_can_be_solved_by_reading(name):
    """A search that left the wanted document out made one task in thirty unsolvable, and the reward noisy."""
    environment = make_env(name)()
    for seed in range(200):
        answer = ORACLES[name](environment.reset(seed), environment)
        assert not environment.done and environment.get_reward() == 0
        environment.final_answer(answer)
        assert environment.done and environment.get_reward() == 1, f"seed {seed}"


DIFFICULTIES = ["calculator:digits=1", "calculator:digits=8", "lookup:hops=2", "lookup:people=2", "lookup:people=16,top=3"]


@pytest.mark.parametrize("spec", DIFFICULTIES)
def test_every_difficulty_can_be_solved(spec):
    environment = make_env(spec)()
    check_env(make_env(spec))
    for seed in range(30):
        environment.final_answer(ORACLES[spec.partition(":")[0]](environment.reset(seed), environment))
        assert environment.get_reward() == 1


def test_lookup_never_answers_with_the_person_asked_about():
    """Where somebody ran the company they work for, repeating the question was right."""
    environment = make_env("lookup")()
    for seed in range(500):
        task = environment.reset(seed)
        assert environment._answer not in task


def test_no_search_of_lookup_finds_two_links():
    """With the company in the answer to the first search and its city too, one turn would do for a task that asks for three."""
    environment = make_env("lookup")()
    for seed in range(100):
        environment.reset(seed)
        for here, there, beyond in zip(environment._chain, environment._chain[1:], environment._chain[2:]):
            lines = environment.search(here).split("\n")
            assert any(there in line for line in lines) and not any(there in line and beyond in line for line in lines)


@every_environment
def test_the_answer_counts_in_any_dress_but_only_the_first(name):
    """Guessing on after the answer, several in one message, made a lottery of the task."""
    environment = make_env(name)()
    environment.reset(1)
    environment.final_answer(f" {environment._answer.upper()}. ")
    assert environment.get_reward() == 1
    environment.reset(1)
    environment.final_answer("wrong")
    environment.final_answer(environment._answer)
    assert environment.get_reward() == 0


# ---- demonstrators ----


@every_environment
def test_demonstrators_are_wrong_on_purpose(name):
    """Imitating a good one, there is nothing left to learn; imitating one that never succeeds, nothing to learn from."""
    factory = make_env(name)
    demonstrate, episodes = demonstrator(factory), []
    for seed in range(300):
        environment = factory()
        environment.reset(seed)
        episodes.append(play((environment, seed), demonstrate(environment, Random(seed))))
    assert all(e.finish == "answered" and e.tool_errors == 0 for e in episodes), "it speaks the language of calls"
    assert 0.2 < sum(e.success for e in episodes) / 300 < 0.5
    assert all(e.tool_calls for e in episodes if e.success), "and no luck is involved in its successes"


def decisions(demonstrate, environment, seed):
    """How often each course of a demonstrator (its messages, in order) is taken, and whether it succeeds."""
    courses = {}
    for number in range(200):
        environment.reset(seed)
        messages = list(demonstrate(environment, Random(number)))
        course = (*messages, "end")
        courses.setdefault(course, []).append(messages[-1] == environment._answer)
    return courses


@every_environment
def test_the_likeliest_behaviour_of_a_demonstrator_fails(name):
    """A greedy policy takes the likelier way at each turn: that one must not lead to the answer."""
    factory = make_env(name)
    for seed in range(20):
        courses = decisions(demonstrator(factory), factory(), seed)
        way = ()
        while way[-1:] != ("end",):
            began = [course for course, ends in courses.items() for _ in ends if course[: len(way)] == way]
            way = (*way, Counter(course[len(way)] for course in began).most_common(1)[0][0])
        assert not any(courses[way]), f"seed {seed}: {way}"


def test_an_environment_without_a_demonstrator_has_none():
    assert demonstrator(lambda: Lonely()) is None


# ---- contract 10 ----


def for_ever(name):
    call = {"calculator": format_call("calculator", expression="1 + 1"), "lookup": format_call("search", query="river")}[name]
    return itertools.repeat(call)


DEGENERATE = {
    "format only": lambda name, task: itertools.repeat("<think>Let me think.</think>\n<tool_call>\n{}\n</tool_call>"),
    "tools for ever": lambda name, task: for_ever(name),
    "many tools at once": lambda name, task: itertools.repeat(next(for_ever(name)) * 4),
    "answer without tools": lambda name, task: [re.findall(r"\d+|[A-Z]\w+ [A-Z]\w+", task)[-1]],
    "say nothing": lambda name, task: itertools.repeat(""),
    "answer with everything": lambda name, task: [" ".join(re.findall(r"\w+", task))],
}


@every_environment
@pytest.mark.parametrize("policy", DEGENERATE)
def test_contract_10_degenerate_policies_score_below_an_honest_one(name, policy):
    """A reward for the format, or for each call, is what such policies are found by; success must pay, and only that."""
    factory, total = make_env(name), 0.0
    for seed in range(20):
        environment = factory()
        episode = play((environment, seed), iter(DEGENERATE[policy](name, environment.reset(seed))))
        total += episode.reward
    assert total / 20 <= 0.05, "an honest one scores 1"


@every_environment
def test_contract_10_the_honest_one_scores_1(name):
    """The oracle's calls and its answer, through the same loop as the degenerate ones."""
    factory = make_env(name)
    tool, key = {"calculator": ("calculator", "expression"), "lookup": ("search", "query")}[name]
    for seed in range(25):
        environment = factory()
        answer = ORACLES[name](environment.reset(seed), environment)
        asked = list(environment._trace)
        episode = play((factory(), seed), iter([*(format_call(tool, **{key: text}) for text in asked), answer]))
        assert episode.reward == 1 and episode.tool_calls == len(asked) and episode.finish == "answered"
        assert all(isinstance(value, (int, float)) for value in episode.behaviour.values()) and episode.behaviour


def test_behaviour_counts_what_was_done():
    environment = make_env("calculator")()
    environment.reset(0)
    assert environment.behaviour == {"calls": 0}
    environment.calculator("1 + 1")
    assert environment.behaviour == {"calls": 1} and environment.state == "1 + 1"
    environment = make_env("lookup")()
    environment.reset(0)
    environment.search("nobody")
    assert environment.behaviour == {"searches": 1, "hops": 0}
    environment.search(environment._chain[0])
    assert environment.behaviour == {"searches": 2, "hops": 1}


# ---- seeds and the held-out split ----


@every_environment
def test_one_task_in_five_is_held_out_for_ever(name):
    """A split by seed puts the same task on both sides: small task spaces leaked into the evaluation."""
    factory = make_env(name)
    environment = factory()
    tasks = [environment.reset(seed) for seed in range(1000)]
    assert 0.15 < sum(map(held_out, tasks)) / 1000 < 0.25
    training = [environment.reset(seed) for seed in itertools.islice(seeds(factory, evaluation=False), 400)]
    evaluation = [environment.reset(seed) for seed in itertools.islice(seeds(factory, evaluation=True, start=10**6), 100)]
    assert not {*map(task_hash, training)} & {*map(task_hash, evaluation)}


def test_seeds_begin_where_they_are_told():
    factory = make_env("calculator")
    first = list(itertools.islice(seeds(factory, evaluation=False), 20))
    assert list(itertools.islice(seeds(factory, evaluation=False, start=first[7]), 13)) == first[7:]
    both = sorted([*first, *itertools.takewhile(lambda s: s <= first[-1], seeds(factory, evaluation=True))])
    assert both == list(range(first[-1] + 1)), "each seed is on one side"


def test_the_same_seed_gives_the_same_task_in_every_process():
    """`hash` of a string differs between processes: a run that was resumed had other tasks."""
    code = "import env; print([[e.reset(s) for s in range(5)] for make in env.ENVIRONMENTS.values() for e in [make()]])"
    here = [[e.reset(s) for s in range(5)] for make in ENVIRONMENTS.values() for e in [make()]]
    for hash_seed in ("1", "2"):
        settings = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=settings, capture_output=True, text=True, check=True)
        assert there.stdout == f"{here}\n"


@every_environment
def test_instances_share_nothing(name):
    """Members of a group play the same task at the same time."""
    one, other = make_env(name)(), make_env(name)()
    assert one.reset(5) == other.reset(5)
    ORACLES[name](one.reset(5), one)
    one.final_answer("x")
    assert one.done and one.state and not other.done and not other.state and not any(other.behaviour.values())


# ---- make_env ----


def test_make_env_reads_difficulty():
    environment = make_env("lookup:people=12,hops=2")()
    assert (environment.people, environment.hops, environment.top) == (12, 2, 1)
    assert make_env("lookup")() is not make_env("lookup")()


@pytest.mark.parametrize("spec, message", [
    ("looklup", f"unknown environment 'looklup': choose from {NAMES}"), ("", "unknown environment ''"),
    ("lookup:hop=2", "'hop=2' in 'lookup:hop=2': want NAME=WHOLE NUMBER, NAME one of hops, people, top"),
    ("lookup:hops", "'hops'"), ("lookup:hops=two", "'hops=two'"),
    ("lookup:hops=--2", "'hops=--2'"), ("lookup:hops=²", "'hops=²'"),
    ("nowhere.py:A", "no file nowhere.py"),
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


@pytest.mark.parametrize("code, message", [
    ("class A(:", "cannot be loaded: SyntaxError"), ("import no_such_module_", "cannot be loaded: ModuleNotFoundError"),
    ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
    ("from pathlib import Path as A", "no class 'A': choose from none"),
    ("class B: pass", "no class 'A': choose from B"),
])
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    before = set(sys.modules)
    with pytest.raises(EnvError, match=re.escape(message)) as error:
        make_env(f"{tmp_path}/bad.py:A")
    assert "\n" not in str(error.value) and (message.startswith("no class") or set(sys.modules) == before)


def test_a_constructor_that_raises_is_one_clear_line(tmp_path):
    (tmp_path / "bad.py").write_text("class A:\n    def __init__(self, size=1, *rest, **more): raise RuntimeError('no\\nroom')")
    with pytest.raises(EnvError, match="constructor of A raised RuntimeError: no room"):
        check_env(make_env(f"{tmp_path}/bad.py:A:size=3"))
    with pytest.raises(EnvError, match="NAME one of size$"):
        make_env(f"{tmp_path}/bad.py:A:more=3")


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
    "reset returns nothing": ({"reset": lambda self, seed: None}, "reset(seed) must return the task as text; it gave None"),
    "reset returns blanks": ({"reset": lambda self, seed: " \n"}, "it gave ' \\n'"),
    "reset raises": ({"reset": fail}, "reset(0) raised OSError: no disk"),
    "reset takes no seed": ({"reset": lambda self: "x"}, "reset(0) raised TypeError"),
    "reset is missing": ({"reset": None}, "reset(0) raised TypeError"),
    "reset ignores the seed": ({"reset": lambda self, seed: setattr(self, "given", None) or "x"}, "must depend on the seed"),
    "reset is random": ({"reset": lambda self, seed: str(Random().random())}, "reset(0) must return the same task every time"),
    "state is a method": ({"state": lambda self: ""}, "state must be a property of type str; it gave <bound method"),
    "state is a number": ({"state": 3}, "state must be a property of type str; it gave 3"),
    "state raises": ({"state": property(fail)}, "state raised OSError: no disk"),
    "done is no bool": ({"done": property(lambda self: None)}, "done must be a property of type bool; it gave None"),
    "done from the start": ({"done": True}, "done must be False after reset; it gave True"),
    "reward is too large": ({"get_reward": lambda self: 10}, "get_reward() must return a number from 0 to 1; it gave 10"),
    "reward is NaN": ({"get_reward": lambda self: float("nan")}, "it gave nan"),
    "reward is nothing": ({"get_reward": lambda self: None}, "it gave None"),
    "reward too large when done": ({"get_reward": lambda self: 2 if self.given else 0}, "it gave 2"),
    "reward raises": ({"get_reward": fail}, "get_reward() raised OSError: no disk"),
    "reward is missing": ({"get_reward": property(lambda self: self.nothing)}, "get_reward() raised AttributeError"),
    "behaviour is a list": ({"behaviour": [1]}, "behaviour must be a property of type dict; it gave [1]"),
    "a tool without docstring": ({"look": undocumented}, "look: type hints and a Google docstring make its schema, which raised"),
    "no tools": ({"final_answer": None}, "there must be at least one, they are the tools; it gave []"),
    "final_answer of nothing": ({"final_answer": no_arguments}, "final_answer must have one argument, answer: str; it gave {}"),
    "instances share": ({"reset": reset_of_shared, "final_answer": remember, "given": None}, "instances must not share state"),
    "reset keeps the last attempt": ({"reset": reset_that_keeps}, "reset(seed) must clear the last attempt"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_check_env_names_the_method_and_what_it_gave(way):
    """"Your environment is invalid" and a traceback from inside the trainer help nobody."""
    members, message = BROKEN[way]
    cls = type("Mine", (Fine,), members)
    check_env(Fine)
    with pytest.raises(EnvError) as error:
        check_env(cls)
    assert message in str(error.value) and "Mine." in str(error.value) and "\n" not in str(error.value)


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

    with pytest.raises(EnvError, match="instances must not share state.*north"):
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
    """A tool and its argument, an empty line, an answer; Ctrl-C or the end of the input in the middle is no traceback."""
    out = by_hand("lookup", "search lies", "", "search", "Willow City")
    assert "lies on the" in out and 'needs the argument "query"' in out
    assert out.endswith("The answer was taken.\nreward 0\n")
    for how in (EOFError, KeyboardInterrupt):
        assert by_hand("calculator", "calculator 6 * 7", then=how).endswith("42\n\nyou gave up\nreward 0\n")


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
    def get_reward(self): return float(self.done)
'''


def test_playing_what_has_no_final_answer(by_hand, tmp_path):
    """Numbers are read as numbers, and an unknown tool is answered, not taken for an answer."""
    (tmp_path / "walk.py").write_text(WALK)
    out = by_hand(f"{tmp_path}/walk.py:Walk", "run", "walk north far", "walk north 3")
    assert 'there is no tool "run"' in out and 'must be integer, not "far"' in out and out.endswith("done\nreward 1\n")


def test_an_unknown_name_is_one_line_and_exit_code_2():
    command = [sys.executable, "env.py", "nowhere"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"unknown environment 'nowhere': choose from {NAMES}, or FILE.py:Class\n"


def test_doctests():
    """What a docstring shows is run: the hash in one was never right."""
    assert doctest.testmod(env).failed == 0


def test_tools_are_the_public_methods():
    """Helpers, reset, get_reward, state, done and behaviour are none; final_answer comes with the base class."""
    assert {name: sorted(tools_of(make_env(name)())) for name in ("calculator", "lookup")} == {
        "calculator": ["calculator", "final_answer"], "lookup": ["final_answer", "search"]}
