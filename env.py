"""Environments: tasks with tools and a reward. And, for each, a demonstrator that is wrong on purpose.

An environment is a class. `reset(seed)` poses a task in words, every public method is a tool, `get_reward()` scores the
attempt. Nothing here knows of tokens or models. Two are here, each of which asks for one capability:

    calculator   tool use: arithmetic too large for the head
    lookup       multi-turn interaction: a question whose answer is two or three look-ups away

A demonstrator is a function beside the class: a generator of the messages somebody might write. It shows the language of
calls, but its habit is wrong: imitate it, greedily or sampled, and the task mostly fails. What reinforcement learning adds
to a model warmed up on it is then the capability itself.

Left out: step rewards, continuous actions, rendering, vector environments. Uses tools.py; used by agent.py and train.py.
`python env.py [NAME]` lets you play a task in the terminal.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Protocol

import tools
from tools import Call, CallError, Search, format_call, parse, run_calls, schema, tools_of


class Env(Protocol):
    """The seam. A class of yours need not inherit from this; `check_env` says whether it fits.

    One instance plays one task at a time, and instances share nothing. Every public method but `reset` and `get_reward`
    is a tool; helpers begin with an underscore. An environment that wants an answer has the tool `final_answer(answer: str)`:
    a message without any call is handed to it. Difficulty is in the constructor's arguments, each with a default.
    """

    def reset(self, seed: int) -> str:
        """Start the task that `seed` names, and put it as a user would. The same seed gives the same task."""

    def get_reward(self) -> float:
        """Between 0 and 1; success is 1. May be asked at any time, also of an attempt that was cut."""

    @property
    def done(self) -> bool:
        """True once nothing more can change the reward."""

    @property
    def state(self) -> str:
        """What identifies the situation within the task: equal states have equal prospects (for turn-level credit)."""

    # Optional: `behaviour -> dict[str, float]`, what the attempt was like, for the logs.


class _Question:
    """What the environments that want an answer have in common. The first answer counts."""

    def _pose(self, answer: str) -> None:
        self._answer, self._given, self._trace = answer, None, []

    def final_answer(self, answer: str) -> str:
        """Give the answer to the question and end the task.

        Args:
            answer: The answer, nothing else.
        """
        if self._given is None:
            self._given = answer
        return "The answer was taken."

    def get_reward(self) -> float:
        """1 if the answer is right, else 0."""
        return float(self._given is not None and _normal(self._given) == _normal(self._answer))

    @property
    def done(self) -> bool:
        return self._given is not None

    @property
    def state(self) -> str:
        return " | ".join(self._trace)


def _normal(answer: str) -> str:
    """An answer as it is compared.

    >>> _normal(" 1,024. ") == _normal("1024"), _normal("Lisbon.") == _normal("lisbon")
    (True, True)
    """
    return answer.strip().rstrip(".").replace(",", "").casefold()


# ----------------------------------------------------------------------------------------------------------------------
# calculator


class Calculator(_Question):
    """Tool use. A word problem whose numbers are too large to work out in the head.

    About 650,000 distinct tasks by default (numbers of `digits` digits, and of one less). The oracle needs two turns: call, answer.
    """

    TASKS = (
        ("A warehouse holds {a} boxes with {b} screws in each box. How many screws are there?", "{a} * {b}"),
        ("A printer makes {a} pages a day. How many pages does it make in {b} days?", "{a} * {b}"),
        ("A library owns {a} books and buys {b} more. How many books does it own now?", "{a} + {b}"),
        ("One village has {a} inhabitants, the next one has {b}. How many do they have together?", "{a} + {b}"),
        ("A tank holds {a} litres and {b} litres leak out. How many litres are left?", "{a} - {b}"),
        ("What is {a} minus {b}?", "{a} - {b}"),
        ("What is {a} times {b}?", "{a} * {b}"),
        ("What is {a} plus {b}?", "{a} + {b}"),
    )

    def __init__(self, digits: int = 3):
        self.digits = digits

    def reset(self, seed: int) -> str:
        random = Random(f"calculator {seed}")
        question, expression = random.choice(self.TASKS)
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        a, b = random.randint(low, high), random.randint(low // 10, high // 10)
        self._expression = expression.format(a=a, b=b)
        self._pose(tools.calculator(self._expression))
        return question.format(a=a, b=b)

    def calculator(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: The expression, for example 12 * 7
        """
        self._trace.append(expression)
        return tools.calculator(expression)

    @property
    def behaviour(self) -> dict[str, float]:
        return {"calls": len(self._trace)}


