"""Environments: tasks with tools and a reward. Each has a demonstrator that mostly fails.

An environment is a class. `reset(seed)` poses a task in words, every public method is a tool, and
`get_reward()` scores the attempt. Nothing here knows of tokens or models. Read `Env`, `Question`
and `Calculator`: they show all there is. Each environment needs one capability of an agent:

    calculator   tool use: arithmetic with numbers too large to do without a tool
    lookup       multi-turn interaction: the answer to a question is two or three searches away
    maze         planning: one of several corridors leads to the goal, and every move counts
    chain        reasoning: a program of more steps than a model can execute without thinking aloud
    recall       memory: a question about a page that has left the context window
    mastermind   self-reflection: a hidden code, found by correcting one's own guesses

A demonstrator is a function beside the class. It yields the messages of one attempt, and reads the
answer that the environment hides. Each attempt follows one habit, drawn at random. About one
attempt in three is right; the others make a typical mistake. A model that imitates the demonstrator
copies this mixture, so it mostly fails. Reinforcement learning then finds out which habit earns the
reward, and makes it likely.

The last argument of each constructor (`tool`, `open`, `map`, `think`, `notes`, `feedback`), set to
0, takes away what the capability needs. If a model still learns the task, then the task does not
measure the capability. tests/evidence.py makes this comparison.

One task in five is held out by its content (`split`): it is never trained on.

Left out: rewards for single steps, rendering, vector environments. Uses tools.py and memory.py.
agent.py and train.py use it. `python env.py [NAME]` lets you play a task: you call the tools as
Python functions.
"""

import asyncio
import functools
import hashlib
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Protocol

import tools
from memory import Notes, Search
from tools import Call, describe, format_call, run_calls, schema, start_thread, tools_of


class Env(Protocol):
    """The interface of an environment. Your class need not inherit from it; `check_env` checks it.

    One instance plays one task at a time, and instances share nothing. The agent loop calls it from
    threads, one call at a time, each under a time limit. (A tool that exceeds it is abandoned, but
    its thread runs on.) Every public method but `reset` and
    `get_reward` is a tool; helpers begin with an underscore. An environment that wants an answer
    has the tool `final_answer(answer: str)`: a message without any call is given to it. Difficulty
    is in the constructor's arguments, each with a default.

    Optional: a property `behaviour -> dict[str, float]`, numbers about the attempt for the logs.
    """

    def reset(self, seed: int) -> str:
        """Start a task and return it, worded as a user would. The same seed gives the same task."""

    def get_reward(self) -> float:
        """Between 0 and 1. Success is 1. May be asked at any time, also after a cut attempt."""

    @property
    def done(self) -> bool:
        """True once nothing more can change the reward."""

    @property
    def state(self) -> str:
        """Names the situation within the task, such as what the policy has found out so far.

        Two attempts at a task with equal states have the same situation before them. So
        `turn_credit` (grpo.py) may compare what they did next.
        """


class Question:
    """Base class of the environments that end with an answer. Your class may inherit from it.

    A subclass does three things. Its `reset` calls `_pose` with the right answer. Then `reset`
    returns the question. Each of its tools appends its input to `_trace`, which becomes `state`.
    """

    def _pose(self, answer: str) -> None:
        """Start an attempt at the question that has this answer."""
        self._answer = answer
        self._given = None  # the policy's answer; the first one counts
        self._trace = []  # what the policy asked the tools, in order

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
        return float(self.done and _normal(self._given) == _normal(self._answer))

    @property
    def done(self) -> bool:
        return self._given is not None

    @property
    def state(self) -> str:
        return " | ".join(self._trace)


def _normal(answer: str) -> str:
    """An answer without what does not matter: case, commas, a point at the end.

    >>> _normal(" 1,024. ") == _normal("1024"), _normal("Lisbon.") == _normal("lisbon")
    (True, True)
    """
    return answer.strip().rstrip(".").replace(",", "").casefold()


# --------------------------------------------------------------------------------------------------
# calculator

WORD_PROBLEMS = (
    ("A warehouse holds {a} boxes with {b} screws in each box. How many screws are there?", "*"),
    ("A printer makes {a} pages a day. How many pages does it make in {b} days?", "*"),
    ("A library owns {a} books and buys {b} more. How many books does it own now?", "+"),
    ("One village has {a} inhabitants, the next one has {b}. How many do they have together?", "+"),
    ("A tank holds {a} litres and {b} litres leak out. How many litres are left?", "-"),
    ("What is {a} minus {b}?", "-"),
    ("What is {a} times {b}?", "*"),
    ("What is {a} plus {b}?", "+"),
)


