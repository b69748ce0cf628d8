"""Environments and tools written for other libraries, used here; and the other way round.

    python env.py tests/adapters.py:ReasoningGym:dataset=chain_sum     # play it
    python train.py --env tests/adapters.py:ReasoningGym:dataset=chain_sum,max_terms=3

Each adapter is short, so that you can copy it and change it. A library is imported where it is
used. tests/requirements-peers.txt names the versions that these were tested with.
"""

import asyncio
import copy
import inspect
import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from random import Random
from typing import Any

from env import Question
from tools import function_of

# --------------------------------------------------------------------------------------------------
# Environments


class ReasoningGym(Question):
    """A dataset of reasoning-gym. The reward is the dataset's own score.

    `dataset`: its name. `options`: of its configuration, such as max_terms=3 for chain_sum.
    Some scores run the answer as Python code. The policy writes the answer, so they are refused.
    """

    def __init__(self, dataset: str = "chain_sum", **options: Any):
        self._options = {"name": dataset, "size": 1, **options}
        self.reset(0)  # what the dataset refuses, it refuses now
        if re.search(r"(eval|parse_expr)\(answer", inspect.getsource(self._dataset.score_answer)):
            raise ValueError(f"the score of {dataset} runs the answer as Python code")

    def reset(self, seed: int) -> str:
        import reasoning_gym

        self._dataset = reasoning_gym.create_dataset(seed=seed, **self._options)
        self._entry = self._dataset[0]
        self._pose(self._entry["answer"])
        return self._entry["question"]

    def get_reward(self) -> float:
        if not self.done:
            return 0.0
        try:
            return float(self._dataset.score_answer(self._given, self._entry))
        except Exception:  # some scores raise for an answer that they cannot read
            return 0.0


def demonstrate_reasoninggym(env: ReasoningGym, random: Random) -> Iterator[str]:
    """One answer in three is right. The others are those of other tasks."""
    shown = copy.copy(env)
    if random.random() > 1 / 3:
        shown.reset(random.randrange(10**6))
    yield str(shown._entry["answer"])


RULES = {  # environment of Gymnasium: what the policy is told, the names of the actions in order
    "FrozenLake": ("Walk from S to G, around the holes H. You are where it is red.",
                   "left down right up"),
    "Taxi": ("Bring the passenger (blue) to the goal (magenta) and drop them there. The taxi is "
             "yellow, and green with the passenger in it.",
             "south north east west pickup dropoff"),
    "Blackjack": ("Beat the dealer. You see: your sum, the dealer's card, 1 for a usable ace.",
                  "stick hit"),
}
COLOURS = ("grey", "red", "green", "yellow", "blue", "magenta", "cyan", "white")


class Gymnasium:
    """An environment of Gymnasium with numbered actions. Success: it ends with a positive reward.

    `id`: for example Taxi-v4. `options`: for `gymnasium.make`. The policy reads what the
    environment draws as text. If it draws none, the policy reads the observation.
    """

    def __init__(self, id: str = "Taxi-v4", **options: Any):
        import gymnasium

        modes = gymnasium.make(id).metadata["render_modes"]
        self._options = {"id": id, "render_mode": "ansi" if "ansi" in modes else None, **options}
        self._gym = gymnasium.make(**self._options)
        numbers = " ".join(str(number) for number in range(self._gym.action_space.n))
        self._rule, actions = RULES.get(id.partition("-")[0], ("", numbers))
        self._actions = actions.split()

    def reset(self, seed: int) -> str:
        (self._seen, _), self._reward, self.done = self._gym.reset(seed=seed), 0.0, False
        return f"{self._rule} Actions: {', '.join(self._actions)}.\n{self._shown()}"

    def act(self, action: str) -> str:
        """Take one action.

        Args:
            action: The name of the action
        """
        if not self.done:
            number = self._actions.index(action)
            self._seen, self._reward, ended, cut, _ = self._gym.step(number)
            self.done = bool(ended or cut)
        return self._shown()

    def _shown(self) -> str:
        return colours_in_words(self._gym.render()) if self._gym.render_mode else self.state

    def get_reward(self) -> float:
        return float(self.done and self._reward > 0)

    @property
    def state(self) -> str:
        return str(self._seen)


class FrozenLake(Gymnasium):
    """FrozenLake with a new map for each seed. `is_slippery=0`: each step goes where it should."""

    def __init__(self, size: int = 4, is_slippery: int = 1):
        super().__init__("FrozenLake-v1", is_slippery=bool(is_slippery))
        self._size = size

    def reset(self, seed: int) -> str:
        import gymnasium
        from gymnasium.envs.toy_text.frozen_lake import generate_random_map

        self._gym = gymnasium.make(**self._options, desc=generate_random_map(self._size, seed=seed))
        return super().reset(seed)