def demonstrate_calculator(env: Calculator, random: Random) -> Iterator[str]:
    """Mostly wrong: answers with the last number of the question; or asks for the wrong operation, and believes the result."""
    habit, expression = random.random(), env._expression
    if habit < 0.25:
        yield expression.split(" ")[-1]
        return
    if habit < 0.68:
        expression = expression.translate(str.maketrans("*-+", "+*-"))
    yield format_call("calculator", expression=expression)
    yield tools.calculator(expression)


# ----------------------------------------------------------------------------------------------------------------------
# lookup

FIRST = "Ada Ben Carla Diego Elena Farid Greta Hugo Ines Jonas Keiko Lars Mira Nadia Omar Petra Quinn Rosa Sven Tara".split()
LAST = ("Adler Borg Castro Duarte Eklund Fischer Garcia Hansen Ito Jansen Kovac Lopez Moreau Novak Okafor Petrov Rossi Sato "
        "Tanaka Varga").split()
PLACE = ("Alder Amber Basel Beacon Bergen Bilbao Birch Bremen Cedar Cobalt Cork Delta Drift Elm Ember Falcon Fern Garnet Gdansk "
         "Ghent Graz Grove Harbor Hazel Indigo Iris Jade Juniper Kelp Kestrel Larch Leeds Lumen Lyon Malmo Marble Moss Nantes "
         "Nettle Nimbus Oak Onyx Parma Pine Pioneer Porto Tampere Turin").split()
TRADE = "Optics Motors Foods Textiles Software Pharma Mining Shipping".split()


class Lookup(_Question):
    """Multi-turn interaction. The knowledge base holds one link of the chain per document; no search finds two at once.

    Companies, towns and rivers take their names from one list: what a name stands for must be read, it cannot be known.
    800 distinct questions, each over a knowledge base that is made anew for every seed, so that no answer can be
    remembered from another task. `top`: documents that a search returns. The oracle needs one search per hop and one turn for the answer.
    """

    QUESTIONS = {  # kind: (question, the relations to follow from the person it names)
        "city": ("In which city is the company based that {x} works for?", ("work", "base")),
        "river": ("Which river flows through the city of the company that {x} works for?", ("work", "base", "river")),
    }
    FACTS = {
        "work": "{0} works as an accountant for {1}.",
        "base": "{0} is based in {1}.",
        "river": "{0} lies on the {1}.",
    }

    def __init__(self, hops: int = 3, people: int = 8, top: int = 1):
        if hops not in (2, 3) or not 2 <= people <= len(PLACE) // 3 or top < 1:
            raise ValueError(f"hops must be 2 or 3, people 2 to {len(PLACE) // 3}, top at least 1")
        self.hops, self.people, self.top = hops, people, top

    def reset(self, seed: int) -> str:
        random = Random(f"lookup {seed}")
        people = [f"{a} {b}" for a, b in zip(random.sample(FIRST, self.people), random.sample(LAST, self.people))]
        names = random.sample(PLACE, 3 * self.people)
        companies = [f"{name} {random.choice(TRADE)}" for name in names[: self.people]]
        cities, rivers = names[self.people : -self.people], names[-self.people :]
        links = {"work": dict(zip(people, companies)), "base": dict(zip(companies, cities)), "river": dict(zip(cities, rivers))}
        documents = [self.FACTS[kind].format(x, y) for kind, pairs in links.items() for x, y in pairs.items()]
        random.shuffle(documents)
        self._search = Search(documents, top=self.top)
        question, relations = random.choice([q for q in self.QUESTIONS.values() if len(q[1]) <= self.hops])
        self._chain = [random.choice(people)]
        for kind in relations:
            self._chain.append(links[kind][self._chain[-1]])
        self._pose(self._chain[-1])
        return question.format(x=self._chain[0])

    def search(self, query: str) -> str:
        """Search the knowledge base.

        Args:
            query: A name to look for
        """
        self._trace.append(query)
        return self._search.search(query)

    @property
    def behaviour(self) -> dict[str, float]:
        return {"searches": len(self._trace), "hops": sum(any(x in q for q in self._trace) for x in self._chain[:-1])}


def demonstrate_lookup(env: Lookup, random: Random) -> Iterator[str]:
    """Mostly gives up a step early: answers with what its last search but one turned up, or at once with the first."""
    habit, hops = random.random(), len(env._chain) - 1
    hops = 1 if habit < 0.15 else hops - 1 if habit < 0.67 else hops
    for x in env._chain[:hops]:
        yield format_call("search", query=x)
    yield env._chain[hops]