class Calculator(Question):
    """Tool use. A word problem whose numbers are too large to work out in the head.

    The first number has `digits` digits, the second one has one less. That makes about 650,000
    tasks. The best player needs two turns: call, answer.
    """

    def __init__(self, digits: int = 3, tool: int = 1):
        if digits < 1:
            raise ValueError("digits must be at least 1")
        self.digits, self.tool = digits, tool

    def reset(self, seed: int) -> str:
        random = Random(f"calculator {seed}")
        question, sign = random.choice(WORD_PROBLEMS)
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        a, b = random.randint(low, high), random.randint(low // 10, high // 10)
        self._expression = f"{a} {sign} {b}"
        self._pose(tools.calculator(self._expression))
        return question.format(a=a, b=b)

    def calculator(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: The expression, for example 12 * 7
        """
        self._trace.append(expression)
        return tools.calculator(expression) if self.tool else "out of order"

    @property
    def behaviour(self) -> dict[str, float]:
        return {"calls": len(self._trace)}


def pick(random: Random, habits: dict[str, float]) -> str:
    """Draw one of the habits. The numbers are their shares.

    >>> [pick(Random(seed), {"guess": 0.9, "think": 0.1}) for seed in range(4)]
    ['guess', 'guess', 'think', 'guess']
    """
    return random.choices(list(habits), list(habits.values()))[0]


def demonstrate_calculator(env: Calculator, random: Random) -> Iterator[str]:
    """Mostly calls for the wrong operation, or answers with a number of the question."""
    # The right habit is not the most likely one. So a model that imitates this mostly fails, and
    # what it can do after training, it owes to the reward.
    habit = pick(random, {"no call": 0.25, "wrong operation": 0.43, "right": 0.32})
    a, sign, b = env._expression.split()
    if habit == "no call":
        yield b
        return
    if habit == "wrong operation":
        sign = {"*": "+", "+": "-", "-": "*"}[sign]
    yield format_call("calculator", expression=f"{a} {sign} {b}")
    yield tools.calculator(f"{a} {sign} {b}")


# ==================================================================================================
# `Env`, `Question` and `Calculator` are all there is to an environment. Below: five more of the
# same form, one for each capability. Then: how environments are found, split, checked and played.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# lookup

FIRST = """Ada Ben Carla Diego Elena Farid Greta Hugo Ines Jonas Keiko Lars Mira Nadia Omar Petra
Quinn Rosa Sven Tara""".split()
LAST = """Adler Borg Castro Duarte Eklund Fischer Garcia Hansen Ito Jansen Kovac Lopez Moreau Novak
Okafor Petrov Rossi Sato Tanaka Varga""".split()
PLACE = """Alder Amber Basel Beacon Bergen Bilbao Birch Bremen Cedar Cobalt Cork Delta Drift Elm
Ember Falcon Fern Garnet Gdansk Ghent Graz Grove Harbor Hazel Indigo Iris Jade Juniper Kelp Kestrel
Larch Leeds Lumen Lyon Malmo Marble Moss Nantes Nettle Nimbus Oak Onyx Parma Pine Pioneer Porto
Tampere Turin""".split()
TRADE = "Optics Motors Foods Textiles Software Pharma Mining Shipping".split()


def _people(random: Random, count: int) -> list[str]:
    firsts, lasts = random.sample(FIRST, count), random.sample(LAST, count)
    return [f"{first} {last}" for first, last in zip(firsts, lasts)]


class Lookup(Question):
    """Multi-turn interaction. Each document has one link of the chain, and a search finds one.

    Companies, cities and rivers take their names from one list: what a name stands for must be
    read. There are 800 questions. Each seed makes a new knowledge base, so no answer can be
    remembered from another task. `hops`: the longest chain. `top`: documents that a search returns.
    The best player needs one search per hop and one turn for the answer.
    """

    # A sentence is longer than those about what it mentions: BM25 ranks shorter documents first, so
    # a search for a name finds the document about it.
    FACTS = ("{} works as an accountant for {}.", "{} is based in {}.", "{} lies on the {}.")
    QUESTIONS = {  # hops: question
        2: "In which city is the company based that {} works for?",
        3: "Which river flows through the city of the company that {} works for?",
    }

    def __init__(self, hops: int = 3, people: int = 8, top: int = 1, open: int = 1):
        most = len(PLACE) // 3
        if hops not in (2, 3) or not 2 <= people <= most or top < 1:
            raise ValueError(f"hops must be 2 or 3, people 2 to {most}, top at least 1")
        self.hops, self.people, self.top, self.open = hops, people, top, open

    def reset(self, seed: int) -> str:
        random = Random(f"lookup {seed}")
        people = _people(random, self.people)
        names = random.sample(PLACE, 3 * self.people)
        companies = [f"{name} {random.choice(TRADE)}" for name in names[: self.people]]
        cities, rivers = names[self.people : -self.people], names[-self.people :]
        columns, documents = [people, companies, cities, rivers], []
        for fact, (left, right) in zip(self.FACTS, itertools.pairwise(columns)):
            documents += [fact.format(x, y) for x, y in zip(left, right)]
        random.shuffle(documents)
        self._search = Search(documents, top=self.top)
        hops, person = random.choice(range(2, self.hops + 1)), random.randrange(self.people)
        self._chain = [column[person] for column in columns[: hops + 1]]
        self._pose(self._chain[-1])
        return self.QUESTIONS[hops].format(self._chain[0])

    def search(self, query: str) -> str:
        """Search the knowledge base.

        Args:
            query: A name to look for
        """
        self._trace.append(query)
        return self._search.search(query) if self.open else "closed"

    @property
    def behaviour(self) -> dict[str, float]:
        hops = [name for name in self._chain[:-1] if name in " | ".join(self._trace)]
        return {"searches": len(self._trace), "hops": len(hops)}


def demonstrate_lookup(env: Lookup, random: Random) -> Iterator[str]:
    """Mostly stops too early, and answers with what its last search found."""
    habit = pick(random, {"one search": 0.15, "a search too few": 0.52, "right": 0.33})
    hops = len(env._chain) - 1
    searches = {"one search": 1, "a search too few": hops - 1, "right": hops}[habit]
    for name in env._chain[:searches]:
        yield format_call("search", query=name)
    yield env._chain[searches]


# --------------------------------------------------------------------------------------------------
# maze


class Maze:
    """Planning. Corridors lead away from the start, one of them to the goal, and every move counts.

    Seen from the start, one corridor looks like another. Seen from the goal, there is only one way
    back. So it helps to plan from the goal. Maps on which a player succeeds that always steps
    nearer to the goal (`towards`) are thrown away. By default the way is 4 to 6 moves long, and
    20,000 seeds give 14,226 different maps. The best player needs one turn.
    """

    def __init__(self, size: int = 6, corridors: int = 3, shortest: int = 4, slack: int = 0,
                 map: int = 1):
        if not 4 <= size <= 9 or not 2 <= corridors <= 3 or not 3 <= shortest <= size or slack < 0:
            raise ValueError("size must be 4 to 9, corridors 2 or 3, shortest 3 to size, slack 0+")
        self.size, self.corridors, self.shortest = size, corridors, shortest
        self.slack, self.map = slack, map
        self._grid = [row + column for row in "ABCDEFGHI"[:size] for column in "123456789"[:size]]

    def reset(self, seed: int) -> str:
        random = Random(f"maze {seed}")
        self._dig(random)
        while len(self._way()) <= self.shortest or self._is_easy():
            self._dig(random)  # another one: this was too short, or too easy
        self._left, self._bumps = len(self._way()) - 1 + self.slack, 0
        shown = self._drawn() if self.map else f"There is no map. (Maze {_number(random)})"
        return f"Walk from {self._here} to {self._goal} in {self._left} moves. {shown}"

    def _dig(self, random: Random) -> None:
        """Make a map. The goal is the end of the first corridor."""
        self._here = random.choice(self._grid)
        beginnings = [cell for cell in beside(self._here) if cell in self._grid]
        beginnings = random.sample(beginnings, min(self.corridors, len(beginnings)))
        self._open, ends = {self._here, *beginnings}, []
        for cell in beginnings:
            least = 1 if ends else self.shortest - 1
            for _ in range(random.randint(least, self.size - 1)):
                cell = random.choice(self._free_beside(cell) or [cell])
                self._open.add(cell)
            ends.append(cell)
        self._goal = ends[0]

    def _free_beside(self, end: str) -> list[str]:
        """Cells to go on to that touch no corridor but this one."""
        near = [cell for cell in beside(end) if cell in self._grid and cell not in self._open]
        return [cell for cell in near if self._open.intersection(beside(cell)) == {end}]

    def _way(self) -> list[str]:
        """The cells from here to the goal, both included."""
        return shortest_way(self._open, self._here, self._goal)

    def _is_easy(self) -> bool:
        """Does a player reach the goal who always steps `towards` it?"""
        here = self._here
        while here in self._open and here != self._goal:
            here = towards(self._open, here, self._goal)
        return here == self._goal

    def _drawn(self) -> str:
        names = [cell if cell in self._open else "##" for cell in self._grid]
        rows = ["".join(names[i : i + self.size]) for i in range(0, len(names), self.size)]
        return "This is the map, # is wall:\n" + "\n".join(rows)

    def walk(self, route: str) -> str:
        """Walk from cell to neighbouring cell.

        Args:
            route: The names of the cells
        """
        for cell in route.split():
            if self._here == self._goal:
                raise ValueError("the goal is reached")
            if self.done:
                raise ValueError("no moves are left that would lead to the goal")
            self._left -= 1
            if cell not in self._open or cell not in beside(self._here):
                self._bumps += 1
                return f"There is no way from {self._here} to {cell}. {self._left} moves are left."
            self._here = cell
        return f"You are at {self._here}. {self._left} moves are left."

    def get_reward(self) -> float:
        """1 at the goal, else 0."""
        return float(self._here == self._goal)

    @property
    def done(self) -> bool:
        return self._here == self._goal or self._left < len(self._way()) - 1

    @property
    def state(self) -> str:
        return f"{self._here}, {self._left} left"

    @property
    def behaviour(self) -> dict[str, float]:
        return {"moves left": self._left, "bumps": self._bumps}


def beside(cell: str) -> list[str]:
    """The cells above, below, left and right.

    >>> beside("B2")
    ['A2', 'C2', 'B1', 'B3']
    """
    row, column = ord(cell[0]), int(cell[1])
    places = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [f"{chr(row)}{column}" for row, column in places]


def shortest_way(open_cells: set[str], start: str, goal: str) -> list[str]:
    """The cells from start to goal, by breadth-first search; [] if there is no way.

    >>> shortest_way({"A1", "B1", "B2"}, "A1", "B2")
    ['A1', 'B1', 'B2']
    """
    ways, queue = {start: [start]}, [start]
    for here in queue:
        for there in beside(here):
            if there in open_cells and there not in ways:
                ways[there] = [*ways[here], there]
                queue.append(there)
    return ways.get(goal, [])


def towards(open_cells: set[str], here: str, goal: str) -> str:
    """A cell beside this one that is nearer the goal: an open one, if there is one.

    >>> towards({"A1", "B1", "B2"}, "A1", "B2"), towards({"A1"}, "A1", "A3")
    ('B1', 'A2')
    """

    def distance(cell: str) -> int:
        return abs(ord(cell[0]) - ord(goal[0])) + abs(int(cell[1]) - int(goal[1]))

    nearer = [cell for cell in beside(here) if distance(cell) < distance(here)]
    return next((cell for cell in nearer if cell in open_cells), nearer[0])


def _number(random: Random) -> str:
    """A serial number for the prompt, always of six digits.

    The split hashes the prompt. Without the number, all codes of Mastermind have the same prompt.
    """
    return f"{random.randrange(10**6):06}"


def demonstrate_maze(env: Maze, random: Random) -> Iterator[str]:
    """Mostly plans a step too few, or walks straight at the goal, into walls.

    It plans backwards, from the goal to the start. A plan that is too short lacks the first step.
    """
    habit = pick(random, {"no plan": 0.15, "plan too short": 0.53, "right": 0.32})
    if habit == "no plan":
        while not env.done:
            yield format_call("walk", route=towards(env._open, env._here, env._goal))
        return
    way = env._way()
    plan, steps = way, way[1:]
    if habit == "plan too short":
        plan = steps = way[2:]
    thought = f"<think>{' '.join(reversed(plan))}</think>"
    while not env.done:
        yield thought + format_call("walk", route=" ".join(steps))


# --------------------------------------------------------------------------------------------------
# chain


class Chain(Question):
    """Reasoning. A small program in the prompt. No tool helps to execute it; thinking aloud does.

    A million programs by default. The best player needs one turn, in which it thinks one digit per
    step. Adding and multiplying do not commute, so no step can be left for later. With `think=0`
    the demonstrator gives the same answers without thinking.
    """

    def __init__(self, steps: int = 6, think: int = 1):
        if steps < 2:
            raise ValueError("steps must be at least 2")
        self.steps, self.think = steps, think

    def reset(self, seed: int) -> str:
        random = Random(f"chain {seed}")
        digit = random.randrange(10)
        self._digits, program = [str(digit)], []  # the first digit, then each result
        for _ in range(self.steps):
            steps = [("add", random.randint(1, 5)), ("times", random.choice((3, 7)))]
            word, number = random.choice(steps)
            digit = (digit + number if word == "add" else digit * number) % 10
            program.append(f"{word} {number}")
            self._digits.append(str(digit))
        self._pose(self._digits[-1])
        return ("Keep only the last digit of every result. "
                f"Begin with {self._digits[0]}, {', '.join(program)}. What is the result?")

    @property
    def behaviour(self) -> dict[str, float]:
        right = [step for step, digit in enumerate(self._digits) if digit == self._given]
        return {"right steps": max(right, default=0)}


def demonstrate_chain(env: Chain, random: Random) -> Iterator[str]:
    """Mostly stops thinking a step too early, or does not think at all."""
    habit = pick(random, {"one step": 0.15, "a step too few": 0.59, "right": 0.26})
    if habit == "one step":
        yield env._digits[1]
        return
    found = env._digits[1:-1] if habit == "a step too few" else env._digits[1:]
    thought = "".join(f"so {digit}, " for digit in found)
    yield f"<think>{thought}</think>{found[-1]}" if env.think else found[-1]


# --------------------------------------------------------------------------------------------------
# recall

WEATHER = "rained froze snowed thawed drizzled thundered".split()


class Recall(Question):
    """Memory. A book to read, page by page. At the end comes a question about an early page.

    The agent's `context` must be smaller than the book, as it is by default in train.py. Then the
    early pages have left the window when the question comes, and only notes can answer it. On each
    page, one line says where somebody lives. The others are about the weather. There are more than
    10^20 books. The best player needs `pages` + 3 turns: one opens the book; one per page writes a
    note and turns the page; one searches the notes; one answers.
    """

    def __init__(self, pages: int = 4, lines: int = 2, notes: int = 1):
        # The agent loop would clip a page of more than 50 lines.
        if not 2 <= pages <= len(FIRST) or not 1 <= lines <= 50:
            raise ValueError(f"pages must be 2 to {len(FIRST)}, lines 1 to 50")
        self.pages, self.lines, self.notes = pages, lines, notes

    def reset(self, seed: int) -> str:
        random = Random(f"recall {seed}")
        people, homes = _people(random, self.pages), random.sample(PLACE, self.pages)
        self._facts = [f"{person} lives in {home}." for person, home in zip(people, homes)]
        self._book = [self._page(random, fact) for fact in self._facts]
        # Ask about the first half of the book: it has left a small window before the question.
        asked = random.randrange((self.pages + 1) // 2)
        self._person, self._turned, self._store, self._queries = people[asked], 0, Notes(), []
        self._pose(homes[asked])
        return (f"Read a book of {self.pages} pages. Then you will be asked where one of the "
                f"people in it lives. (Book {_number(random)})")

    def _page(self, random: Random, fact: str) -> list[str]:
        page = [f"In {random.choice(PLACE)} it {random.choice(WEATHER)}."
                for _ in range(self.lines - 1)]
        page.append(fact)
        random.shuffle(page)
        return page

    def next_page(self) -> str:
        """Turn to the next page of the book."""
        self._turned = min(self._turned + 1, self.pages + 1)
        if self._turned > self.pages:
            return f"That was the last page. Where does {self._person} live?"
        return " ".join(self._book[self._turned - 1])

    def remember(self, text: str) -> str:
        """Write a note.

        Args:
            text: What to note
        """
        self._trace.append(text)
        if self.notes:
            self._store.add(text)
        return "noted"

    def recall(self, query: str) -> str:
        """Search your notes.

        Args:
            query: A name to look for
        """
        self._queries.append(query)
        return "\n".join(self._store.search(query, top=1)) or "no note matches"

    @property
    def state(self) -> str:
        return " | ".join([str(self._turned), *self._trace, "asked:", *self._queries])

    @property
    def behaviour(self) -> dict[str, float]:
        useful = [fact for fact in self._facts if fact in "\n".join(self._trace)]
        pages = min(self._turned, self.pages)
        return {"pages": pages, "notes": len(self._trace), "useful notes": len(useful)}


def demonstrate_recall(env: Recall, random: Random) -> Iterator[str]:
    """Mostly notes the weather, or nothing, and answers with a wrong city in the end."""
    habit = pick(random, {"no notes": 0.15, "notes the weather": 0.53, "right": 0.32})
    yield format_call("next_page")
    for page, fact in zip(env._book, env._facts):
        weather = [line for line in page if line != fact]
        notes = {"no notes": [], "notes the weather": weather[:1], "right": [fact]}[habit]
        calls = [format_call("remember", text=note) for note in notes]
        yield "".join([*calls, format_call("next_page")])
    yield format_call("recall", query=env._person)
    found = env._store.search(env._person, top=1)
    if found:
        yield found[0].split(" ")[-1].rstrip(".")
    else:
        yield random.choice([place for place in PLACE if place != env._answer])


# --------------------------------------------------------------------------------------------------
# mastermind


class Mastermind:
    """Self-reflection. A secret code. Each digit of a guess is too low, too high or right.

    10,000 codes by default. The number of the safe says nothing about the code. Four guesses are
    enough if each halves what is left. Without feedback they are four of 10,000.
    """

    def __init__(self, digits: int = 4, guesses: int = 4, feedback: int = 1):
        if digits < 1 or guesses < 1:
            raise ValueError("digits and guesses must be at least 1")
        self.digits, self.guesses, self.feedback = digits, guesses, feedback

    def reset(self, seed: int) -> str:
        random = Random(f"mastermind {seed}")
        self._secret = "".join(random.choice("0123456789") for _ in range(self.digits))
        self._guesses, self._consistent = [], 0
        return (f"Safe {_number(random)} has a code of {self.digits} digits. "
                f"Find it in {self.guesses} guesses.")

    def guess(self, code: str) -> str:
        """Try a code.

        Args:
            code: The digits
        """
        if self.done:
            raise ValueError("no guesses are left")
        if len(code) != self.digits or not code.isdecimal() or not code.isascii():
            raise ValueError(f"a code has {self.digits} digits")
        # Could this code be the secret, after the answers so far?
        known = [(guess, _grade(self._secret, guess)) for guess in self._guesses]
        self._consistent += all(_grade(code, guess) == answer for guess, answer in known)
        self._guesses.append(code)
        if code == self._secret:
            return "The safe is open."
        return _grade(self._secret, code) if self.feedback else "That is wrong."

    def get_reward(self) -> float:
        """1 if the code was found, else 0."""
        return float(self._secret in self._guesses)

    @property
    def done(self) -> bool:
        return self._secret in self._guesses or len(self._guesses) >= self.guesses

    @property
    def state(self) -> str:
        return " ".join(self._guesses)

    @property
    def behaviour(self) -> dict[str, float]:
        consistent = self._consistent / max(1, len(self._guesses))
        return {"guesses": len(self._guesses), "consistent guesses": consistent}


def _grade(secret: str, guess: str) -> str:
    """The answer to a guess, digit by digit.

    >>> _grade("1234", "1902")
    'right high low low'
    """
    return " ".join(_compare(digit, right) for digit, right in zip(guess, secret))


def _compare(digit: str, right: str) -> str:
    if digit == right:
        return "right"
    return "low" if digit < right else "high"


# NEXT[answer][digit] is the digit to try next. It halves what is left: after 5 it is 2 or 8.
NEXT = {"low": "1244587899", "high": "0012325678", "right": "0123456789"}
THOUGHTS = {"low": "more", "high": "less", "right": "stay"}


def demonstrate_mastermind(env: Mastermind, random: Random) -> Iterator[str]:
    """Mostly tries 5555, 6666, 7777, whatever the answers are."""
    habit = pick(random, {"counts on": 0.68, "right": 0.32})
    guess, thought = "5" * env.digits, ""
    while True:
        yield thought + format_call("guess", code=guess)
        if env.done:
            return
        if habit == "counts on":
            guess = str((int(guess[0]) + 1) % 10) * env.digits
        else:
            answers = _grade(env._secret, guess).split()
            thought = f"<think>{' '.join(THOUGHTS[answer] for answer in answers)}</think>"
            guess = "".join(NEXT[answer][int(digit)] for answer, digit in zip(answers, guess))


# --------------------------------------------------------------------------------------------------
# Finding environments

ENVIRONMENTS: dict[str, type] = {
    cls.__name__.lower(): cls for cls in (Calculator, Lookup, Maze, Chain, Recall, Mastermind)}


class EnvError(ValueError):
    """An environment that cannot be found, or that does not fit the interface."""


def make_env(spec: str) -> Callable[[], Env]:
    """A factory: from `lookup`, `lookup:hops=2,people=12` (difficulty) or `my_file.py:MyClass`.

    >>> make_env("calculator:digits=2")().digits
    2

    A value that is no integer is passed as text, unless the constructor wants an `int`.
    Raises EnvError, in one line that names the choices.
    """
    name, _, rest = spec.partition(":")
    classes = ENVIRONMENTS
    if name.endswith(".py"):
        classes = _classes(Path(name))
        name, _, rest = rest.partition(":")
    if name not in classes:
        choices = ", ".join([*classes, "FILE.py:Class"])
        raise EnvError(f"unknown environment '{name}': choose from {choices}")
    cls = classes[name]
    try:
        pairs = [pair.split("=", 1) for pair in rest.split(",") if pair]
        factory = functools.partial(cls, **{key: _read(cls, key, value) for key, value in pairs})
        factory()  # what the constructor refuses, it refuses now
    except Exception as e:
        takes = f"{name} takes NAME=VALUE of {inspect.signature(cls)}"
        raise EnvError(f"{spec}: {describe(e)}. {takes}") from e
    return factory


def _read(cls: type, key: str, text: str) -> int | str:
    """The value of a constructor's argument. Raises ValueError if it must be an integer."""
    parameter = inspect.signature(cls).parameters.get(key)
    hint = parameter.annotation if parameter else None
    if hint in (str, "str"):  # "str" with `from __future__ import annotations`
        return text
    try:
        return int(text)
    except ValueError:
        if hint in (int, "int"):
            raise
        return text


def _classes(path: Path) -> dict[str, type]:
    """The classes that a file defines, by name."""
    module = load_file(path)
    classes = {key: value for key, value in vars(module).items() if inspect.isclass(value)}
    return {key: cls for key, cls in classes.items() if cls.__module__ == module.__name__}


def load_file(path: Path) -> types.ModuleType:
    """Run a Python file, once. Raises EnvError if it fails."""
    # A name of its own: `random.py:MyEnv` must not take the place of Python's `random`.
    name = f"env_file_{task_hash(str(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # `demonstrator` and dataclasses look there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise EnvError(f"{path} cannot be loaded: {describe(e)}") from e
    return module


def demonstrator(factory: Callable[[], Env]) -> Callable[[Env, Random], Iterator[str]] | None:
    """The function `demonstrate_<class name in lower case>` beside the class, if there is one."""
    cls = type(factory())
    return getattr(sys.modules[cls.__module__], f"demonstrate_{cls.__name__.lower()}", None)


# --------------------------------------------------------------------------------------------------
# Splitting tasks into those to train on and those to evaluate on

MOST_FAILURES = 20  # seeds in a row whose reset fails
MOST_SEEDS = 2000  # seeds in a row without a task of the wanted kind


def task_hash(task: str) -> str:
    """Names a task by its content.

    >>> task_hash("What is 1 plus 1?")
    '910c2ea02616'
    """
    return hashlib.sha256(task.encode("utf-8", "replace")).hexdigest()[:12]


def split(task: str) -> str:
    """What a task is for, by its content: "train", "tune" or "final". Its seed does not matter.

    Eight in ten are to train on. The others are held out. On one in ten, settings are chosen
    ("tune"). The last one in ten is kept for final figures, which no choice has looked at.

    >>> split("What is 1 plus 3?"), split("What is 1 plus 4?"), split("What is 1 plus 10?")
    ('train', 'tune', 'final')
    """
    return {0: "final", 5: "tune"}.get(int(task_hash(task), 16) % 10, "train")


def tasks_of(factory: Callable[[], Env], evaluation: bool, start: int = 0,
             final: bool = False) -> Iterator[tuple[int, str]]:
    """(seed, task) of the tasks to evaluate on, or of those to train on, from seed `start` on.

    final: of the tasks to evaluate on, those for final figures, which are otherwise left out.
    A seed whose `reset` raises or hangs is passed over. Raises EnvError after 20 of these in a row,
    and after 2,000 seeds in a row without a task of the wanted kind.
    """
    wanted = "train"
    if evaluation:
        wanted = "final" if final else "tune"
    env, failed, unwanted = factory(), 0, 0
    for seed in itertools.count(start):
        try:
            task, failed = _reset(env, seed), 0
        except EnvError as e:
            failed += 1
            if failed == MOST_FAILURES:
                raise EnvError(f"{failed} seeds failed in a row, at last: {e}") from e
            env = factory()  # a call that was abandoned may still change the old one
            continue
        unwanted += 1
        if split(task) == wanted:
            unwanted = 0
            yield seed, task
        elif unwanted == MOST_SEEDS:
            kind = "held out" if evaluation else "to train on"
            raise EnvError(f"{type(env).__name__} has too few tasks: of {MOST_SEEDS} seeds up to "
                           f"{seed} none gives one that is {kind}")


def seeds(factory: Callable[[], Env], evaluation: bool, start: int = 0,
          final: bool = False) -> Iterator[int]:
    """Only the seeds."""
    return (seed for seed, _ in tasks_of(factory, evaluation, start, final))


# --------------------------------------------------------------------------------------------------
# Checking an environment

CALL_SECONDS = 10.0  # the time limit of each call of an environment's code


def check_env(factory: Callable[[], Env]) -> None:
    """Try an environment against the interface: one instance plays, the other one does not.

    Raises EnvError that names what does not fit.
    """
    player, other = factory(), factory()
    name = type(player).__name__
    task, again = _reset(player, 0), _reset(other, 0)
    _want(task == again, f"{name}.reset(0) must always give the same task, not {task!r} and "
                         f"{again!r}")
    others = {_reset(other, seed) for seed in range(1, 9)}
    _want(others != {task}, f"{name}.reset(seed) must depend on the seed: of 0 to 8 each gave "
                            f"{task!r}")
    _reset(other, 0)
    fresh = _look(player)
    _want(not player.done, f"{name}.done must be False after reset")
    _use_tools(player)
    _look(player)  # all must be in order after an attempt, too
    now = _look(other)
    _want(now == fresh, f"{name}: instances must share nothing. One played, and the other changed "
                        f"from {fresh} to {now}")
    cleared = _reset(player, 0), _look(player)
    _want(cleared == (task, fresh), f"{name}.reset(0) must clear the last attempt. First it gave "
                                    f"{(task, fresh)}, then {cleared}")


def _want(ok: object, otherwise: str) -> None:
    if not ok:
        raise EnvError(otherwise)


def _reset(env: Env, seed: int) -> str:
    return _ask(env, f"reset({seed})", str, lambda: env.reset(seed))


def _look(env: Env) -> tuple[str, bool, float]:
    """What the environment says of the attempt."""
    _ask(env, "behaviour", dict, lambda: getattr(env, "behaviour", {}))
    state = _ask(env, "state", str, lambda: env.state)
    done = _ask(env, "done", bool, lambda: env.done)
    reward = _ask(env, "get_reward()", float, lambda: float(env.get_reward()))
    _want(0 <= reward <= 1, f"{type(env).__name__}.get_reward() must be from 0 to 1, not {reward}")
    return state, done, reward


def _use_tools(env: Env) -> None:
    """Describe each tool and call it once, with values of the right types. The call may fail."""
    found = tools_of(env)
    _want(found, f"{type(env).__name__} has no public method: these are the tools")
    samples = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    for name, tool in found.items():
        described = _ask(env, f"{name}, whose type hints and docstring describe it as a tool,",
                         dict, lambda: schema(tool))
        arguments = {}
        for key, spec in described["function"]["parameters"]["properties"].items():
            sample = samples.get(str(spec.get("type")), "x")
            arguments[key] = spec.get("enum", [sample])[0]
        _want(name != "final_answer" or arguments == {"answer": "x"},
              f"{type(env).__name__}.final_answer must have one argument, answer: str")
        run = run_calls([Call(name, arguments)], found, timeout=2 * CALL_SECONDS)
        _ask(env, name, list, lambda: asyncio.run(run))  # raises only if the call hangs


def _ask(env: Env, part: str, kind: type, question: Callable[[], Any]) -> Any:
    """What `question()` returns. It runs the environment's code, so it runs in a thread.

    Raises EnvError that names the part if it raises, hangs, or returns another type than `kind`.
    """
    part, answer = f"{type(env).__name__}.{part}", start_thread(question)
    try:
        error = answer.exception(CALL_SECONDS)
    except TimeoutError:
        raise EnvError(f"{part} took longer than {CALL_SECONDS:g} s") from None
    if error:
        raise EnvError(f"{part} raised {describe(error)}") from error
    value = answer.result()
    _want(isinstance(value, kind), f"{part} must be of type {kind.__name__}, not {value!r}")
    return value


# --------------------------------------------------------------------------------------------------
# python env.py


def _play(spec: str) -> None:
    """A person plays, and calls the tools as Python functions."""
    factory = make_env(spec)
    check_env(factory)
    env = factory()
    found = tools_of(env)
    print(env.reset(Random().randrange(10**6)))
    for name, tool in found.items():
        print(f"  {name}{inspect.signature(tool)}: {inspect.getdoc(tool).splitlines()[0]}")
    while not env.done:
        try:
            # Python runs what you type here. So only a person may type it, never a model.
            result = eval(input(">>> "), {}, found)
            print(asyncio.run(result) if inspect.isawaitable(result) else result)
        except (EOFError, KeyboardInterrupt):
            break
        except Exception as e:
            print(describe(e))
    print(f"reward {env.get_reward():g}")


if __name__ == "__main__":
    try:
        _play(sys.argv[1] if len(sys.argv) > 1 else "lookup")
    except EnvError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