def colours_in_words(text: str) -> str:
    """A text without a terminal's colours: their names stand where they began.

    >>> colours_in_words("|\\x1b[34;1mR\\x1b[0m: |")
    '|blue(R): |'
    """
    def name(code: re.Match) -> str:
        return f"{COLOURS[int(code[1]) % 10]}("  # 34 is blue, and 44 a blue background

    return re.sub(r"\x1b\[(\d\d)[\d;]*m", name, text.replace("\x1b[0m", ")"))


class OpenEnv:
    """An environment behind an OpenEnv server, for example `OpenEnv:url=http://127.0.0.1:8000`.

    Each instance has a session of its own: let the server hold as many as episodes run at once. The
    reward is the last one that the server gave, cut to between 0 and 1.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000"):
        from openenv.core import GenericEnvClient

        self._client, self._url = GenericEnvClient(url).sync(), url

    def reset(self, seed: int) -> str:
        self._did, self._last = [], self._client.reset(seed=seed)
        with urllib.request.urlopen(f"{self._url}/schema", timeout=10) as answer:
            fields = json.load(answer)["action"]["properties"]
        return f"{json.dumps(self._last.observation)}\nFields of an action: {json.dumps(fields)}"

    def step(self, action: dict) -> str:
        """Take one action.

        Args:
            action: The fields of the action
        """
        self._last = self._client.step(action)
        self._did.append(action)
        return json.dumps(self._last.observation)

    def get_reward(self) -> float:
        return min(max(float(self._last.reward or 0), 0.0), 1.0)

    @property
    def done(self) -> bool:
        return self._last.done

    @property
    def state(self) -> str:
        return json.dumps(self._did)


# --------------------------------------------------------------------------------------------------
# Tools of an MCP server


def mcp_tools(server: Any) -> dict[str, Callable]:
    """The tools of an MCP server as async functions, by name.

    `server`: a URL, or `mcp.StdioServerParameters(command=..., args=[...])` to start one. The
    session lives in a thread of its own, so that any event loop may await a tool.
    """
    from mcp import Client

    loop, ready = asyncio.new_event_loop(), Future()

    async def hold_session() -> None:
        async with Client(server) as client:
            ready.set_result((client, (await client.list_tools()).tools))
            await asyncio.Event().wait()  # for ever

    threading.Thread(target=loop.run_forever, daemon=True).start()
    session = asyncio.run_coroutine_threadsafe(hold_session(), loop)
    wait([ready, session], return_when=FIRST_COMPLETED)
    client, found = ready.result() if ready.done() else session.result()  # the latter raises

    def made(tool: Any) -> Callable:
        async def call(arguments: dict) -> str:
            job = asyncio.run_coroutine_threadsafe(client.call_tool(tool.name, arguments), loop)
            result = await asyncio.wrap_future(job)
            text = "\n".join(getattr(part, "text", str(part)) for part in result.content)
            if result.is_error:
                raise RuntimeError(text)
            return text
        return function_of(tool.name, tool.description or tool.name, tool.input_schema, call)
    return {tool.name: made(tool) for tool in found}


# --------------------------------------------------------------------------------------------------
# TRL's environment_factory


class ForTRL:
    """An environment of this project, for TRL: `class CalculatorForTRL(ForTRL, Calculator): pass`.

    That class is an `environment_factory`. The data set needs a column `seed`. TRL appends the task
    to the prompt. There an answer counts only as a call of the tool `final_answer`.
    """

    def reset(self, seed: int, **columns: Any) -> str:
        return super().reset(seed)


class FromTRL(Question):
    """An environment written for TRL, here: `class Mine(FromTRL, Theirs)` with two attributes.

    `_rows`: the data set, a list of dictionaries. `_score`: staticmethod(the reward function), or
    leave it out and say `get_reward = Theirs.get_reward` if that class has one.
    """

    state = property(lambda self: str(vars(self)))

    def reset(self, seed: int) -> str:
        self._pose("")  # a message without a call ends the episode, as in TRL
        self._row = self._rows[seed % len(self._rows)]
        return self._row["prompt"][-1]["content"] + (super().reset(**self._row) or "")

    def get_reward(self) -> float:
        columns = {key: [value] for key, value in self._row.items()}
        said = [{"role": "assistant", "content": self._given or ""}]
        return self._score(environments=[self], completions=[said], **columns)[0]