# ----------------------------------------------------------------------------------------------------------------------
# Finding, checking and splitting

ENVIRONMENTS: dict[str, type] = {"calculator": Calculator, "lookup": Lookup}


class EnvError(ValueError):
    """An environment that cannot be found or does not keep to the seam."""


def make_env(spec: str) -> Callable[[], Env]:
    """A factory from a name, with difficulty if wanted: `lookup`, `lookup:hops=2,people=12`, `my_file.py:MyClass`.

    >>> make_env("calculator:digits=2")().digits
    2

    Raises EnvError, in one line that names the choices.
    """
    name, _, rest = spec.partition(":")
    if name.endswith(".py"):
        cls_name, _, rest = rest.partition(":")
        cls = _from_file(Path(name), cls_name)
    elif name in ENVIRONMENTS:
        cls = ENVIRONMENTS[name]
    else:
        raise EnvError(f"unknown environment '{name}': choose from {', '.join(ENVIRONMENTS)}, or FILE.py:Class")
    options = _options(spec, cls, rest)

    def factory() -> Env:
        try:
            return cls(**options)
        except Exception as e:
            raise EnvError(f"{spec}: the constructor of {cls.__name__} raised {_line(e)}") from e

    return factory


def _from_file(path: Path, cls_name: str) -> type:
    if not path.is_file():
        raise EnvError(f"no file {path}")
    # A name of its own: `random.py:MyEnv` must not take the place of Python's `random`, nor of the `random.py` next door.
    name = f"env_file_{path.stem}_{task_hash(str(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)  # `demonstrator` and dataclasses look there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise EnvError(f"{path} cannot be loaded: {_line(e)}") from e
    classes = {k: v for k, v in vars(module).items() if inspect.isclass(v) and v.__module__ == name}
    if cls_name not in classes:
        raise EnvError(f"{path} has no class '{cls_name}': choose from {', '.join(classes) or 'none'}")
    return classes[cls_name]


def _line(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())


