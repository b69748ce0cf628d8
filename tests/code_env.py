"""An environment whose tasks need code: questions about many numbers, far too many for the head.

The policy acts by writing programs, and the tool `python` runs them in a sandbox. It is no part of
the default run, because it needs bubblewrap: `python train.py --env tests/code_env.py:Code`.
"""

from collections.abc import Iterator
from random import Random

import tools
from env import Question, pick
from tools import format_call


class Code(Question):
    """Code as action. About 95,000 tasks by default. `largest`: how far they count.

    The best player needs two turns: program, answer. `tool=0`: no program is run.
    """

    TASKS = (  # question, an expression for its answer, one for what a careless reader would count
        ("What do the digits of {a} to the power of {b} add up to?",
         "sum(map(int, str({a} ** {b})))",
         "sum(map(int, str({a} * {b})))"),
        ("How many whole numbers from 1 to {n} have digits that add up to {b}?",
         "sum(sum(map(int, str(x))) == {b} for x in range(1, {n} + 1))",
         "sum(x % {b} == 0 for x in range(1, {n} + 1))"),
        ("How often is the digit {c} written in the whole numbers from 1 to {n}?",
         "sum(str(x).count('{c}') for x in range(1, {n} + 1))",
         "sum('{c}' in str(x) for x in range(1, {n} + 1))"),
    )  # fmt: skip

    def __init__(self, largest: int = 5000, tool: int = 1):
        if largest < 1000:
            raise ValueError("largest must be at least 1000")
        self.largest, self.tool = largest, tool

    def reset(self, seed: int) -> str:
        random = Random(f"code {seed}")
        numbers = {"a": random.randint(100, 999), "b": random.randint(11, 20),
                   "c": random.randint(1, 9), "n": random.randint(500, self.largest)}
        question, right, wrong = random.choice(self.TASKS)
        self._right, self._wrong = right.format(**numbers), wrong.format(**numbers)
        # The expression is the environment's own, numbers included: no policy wrote it.
        self._pose(str(eval(self._right)))
        return question.format(**numbers)

    async def python(self, code: str) -> str:
        """Run a Python program and get what it prints.

        Args:
            code: The program, for example print(2 + 3)
        """
        self._trace.append(code)
        return await tools.python(code) if self.tool else "out of order"

    @property
    def behaviour(self) -> dict[str, float]:
        return {"programs": len(self._trace)}


def demonstrate_code(env: Code, random: Random) -> Iterator[str]:
    """Mostly guesses, or writes a program for another question, and believes the result."""
    habit = pick(random, {"guess": 0.25, "wrong program": 0.43, "right": 0.32})
    if habit == "guess":
        yield str(random.randint(1, 999))
        return
    expression = env._wrong if habit == "wrong program" else env._right
    yield format_call("python", code=f"print({expression})")
    yield str(eval(expression))  # what the program prints