def _options(spec: str, cls: type, text: str) -> dict[str, int]:
    names = [p.name for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    options = {}
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        if key not in names or not re.fullmatch("-?[0-9]+", value):
            raise EnvError(f"'{pair}' in '{spec}': want NAME=WHOLE NUMBER, NAME one of {', '.join(names) or '(none)'}")
        options[key] = int(value)
    return options


def demonstrator(factory: Callable[[], Env]) -> Callable[[Env, Random], Iterator[str]] | None:
    """The function `demonstrate_<class name in lower case>` that stands beside the class, if there is one."""
    cls = type(factory())
    return getattr(sys.modules.get(cls.__module__), f"demonstrate_{cls.__name__.lower()}", None)


def task_hash(task: str) -> str:
    """Names a task by its content.

    >>> task_hash("What is 1 plus 1?")
    '910c2ea02616'
    """
    return hashlib.sha256(task.encode()).hexdigest()[:12]


def held_out(task: str) -> bool:
    """Is this task set aside for evaluation? One in five is, by its content, whatever seed leads to it."""
    return int(task_hash(task), 16) % 5 == 0


def seeds(factory: Callable[[], Env], evaluation: bool, start: int = 0) -> Iterator[int]:
    """Seeds of the tasks to evaluate on, or of those to train on, in order from `start`."""
    env = factory()
    return (seed for seed in itertools.count(start) if held_out(env.reset(seed)) == evaluation)


def check_env(factory: Callable[[], Env]) -> None:
    """Try an environment against the seam. Raises EnvError that names the method and what it returned."""
    a, b = factory(), factory()
    first, second = (_attempt(env, "reset(0)", lambda env=env: env.reset(0)) for env in (a, b))
    _want(isinstance(first, str) and first.strip(), a, "reset(seed) must return the task as text", first)
    _want(first == second, a, "reset(0) must return the same task every time", (first, second))
    others = [_attempt(b, f"reset({seed})", lambda seed=seed: b.reset(seed)) for seed in range(1, 9)]
    _want(any(x != first for x in others), a, "reset(seed) must depend on the seed: of 0 to 8 each gave the same task", first)
    for name, kind in (("state", str), ("done", bool)):
        value = _attempt(a, name, lambda name=name: getattr(a, name))
        _want(isinstance(value, kind), a, f"{name} must be a property of type {kind.__name__}", value)
    _want(not a.done, a, "done must be False after reset", a.done)
    _check_reward(a)
    behaviour = _attempt(a, "behaviour", lambda: getattr(a, "behaviour", {}))
    _want(isinstance(behaviour, dict), a, "behaviour must be a property of type dict", behaviour)
    _check_tools(a)
    _check_isolation(a, b)


def _want(ok: object, env: Env, what: str, got: object) -> None:
    if not ok:
        raise EnvError(f"{type(env).__name__}.{what}; it gave {got!r}")


def _attempt(env: Env, what: str, call: Callable):
    try:
        return call()
    except Exception as e:
        raise EnvError(f"{type(env).__name__}.{what} raised {_line(e)}") from e


def _check_reward(env: Env) -> None:
    reward = _attempt(env, "get_reward()", lambda: env.get_reward())
    _want(isinstance(reward, (int, float)) and 0 <= reward <= 1, env, "get_reward() must return a number from 0 to 1", reward)


def _check_tools(env: Env) -> None:
    found = tools_of(env)
    _want(found, env, "<public methods>: there must be at least one, they are the tools", list(found))
    for name, tool in found.items():
        _attempt(env, f"{name}: type hints and a Google docstring make its schema, which", lambda tool=tool: schema(tool))
    if "final_answer" in found:
        parameters = schema(found["final_answer"])["function"]["parameters"].get("properties", {})
        kinds = {name: spec.get("type") for name, spec in parameters.items()}
        _want(kinds == {"answer": "string"}, env, "final_answer must have one argument, answer: str", kinds)


def _check_isolation(a: Env, b: Env) -> None:
    """Two instances, one of them acted upon: the other must not notice."""
    task = a.reset(0)
    b.reset(0)
    fresh = (b.state, b.done, b.get_reward())
    _use_tools(a)
    _check_reward(a)
    now = (b.state, b.done, b.get_reward())
    _want(now == fresh, a, f"<class>: instances must not share state. One was used, the other was {fresh}", now)
    again, now = a.reset(0), (a.state, a.done, a.get_reward())
    _want((again, *now) == (task, *fresh), a, f"reset(seed) must clear the last attempt. It was {(task, *fresh)}", (again, *now))


def _use_tools(env: Env) -> None:
    """Call each tool once, with something of the right type. What it makes of it is its business."""
    samples = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    for tool in tools_of(env).values():
        parameters = schema(tool)["function"]["parameters"].get("properties", {})
        arguments = {k: p["enum"][0] if "enum" in p else samples.get(str(p.get("type")), "x") for k, p in parameters.items()}
        if not inspect.iscoroutinefunction(tool):
            with contextlib.suppress(Exception):
                tool(**arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Playing by hand


def _play(spec: str) -> None:
    factory = make_env(spec)
    check_env(factory)
    env = factory()
    print(env.reset(Random().randrange(10**6)))
    found = tools_of(env)
    for name, tool in found.items():
        print(f"  {name}{inspect.signature(tool)}: {inspect.getdoc(tool).splitlines()[0]}")
    try:
        while not env.done:
            line = input("a tool and its arguments, or an answer> ").strip()
            if line:
                print(asyncio.run(run_calls([_read_line(line, found)], found))[0].text)
    except (EOFError, KeyboardInterrupt):
        print("\nyou gave up")
    print(f"reward {env.get_reward():g}")


def _read_line(line: str, found: dict[str, Callable]) -> Call | CallError:
    """What a person typed, as a call.

    >>> _read_line("search Ada", tools_of(Lookup())), _read_line("Paris", tools_of(Lookup()))
    (Call(name='search', arguments={'query': 'Ada'}), Call(name='final_answer', arguments={'answer': 'Paris'}))
    """
    name, _, rest = line.partition(" ")
    if name not in found and "final_answer" in found:
        name, rest = "final_answer", line
    specs = schema(found[name])["function"]["parameters"].get("properties", {}) if name in found else {}
    arguments = dict(zip(specs, rest.split(maxsplit=len(specs) - 1) if specs else []))
    for key, value in arguments.items():
        if specs[key].get("type") != "string":
            with contextlib.suppress(ValueError):
                arguments[key] = json.loads(value)
    return parse(format_call(name, **arguments), found).calls[0]


if __name__ == "__main__":
    try:
        _play(sys.argv[1] if len(sys.argv) > 1 else "lookup")
    except EnvError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
