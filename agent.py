"""The agent loop, and the record of tokens that it leaves.

An *episode* is one attempt at one task. The environment states the task. The *policy*, which is the
language model in training, writes a message. The tool calls in that message are run. Their results
are the *observation*, which the policy reads before it writes its next message. At the end the
environment gives the episode a reward. Training then makes the tokens of good episodes more likely.

So the record of an episode must say which tokens the policy chose:

    prompt                 the tools and the task    read
    turn 0  message        a tool call               sampled, one token after the other
            observation    what the tool returned    read
    turn 1  message        the answer                sampled, one token after the other

*Tokens in, tokens out.* A chat program keeps its messages as text. A text that is decoded from ids
and encoded again may become other ids, and a chat template may rewrite earlier messages. Training
would then see tokens that were never sampled. So the record is a list of ids that only grows.
Sampled ids are appended as they are. Only the new text of the environment is encoded.

`plain_episode` is the whole idea. Below the line of ====, `Agent` adds what a real run needs:

    budgets            on the turns, on the length of a message, and on the time of a tool
    a context window   when it is full, old turns leave, and a new `Segment` begins
    errors             a broken environment costs its own episode, not the run
    chat templates     `Chat` turns the messages of any model into ids

A *workflow* of your own may take the place of the loop in `Agent.run`. This is the usual one:

    async def workflow(agent):
        while not agent.episode.finish:
            message = await agent.query()   # None: the message was cut, or the episode is over
            if message is not None:
                await agent.act(message)    # or agent.observe("your own text")

`fresh` and `branch` open more contexts in the same episode. An agent written elsewhere (LangGraph,
smolagents, the openai client) plays through `OutsideAgent`, below the second line of ====.

Left out: images, and changing the tools during an episode.

Takes an LLM (the engine of rollout.py, or any object with `generate`), a tokenizer and an
environment (env.py). Gives an Episode (to grpo.py). `python agent.py` prints one episode token by
token. To copy it, take tools.py and memory.py too.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import inspect
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, count, groupby
from random import Random
from traceback import format_exception
from typing import Any, Protocol
from weakref import WeakSet

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memory import turns_to_drop
from tools import (
    Call,
    CallError,
    Message,
    Observation,
    clip,
    describe,
    in_thread,
    parse,
    run_calls,
    safe_tools,
    schema,
    tools_of,
)

# --------------------------------------------------------------------------------------------------
# The idea: append what the policy samples, append what the environment answers, repeat


async def plain_episode(llm: LLM, tokenizer, env, seed: int = 0) -> Episode:
    """Play one episode as `Agent.run` does. A message over 256 tokens ends it; turns are unlimited.

    For models whose template is `CHATML`. llm samples the messages. env is an environment of env.py
    with the tool `final_answer`.
    """
    rng, segment = Random(seed), Segment()
    task, tools = env.reset(seed), tools_of(env)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": task}], tools=[schema(tool) for tool in tools.values()],
        add_generation_prompt=True, tokenize=False)
    segment.extend(tokenizer.encode(prompt), turn=-1)
    for turn in count():
        # The policy samples a message. The log-probs mark its tokens as `sampled`.
        out = await llm.generate(segment.ids, 256, rng=rng, temperature=1.0)
        segment.extend(out.ids, turn, out.logps)
        if out.finish == "length":
            break  # the message was cut: it has no <|im_end|>, and must not be run
        # The text is only used to find the tool calls. It is never encoded again.
        message = parse(tokenizer.decode(out.ids[:-1]), tools)  # [:-1]: without <|im_end|>
        calls = message.calls or [Call("final_answer", {"answer": message.text})]
        observations = await run_calls(calls, tools)
        if env.done:
            break
        # Only this new text is encoded: the results, and the header of the next message.
        results = [f"<|im_start|>tool\n{o.text}<|im_end|>\n" for o in observations]
        text = "\n" + "".join(results) + "<|im_start|>assistant\n"
        segment.extend(tokenizer.encode(text), turn)
    return Episode(seed, task, [segment], reward=env.get_reward(), turns=turn + 1)


# --------------------------------------------------------------------------------------------------
# The record


@dataclass
class Completion:
    """What an LLM returns for one request."""

    ids: list[int]  # the sampled tokens, with the stop token if that was sampled
    logps: list[float]  # log-prob of each, under the distribution it was sampled from
    finish: str  # "stop": the model ended its message; "length": the limit cut it


class LLM(Protocol):
    """Anything that continues a list of tokens.

    rng: the episode's own random numbers. temperature: 0 means greedy.
    """

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random,
                       temperature: float) -> Completion: ...


@dataclass
class Segment:
    """The tokens of one context window, append-only: exactly what the model saw, in order.

    An episode has one segment, unless the window fills up, or a workflow opens another context. In
    a full window old turns leave, and the next segment begins with the prompt and the turns that
    stay. These count as read there, even the
    messages. So each sampled token is `sampled` in exactly one segment: where it was chosen.
    """

    ids: list[int] = field(default_factory=list)
    # Did the policy choose this token, here? (Not: "does it belong to an assistant's message?")
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # log-prob when sampled; 0 where not sampled
    turn: list[int] = field(default_factory=list)  # number of its turn; -1: the prompt

    def extend(self, ids: list[int], turn: int, logps: list[float] | None = None) -> None:
        """Append tokens to read or, with `logps`, tokens that the policy sampled.

        Raises ValueError if there is not one log-prob for each token.

        >>> s = Segment()
        >>> s.extend([7, 8], turn=-1)
        >>> s.extend([9], turn=0, logps=[-0.5])
        >>> s.sampled
        [False, False, True]
        """
        if logps is not None and len(logps) != len(ids):
            raise ValueError(f"{len(ids)} sampled tokens came with {len(logps)} log-probs")
        self.ids += ids
        self.sampled += [logps is not None] * len(ids)
        self.logps += [0.0] * len(ids) if logps is None else logps
        self.turn += [turn] * len(ids)


@dataclass
class Episode:
    """One attempt at one task. `finish` says how it ended:

    terminated    answered     the policy gave its final answer
                  env_done     the task ended in another way, for example by the last move
    truncated     max_turns    the policy used all its turns, or a workflow stopped early
                  length       the policy used all its turns, and its last message was cut
                  context      no room is left for a message: the prompt fills the context (for an
                               agent written elsewhere: its conversation does)
    failed        error        the code of the environment, or of an agent written elsewhere,
                               failed, so the reward means nothing
    """

    seed: int = 0  # of the task, not of the sampling
    task: str = ""  # what the environment asks, in words
    segments: list[Segment] = field(default_factory=list)
    states: list[str] = field(default_factory=list)  # the environment's `state` before each turn
    reward: float = 0.0  # of the whole episode, in [0, 1]
    finish: str = ""  # see above; "" while it is played
    error: str = ""  # what failed, if `finish` is "error"
    turns: int = 0  # messages that the policy wrote
    thinking: int = 0  # words it wrote between <think> and </think>
    tool_calls: int = 0  # calls it wrote, well-formed or not
    tool_errors: int = 0  # error observations it got, for a call or for a cut or empty message
    behaviour: dict[str, float] = field(default_factory=dict)  # the environment's counts, to log
    env: str = ""  # name of the environment; the caller sets this and the next two
    group: int = 0  # which task of the step; episodes of one group are compared with one another
    member: int = 0  # which attempt at that task

    @property
    def terminated(self) -> bool:
        """The task itself came to an end, so a reward of 0 is deserved."""
        return self.finish in ("answered", "env_done")

    @property
    def truncated(self) -> bool:
        """A budget ended the episode before the task was over."""
        return self.finish in ("max_turns", "context", "length")

    @property
    def success(self) -> bool:
        """The full reward."""
        return self.reward >= 1.0 and not self.error


# ==================================================================================================
# The agent. On a simple task its tokens are those of `plain_episode`


async def take_turns(agent: Agent) -> None:
    """The usual workflow: a message, its calls, the next message, until the episode is over."""
    while not agent.episode.finish:
        await agent.step()


class Agent:
    """One policy in one environment, one episode at a time. Its verbs:

    run      one episode: `start`, then the workflow, then `close`
    step     one turn: `query`, then `act`
    query    the policy writes a message, or a spent budget sets `finish`
    act      its calls run; then `observe` appends the results, or the end of the task sets `finish`
    fresh    go on in a new context, which begins with a prompt of your own
    branch   a second agent that goes on from here, in the same episode

    context: tokens that one segment may hold, the message being sampled included.
    tool_timeout: seconds for a tool call, and for each question to the environment.
    workflow: who calls the verbs between `start` and `close`.
    """

    def __init__(self, llm: LLM, chat: Chat, *, max_turns: int = 8, max_new_tokens: int = 256,
                 context: int = 4096, temperature: float = 1.0, tool_timeout: float = 10.0,
                 workflow: Callable[[Agent], Awaitable[None]] = take_turns):
        self.llm, self.chat, self.workflow = llm, chat, workflow
        self.max_turns, self.max_new_tokens, self.context = max_turns, max_new_tokens, context
        self.temperature, self.tool_timeout = temperature, tool_timeout
        self.max_input = context - max_new_tokens  # the longest input with room for a message
        # Of the current episode; `start` sets all of it.
        self.episode, self.rng, self.env, self.tools = Episode(), Random(), None, {}
        self.schemas: list[dict] = []  # of the tools
        self.prompt: list[int] = []  # ids before the first message
        # The turns that the next message will see: the ids of each, by its number. `segment` holds
        # the prompt and all of them. Only an observation that fills the window is not in it yet.
        self.turns: dict[int, list[int]] = {}
        self.segment = Segment()  # the newest one: what the policy sees now
        self.turn = -1  # the number of this agent's newest message

    async def run(self, env, seed: int = 0, rng: Random | None = None) -> Episode:
        """Play one episode. `env`: an environment, or a function that makes one.

        If the environment or that function fails, the episode says so. A failing LLM raises.
        """
        try:
            await self.start(env, seed, rng)
            await self.workflow(self)
            return await self.close()
        except (EnvFailure, AgentFailure) as e:  # not the policy's fault: grpo.py leaves it out
            self.episode.finish, self.episode.error = "error", str(e)
            return self.episode

    async def start(self, env, seed: int = 0, rng: Random | None = None) -> None:
        """Reset the environment and write the prompt. Raises EnvFailure, as the verbs below do."""
        self.episode, self.rng, self.turn = Episode(seed=seed), rng or Random(seed), -1
        self.env = await self._ask("constructor", env) if callable(env) else env
        self.episode.task = await self._ask("reset", lambda: _text(self.env.reset(seed)))
        self.tools = tools_of(self.env)
        self.schemas = [schema(tool) for tool in self.tools.values()]
        self.fresh(self.episode.task)

    async def step(self) -> None:
        """One turn: a message from the policy, and the environment's answer."""
        message = await self.query()
        if message is not None:
            await self.act(message)

    async def query(self) -> Message | None:
        """Let the policy write one message.

        None if the episode is over instead, or if the message was cut (nothing in it is then run).
        """
        episode = self.episode
        episode.finish = episode.finish or self._spent_budget()
        if episode.finish:
            return None
        if self._is_full():
            self._drop_old_turns()
        self.turn = await self._begin_turn()
        out = await self.llm.generate(self.segment.ids, self.max_new_tokens, rng=self.rng,
                                      temperature=self.temperature)
        self.segment.extend(out.ids, self.turn, out.logps)
        self.turns[self.turn] = list(out.ids)
        if out.finish == "length":
            # Half a call must never run: `{"path": "/` is not what the policy asked for.
            episode.tool_errors += 1
            self.observe(f"error: your message was cut at {len(out.ids)} tokens "
                         "and nothing in it was run")
            if episode.turns >= self.max_turns:
                episode.finish = "length"
            return None
        message = parse(self.chat.decode(out.ids), self.schemas)
        episode.thinking += len(message.thinking.split())
        return message

    async def act(self, message: Message) -> list[str]:
        """Run the calls of a message. Without any, its text is the final answer.

        Returns what the calls gave. Unless the task is over, the policy reads it next.
        """
        self.episode.tool_calls += len(message.calls)
        calls = message.calls
        if not calls and message.text and "final_answer" in self.tools:
            calls = [Call("final_answer", {"answer": message.text})]
        if not calls:
            calls = [CallError("your message holds no tool call and no answer")]
        observations = await run_calls(calls, self.tools, timeout=self.tool_timeout)
        self.episode.tool_errors += sum(o.error for o in observations)
        texts = [o.text for o in observations]
        if not await self._ask("done", lambda: bool(self.env.done)):
            self.observe(*texts)
            return texts
        # The policy will not read the texts, so the episode ends with the policy's own token.
        accepted = [call.name for call, o in zip(calls, observations) if not o.error]
        self.episode.finish = "answered" if "final_answer" in accepted else "env_done"
        return texts

    def observe(self, *texts: str) -> None:
        """Append what the policy reads next, once after each message. It is never trained on."""
        if not self.turns:
            raise RuntimeError("observe answers a message, and there is none yet: "
                               "text before the first message belongs in the task")
        ids = self._observation_ids(texts)
        self.turns[self.turn] += ids
        # Without room for a message behind it, the segment stays as it is. `query` opens the next
        # one from `self.turns`, where the policy reads this observation.
        if not self._is_full():
            self.segment.extend(ids, self.turn)

    def fresh(self, text: str) -> None:
        """Go on in a new context: the tools and this text. What came before is not in it."""
        self.prompt = self.chat.prompt(text, self.schemas)
        self._open_segment({})

    def branch(self) -> Agent:
        """A second agent, with a copy of this context and random numbers of its own.

        Both play the same episode and share its budgets. Each message is trained.
        """
        other = copy.copy(self)
        other.rng = Random(self.rng.getrandbits(64))
        other._open_segment({number: list(ids) for number, ids in self.turns.items()})
        return other

    async def close(self) -> Episode:
        """Score the episode."""
        reward = await self._ask("get_reward", lambda: float(self.env.get_reward()))
        # NaN fails this test, too. After one NaN, the next update makes every weight NaN.
        if not 0 <= reward <= 1:
            raise EnvFailure(f"get_reward: {reward} is not in [0, 1]")
        self.episode.behaviour = await self._ask("behaviour", lambda: _behaviour(self.env))
        self.episode.reward = reward
        # A context may have been opened without a message: by a workflow that opened another one
        # first, or for a request that was cancelled.
        opened = self.episode.segments
        self.episode.segments = [s for s in opened if any(s.sampled)] or opened[:1]
        # A workflow that stops by itself has spent its own budget: the task is not at its end.
        self.episode.finish = self.episode.finish or "max_turns"
        return self.episode

    def _spent_budget(self) -> str:
        """Which budget leaves no room for another message, as `finish` names it. Else ""."""
        if self.episode.turns >= self.max_turns:
            return "max_turns"
        return "context" if len(self.prompt) > self.max_input else ""

    def _is_full(self) -> bool:
        """Is there no room for another message?"""
        return len(self.prompt) + sum(map(len, self.turns.values())) > self.max_input

    def _drop_old_turns(self) -> None:
        """The context window is full: go on in a new segment, with the newest turns only."""
        lengths = [len(ids) for ids in self.turns.values()]
        leaving = turns_to_drop(len(self.prompt), lengths, self.context, self.max_new_tokens)
        self._open_segment(dict(list(self.turns.items())[leaving:]))

    def _open_segment(self, turns: dict[int, list[int]]) -> None:
        """Begin a segment with the prompt and these turns.

        None of it is `sampled` here: each token is trained in the segment where it was chosen.
        """
        self.turns, self.segment = turns, Segment()
        self.episode.segments.append(self.segment)
        self.segment.extend(self.prompt, turn=-1)
        for number, ids in turns.items():
            self.segment.extend(ids, number)

    async def _begin_turn(self) -> int:
        """Count a message that will be sampled, and note the state it answers."""
        turn = self.episode.turns
        self.episode.turns += 1
        self.episode.states.append("")  # its place: another turn may begin while we wait
        self.episode.states[turn] = await self._ask("state", lambda: _text(self.env.state))
        return turn

    def _observation_ids(self, texts: Iterable[str]) -> list[int]:
        """Ids of an observation. Long texts are shortened, to 15 characters at the least.

        The aim: the observation takes at most half of the free tokens, and fits beside its message.
        So a tool that returns very much does not push the message that called it out of the window.
        """
        message = self.turns[self.turn]
        closed = message[-1:] == [self.chat.end_id]  # not if it was cut, or has another stop token
        free = self.max_input - len(self.prompt)
        room = min(free // 2, free - len(message))
        ids = self.chat.observation(texts, closed)
        for max_chars in (1000, 500, 250, 125, 62, 31, 15):
            if len(ids) <= room:
                break
            ids = self.chat.observation([clip(text, max_chars) for text in texts], closed)
        return ids

    async def _ask(self, part: str, question: Callable[[], Any]) -> Any:
        """Run the environment's own code in a thread, within the time limit.

        So a slow environment delays no other episode. One that fails or hangs costs its own episode
        only: this raises an EnvFailure that names the part.
        """

        def answer() -> Any:
            try:
                return question()
            except BaseException as e:  # sys.exit() too: this thread is the environment's
                raise EnvFailure(f"{part}: {describe(e)}") from e

        future = in_thread(answer)
        try:
            await asyncio.wait({future}, timeout=self.tool_timeout)
            if not future.done():
                raise EnvFailure(f"{part}: took longer than {self.tool_timeout:g} s")
            return future.result()
        except RuntimeError as e:  # the system gives no more threads
            raise EnvFailure(f"{part}: {describe(e)}") from e
        finally:
            future.cancel()  # of no effect if it is done


class EnvFailure(Exception):
    """The environment's own code failed or took too long, outside any tool call."""


class AgentFailure(Exception):
    """The code of an agent written elsewhere failed or hangs, and not because of the policy."""


def _text(value: Any) -> str:
    """The value, which must be text."""
    if not isinstance(value, str):
        raise TypeError(f"want text, not {type(value).__name__}")
    return value.encode("utf-8", "replace").decode("utf-8")  # no tokenizer takes half a character


def _behaviour(env) -> dict[str, float]:
    """The environment's counts, if it has any."""
    return {name: float(value) for name, value in getattr(env, "behaviour", {}).items()}


# --------------------------------------------------------------------------------------------------
# From messages to ids

@dataclass
class WrittenCall:
    """A tool call as an API gives it: the arguments are text, and that text may be no JSON."""

    name: str
    arguments: str

    def as_json(self) -> str:
        return f'{{"name": {json.dumps(self.name)}, "arguments": {self.arguments or "{}"}}}'


@dataclass
class ChatMessage:
    """One message of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    text: str
    calls: list[WrittenCall] = field(default_factory=list)  # of an assistant


# What a prompt says about the tools if the chat template cannot say it.
INSTRUCTIONS = """You can use the tools below. To call one, write
<tool_call>
{"name": "the tool", "arguments": {"argument": "value"}}
</tool_call>
and its result will follow. A message without a call is your final answer.

<tools>
%s
</tools>"""

# Two characters that Unicode leaves to private use. `plain` removes them from texts.
CUT = "\ue000"  # what stands before it and what stands after it are encoded separately
MARK = "\ue001"  # stands for a text, to see whether and where a template puts that text
# A fixed date. With today's, a run that is resumed tomorrow would have other prompts.
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": MARK}
MARKED_TOOL = {"type": "function", "function": {
    "name": MARK, "description": "", "parameters": {"type": "object", "properties": {}}}}


class Chat:
    """A tokenizer's chat template as two functions: ids of the prompt, ids of an observation.

    A template turns a whole conversation into text. Here it never sees a sampled message. To get
    the text between two messages, `observation` renders a conversation with a fixed message in
    place of the sampled one, and takes what follows that message (as TRL does).

    >>> chat = Chat(small_tokenizer([]))
    >>> chat.tokenizer.decode(chat.observation(["4 coins"]))
    '\\n<|im_start|>tool\\n4 coins<|im_end|>\\n<|im_start|>assistant\\n'

    Any template works that ends a message with a token of its own, such as `<|im_end|>`. The
    constructor tries what else it can do: show tools, take the roles `system` and `tool`. Where it
    cannot, the same words go into a user message.
    Not prevented: if a template writes its role headers in plain letters (Zephyr's `<|user|>`), a
    text from a tool can imitate them.

    stop_ids: more tokens that end a message, such as those of a model's generation_config. The
    attribute `stop_ids` has all that end one, for the engine.
    Raises ValueError if the tokenizer has no chat template, or none that marks a message's end.
    """

    def __init__(self, tokenizer, stop_ids: Iterable[int] = ()):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
        self.tokenizer = tokenizer
        # Control tokens, such as `<|im_end|>`: their ids, and the letters that stand for them.
        self._control = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()
                         if len(token.content) > 1 and token.content.strip()}
        self._normalises = any(t.normalized for t in tokenizer.added_tokens_decoder.values())
        self._template = TODAY + tokenizer.get_chat_template(tools=[MARKED_TOOL])
        # A template that asks for calls in another form (Llama 3, Qwen3-Coder) gets no tools.
        with_tool = self._try([USER], tools=[MARKED_TOOL])
        self._shows_tools = all(text in with_tool for text in (MARK, "<tool_call>", '"arguments"'))
        self._has_system_role = MARK in self._try([{"role": "system", "content": MARK}, USER])
        with_result = self._try([USER, ASSISTANT, {"role": "tool", "content": CUT}])
        self._tool_role = "tool" if CUT in with_result else "user"
        self.end_id = self._find_end()
        self.stop_ids = {self.end_id, tokenizer.eos_token_id, *stop_ids} - {None}

    def prompt(self, task: str, schemas: list[dict]) -> list[int]:
        """Ids of all before the policy's first message: tools, task, and the header of a message.

        A header is what stands before a message: `<|im_start|>assistant` and a newline in ChatML.
        """
        return self.conversation([ChatMessage("user", task)], schemas)

    def conversation(self, messages: list[ChatMessage], schemas: list[dict]) -> list[int]:
        """Ids of tools and messages, up to the header of the policy's next message."""
        messages, schemas = self._for_template(messages), self._plain_parts(schemas)
        if schemas and not self._shows_tools:
            functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in schemas]
            text = INSTRUCTIONS % "\n".join(functions)
            if self._has_system_role and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": text})
            else:
                messages[0]["content"] = text + "\n\n" + messages[0]["content"]
        tools = schemas if self._shows_tools else None
        return self._encode(self._render(messages, tools=tools, add_generation_prompt=True))

    def observation(self, texts: Iterable[str], closed: bool = True) -> list[int]:
        """Ids from the end of the policy's message to the header of its next one.

        closed: the policy sampled the end token itself, so it is not among these ids.
        """
        return self.continuation([ChatMessage("tool", text) for text in texts], closed)

    def continuation(self, messages: list[ChatMessage], closed: bool = True) -> list[int]:
        """As `observation`, for any messages that follow the policy's."""
        messages = [USER, ASSISTANT, *self._for_template(messages)]
        rendered = self._render(messages, add_generation_prompt=True)
        ids = self._encode(rendered.partition(MARK)[2])
        return ids[ids.index(self.end_id) + 1 :] if closed else ids

    def _for_template(self, messages: list[ChatMessage]) -> list[dict]:
        """The messages in the roles that the template takes, and with harmless texts."""
        roles = {"tool": self._tool_role, "system": "system" if self._has_system_role else "user"}
        strict = "user" in roles.values()  # it may refuse two user messages in a row
        fitted: list[dict] = []
        for message in messages:
            role = roles.get(message.role, message.role)
            parts = [self.plain(message.text)] if message.text or not message.calls else []
            parts += [f"<tool_call>\n{self.plain(call.as_json())}\n</tool_call>"
                      for call in message.calls]
            text = "\n".join(parts)
            if strict and fitted and fitted[-1]["role"] == role:
                fitted[-1]["content"] += "\n" + text
            else:
                fitted.append({"role": role, "content": text})
        return fitted

    def decode(self, ids: list[int]) -> str:
        """The text of a sampled message, without the token that ended it."""
        ids = [i for i in ids if i not in self.stop_ids]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def plain(self, text: str) -> str:
        """A text from outside, with a CUT inside every control token that it spells.

        So `<|im_end|>` in the result of a tool stays letters, and cannot end a message. Nothing
        else changes: the template trims and quotes as always, and harmless text keeps its ids.
        """
        text = _text(text).replace(CUT, "").replace(MARK, "")
        cut = text
        for token in self._control.values():
            cut = cut.replace(token, token[0] + CUT + token[1:])
        # Some are left if tokens overlap, or if the tokenizer takes other letters for theirs.
        may_be_left = cut != text or self._normalises
        if may_be_left and self._control.keys() & self._encode(cut):
            return CUT.join(text)
        return cut

    def _plain_parts(self, value: Any) -> Any:
        """`plain` for all texts in some JSON."""
        if isinstance(value, str):
            return self.plain(value)
        if isinstance(value, list):
            return [self._plain_parts(item) for item in value]
        if isinstance(value, dict):
            return {self.plain(key): self._plain_parts(item) for key, item in value.items()}
        return value

    def _find_end(self) -> int:
        """The first control token that the template puts after an assistant's message."""
        after = self._try([USER, ASSISTANT]).rpartition(MARK)[2]
        control = [i for i in self._encode(after) if i in self._control]
        if not control:
            raise ValueError("the chat template ends no turn with a control token")
        return control[0]

    def _encode(self, text: str) -> list[int]:
        """Ids of a text. No token reaches across a CUT, and CUT itself has no ids."""
        ids = []
        for piece in text.split(CUT):
            ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _render(self, messages: list[dict], **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self._template,
                                                      tokenize=False, **options)
        except (TypeError, ValueError, LookupError) as e:  # templates compute, and may fail
            raise TemplateError(str(e)) from e

    def _try(self, messages: list[dict], **options) -> str:
        """The rendered messages; "" if the template refuses them, which it does by raising."""
        try:
            return self._render(messages, **options)
        except TemplateError:
            return ""


# --------------------------------------------------------------------------------------------------
# Stand-ins: an LLM that recites, a tokenizer made on the spot


class Script:
    """An LLM that recites given messages. So a demonstrator (env.py) runs in a policy's loop.

    Raises ValueError if it is asked for more messages than it has, or if a message is longer than
    `max_new_tokens`.
    """

    def __init__(self, chat: Chat, messages: Iterable[str]):
        self.chat, self.messages = chat, iter(messages)

    async def generate(self, ids, max_new_tokens, *, rng, temperature) -> Completion:
        message = next(self.messages, None)
        if message is None:
            raise ValueError("the script is at its end, and the episode is not")
        ids = self.chat.tokenizer.encode(message, add_special_tokens=False) + [self.chat.end_id]
        if len(ids) > max_new_tokens:
            raise ValueError(f"a message of {len(ids)} tokens is longer than {max_new_tokens=}")
        return Completion(ids, [0.0] * len(ids), "stop")


# The chat template of the small tokenizer. Its messages have the form of Qwen's models (ChatML). Of
# a tool it gives the name, the arguments and the purpose only: each token of a prompt costs time.
CHATML = (
    "{% if tools %}<|im_start|>system\n"
    "<tool_call>\n{\"name\": ..., \"arguments\": ...}\n</tool_call>\n"
    "{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(', ') }}): {{ tool.function.description }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# How `small_tokenizer` cuts a text, in this order: a JSON key with all its punctuation; a word and
# the blank after it; a name, without its blank; one digit; punctuation; one blank. So a name is the
# same tokens everywhere, right after the word that introduces it. To copy a name is then to copy a
# token, which a young model learns first.
PIECES = (r'[{\[]*"\p{Ll}[\p{Ll}_]*": "?|\p{Ll}[\p{Ll}_]* ?|\p{Lu}(?:\p{Ll}+|\p{N})?'
          r"|\p{N}|[^\s\p{L}\p{N}]+ ?|\s")


def small_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`, with the ChatML template.

    It can write any text: what `texts` does not hold becomes bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tags = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=CHATML)


# --------------------------------------------------------------------------------------------------
# To look at

# Codes of the terminal.
COLOURS = {"policy": "\033[32m", "environment": "\033[33m", "prompt": "\033[90m"}
COLOUR_OFF = "\033[0m"


def transcript(episode: Episode, tokenizer, longest: int = 600, colour: bool = False) -> str:
    """A whole episode to read. `>` marks what the policy wrote, `|` what it was given to read.

    Every line has its mark, so no text can pass for another's. A given text of over `longest`
    characters loses its middle. A later context begins with the prompt and with turns carried over
    from the one before; they count as given.
    colour: for a terminal, by who wrote a line (policy green, environment yellow, prompt grey).
    """
    lines = [f"=== {episode.env or 'episode'}, seed {episode.seed}: reward {episode.reward:g}, "
             f"{episode.finish or 'not finished'}, {episode.turns} turns, "
             f"{episode.tool_calls} tool calls, {episode.tool_errors} errors"]
    if episode.task:
        lines.append(f"task: {_printable(clip(episode.task, longest))}")
    if episode.error:
        lines.append(f"failed: {_printable(clip(episode.error, longest))}")
    for number, segment in enumerate(episode.segments, 1):
        lines.append(f"--- context {number} of {len(episode.segments)}: {len(segment.ids)} tokens, "
                     f"{sum(segment.sampled)} of them sampled")
        lines += _segment_lines(segment, tokenizer, longest, colour)
    return "\n".join(lines)


def _segment_lines(segment: Segment, tokenizer, longest: int, colour: bool) -> list[str]:
    lines = []
    tokens = zip(segment.sampled, segment.turn, segment.ids)
    for (sampled, turn), span in groupby(tokens, key=lambda token: token[:2]):
        text = tokenizer.decode([i for _, _, i in span], clean_up_tokenization_spaces=False)
        who = "policy" if sampled else "environment"
        label = f"turn {turn}"
        if turn == -1:
            who = label = "prompt"
        for line in (text if sampled else clip(text, longest)).split("\n"):
            line = f"{label:>8} {'>' if sampled else '|'} {_printable(line)}".rstrip()
            lines.append(COLOURS[who] + line + COLOUR_OFF if colour else line)
            label = ""
    return lines


def _printable(text: str) -> str:
    """Spell out codes that would move the cursor, colour the terminal or begin a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ==================================================================================================
# Agents written elsewhere. They know messages only, so a Recorder keeps the tokens.
# Training needs none of this: skip it on first reading.
#
# Such an agent (LangGraph, smolagents, the openai client) sends a whole conversation and gets the
# next message, over HTTP (rollout.Endpoint). If its conversation goes on where an earlier one
# ended, the recorded tokens are used again. Nothing sampled is encoded a second time.


@dataclass
class ChatRequest:
    """What an agent asks for: the next message of a conversation."""

    messages: list[ChatMessage]
    tools: list[dict]  # schemas
    number: int = 1  # of messages that should be sampled, independently
    max_tokens: int = 10**9
    temperature: float = 1.0  # only used when a finished model is served


@dataclass
class Reply:
    """The policy's message, in the form in which the agent gets it."""

    message: ChatMessage
    thinking: str = ""
    finish: str = "stop"  # or "tool_calls", or "length"
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    malformed: bool = False  # cut, empty, or with a call that is wrong


class RequestError(Exception):
    """What is wrong with a request, in words for whoever wrote the agent, and the HTTP status."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


def read_request(body: Any) -> ChatRequest:
    """The JSON body of a request to /v1/chat/completions. Raises RequestError.

    >>> read_request({"messages": [{"role": "user", "content": "Hi"}]}).messages
    [ChatMessage(role='user', text='Hi', calls=[])]
    """
    messages = [_read_message(message) for message in _member(body, "messages", list)]
    tools = [_read_tool(tool) for tool in _member(body, "tools", list, [])]
    number = _member(body, "n", int, 1)
    most = min(_member(body, name, int, 10**9) for name in ("max_tokens", "max_completion_tokens"))
    temperature = _member(body, "temperature", (int, float), 1.0)
    if not messages or not 1 <= number <= 16 or most < 1 or not 0 <= temperature <= 100:
        raise RequestError("want at least one message, n from 1 to 16, max_tokens of at least 1, "
                           "and a temperature from 0 to 100")
    return ChatRequest(messages, tools, number, most, float(temperature))


def _member(found: Any, name: str, kind: type | tuple, default: Any = None) -> Any:
    """A member of a JSON object, which must be of this kind. Null is as good as missing."""
    value = found.get(name) if isinstance(found, dict) else None
    value = default if value is None else value
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f'"{name}" is missing, or is not of the right kind')
    return value


def _read_tool(tool: Any) -> dict:
    function = _member(tool, "function", dict)
    parameters = _member(function, "parameters", dict, {})
    parameters = {"type": "object", "properties": {}, **parameters}
    _check_schema(parameters)
    return {"type": "function", "function": {
        "name": _member(function, "name", str),
        "description": _member(function, "description", str, ""), "parameters": parameters}}


def _check_schema(spec: Any) -> None:
    """Raise RequestError unless this has the form of a JSON schema, as far as `parse` reads it."""
    kinds = {"properties": dict, "items": dict, "anyOf": list, "enum": list, "required": list,
             "type": (str, list)}
    if not isinstance(spec, dict) or not all(isinstance(spec[name], kind)
                                             for name, kind in kinds.items() if name in spec):
        raise RequestError("the parameters of a tool must be a JSON schema")
    if not all(isinstance(name, str) for name in spec.get("required", [])):
        raise RequestError('"required" must be a list of names')
    items = [spec["items"]] if "items" in spec else []
    for inner in [*spec.get("properties", {}).values(), *spec.get("anyOf", []), *items]:
        _check_schema(inner)


def _read_message(message: Any) -> ChatMessage:
    role = _member(message, "role", str)
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise RequestError(f"a message cannot have the role {role[:40]!r}")
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part if isinstance(part, str) else _member(part, "text", str) for part in parts]
    calls = [_read_call(call) for call in _member(message, "tool_calls", list, [])]
    return ChatMessage(role, "\n".join(texts), calls)


def _read_call(call: Any) -> WrittenCall:
    function = _member(call, "function", dict)
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return WrittenCall(_member(function, "name", str), arguments)


def conversation_key(before: str, message: ChatMessage) -> str:
    """A key for a conversation, from the key of all before its last message.

    Two messages are the same if role, text, tools and parsed arguments are. Ids and spacing are
    not compared.
    """
    calls = [(call.name, _normal(call.arguments)) for call in message.calls]
    same = json.dumps([before, message.role, message.text, calls])
    return hashlib.sha256(same.encode()).hexdigest()


def _normal(arguments: str) -> str:
    """The same JSON in one way of writing, or the text if it is no JSON."""
    try:
        return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


@dataclass
class Recorded:
    """Where a sampled message ends: after so many tokens of the segment."""

    segment: Segment
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.segment.ids)


class Recorder:
    """Samples the messages that an agent asks for, and records their tokens in segments.

    A request continues the segment whose conversation it extends, with the ids as they were
    sampled. A segment can be continued at its end only. If the conversation goes on from the middle
    of a segment, its ids are copied to a new one, where they count as read. This keeps every sample
    of a best-of-two or of parallel agents. Any other conversation opens a new segment as well.
    """

    def __init__(self, llm: LLM, chat: Chat, segments: list[Segment], *, max_new_tokens: int,
                 context: int, seed: int):
        self.llm, self.chat, self.segments = llm, chat, segments
        self.max_new_tokens, self.max_input = max_new_tokens, context - max_new_tokens
        self.seed = seed  # of the episode's random numbers
        self.asked: Counter = Counter()  # how often each prompt was sent
        self.recorded: dict[str, list[Recorded]] = defaultdict(list)  # by conversation

    async def sample(self, request: ChatRequest, temperature: float, turn: int) -> Reply:
        """One message. Without room for it the reply is empty, and nothing is recorded."""
        try:
            tools = json.dumps(request.tools, sort_keys=True)
            # keys[n] stands for the first n messages, and keys[0] for the tools alone.
            keys = list(accumulate(request.messages, conversation_key, initial=tools))
            known, new_ids = self._find(request, keys)
        except (TemplateError, RecursionError) as e:
            raise RequestError(f"no prompt can be made of these messages: {e}") from e
        ids = (known.segment.ids[: known.end] if known else []) + new_ids
        if len(ids) > self.max_input:
            return Reply(ChatMessage("assistant", ""), finish="length", prompt_tokens=len(ids))
        segment = self._segment(known, new_ids, turn - 1)
        # The random numbers follow from the prompt. So requests that are sent at the same time
        # sample the same tokens, whichever comes first.
        prompt = hashlib.sha256(str(ids).encode()).hexdigest()
        rng = Random(f"{self.seed} {prompt} {self.asked[prompt]}")
        self.asked[prompt] += 1
        out = await self.llm.generate(ids, min(self.max_new_tokens, request.max_tokens), rng=rng,
                                      temperature=temperature)
        segment.extend(out.ids, turn, out.logps)
        reply = self._reply(out, request.tools)
        reply.prompt_tokens, reply.sampled_tokens = len(ids), len(out.ids)
        key = conversation_key(keys[-1], reply.message)
        self.recorded[key].append(Recorded(segment, len(segment.ids)))
        return reply

    def _find(self, request: ChatRequest, keys: list[str]) -> tuple[Recorded | None, list[int]]:
        """The longest recorded beginning of a conversation, and the ids of what follows it."""
        for length in range(len(request.messages), 0, -1):
            if found := self.recorded.get(keys[length]):
                # Of several, take one that a request can still continue.
                known = next((one for one in found if one.is_last), found[-1])
                closed = known.segment.ids[known.end - 1] == self.chat.end_id
                return known, self.chat.continuation(request.messages[length:], closed)
        return None, self.chat.conversation(request.messages, request.tools)

    def _segment(self, known: Recorded | None, new_ids: list[int], turn: int) -> Segment:
        """The segment that the message goes to, with all tokens before the message.

            request [A]         segment 1: A a            (small letters are sampled)
            request [A, a, B]   segment 1: A a B b        a was its end: it goes on
            request [A, a, C]   segment 2: A a C c        a is now in its middle: a copy, and here
                                                          only c is sampled
        """
        # The new ids, appended before the model is awaited, mark this end as taken. If there are
        # none, two equal requests would both write here. So each gets a segment of its own.
        if known and known.is_last and new_ids:
            known.segment.extend(new_ids, turn)
            return known.segment
        segment = Segment()
        self.segments.append(segment)
        if known:
            segment.extend(known.segment.ids[: known.end], turn=-1)
        segment.extend(new_ids, turn=-1)
        return segment

    def _reply(self, out: Completion, tools: list[dict]) -> Reply:
        """The sampled tokens as a message. Nothing in one that was cut may run: it has no calls."""
        found = parse(self.chat.decode(out.ids), tools)
        cut = out.finish == "length"
        calls = [] if cut else [_written(call) for call in found.calls]
        broken = any(isinstance(call, CallError) for call in found.calls)
        empty = not found.text and not calls
        return Reply(ChatMessage("assistant", found.text, calls), found.thinking,
                     finish="length" if cut else "tool_calls" if calls else "stop",
                     malformed=cut or broken or empty)


def _written(call: Call | CallError) -> WrittenCall:
    """A call as an API sends it. Of one that is wrong, the agent gets what the policy wrote."""
    if isinstance(call, Call):
        return WrittenCall(call.name, _text(json.dumps(call.arguments, ensure_ascii=False)))
    name = re.search(r'"name":\s*"([^"]*)"', call.written)
    arguments = re.search(r'"arguments":\s*(.*)}', call.written, re.DOTALL)
    return WrittenCall(name[1] if name else "unknown",
                       arguments[1] if arguments else call.written)


class OutsideAgent(Agent):
    """An agent written elsewhere, in the place of our own loop. It plays one episode.

    solve(task, tools, base_url): a plain or an `async` function. `tools` are the environment's, as
    functions without `final_answer`. `base_url` belongs to this episode. A text that `solve`
    returns is the final answer.
    endpoint: the server (rollout.Endpoint).
    idle_timeout: seconds without a message of the policy and without the end of a tool call.

    If `solve` raises, or is idle for too long, it depends on what came before:

        the task is over                              the episode keeps its reward
        the policy's last message was malformed       the same: the policy is at fault
        a budget was spent (turns, context)           the same
        anything else                                 the agent's code is wrong: finish "error"

    When its messages do not fit the context, the agent gets an empty one with `finish` "length".
    """

    def __init__(self, solve: Callable, endpoint, *args, idle_timeout: float = 60.0, **options):
        super().__init__(*args, workflow=OutsideAgent._solve, **options)
        self.solve, self.endpoint, self.idle_timeout = solve, endpoint, idle_timeout
        self.demonstrator: Generator | None = None

    async def start(self, env, seed: int = 0, rng: Random | None = None) -> None:
        await super().start(env, seed, rng)
        self.episode.segments.clear()  # the agent chooses its own prompt
        self.recorder = Recorder(self.llm, self.chat, self.episode.segments,
                                 max_new_tokens=self.max_new_tokens, context=self.context,
                                 seed=self.rng.getrandbits(64))
        self.is_over, self.spent, self.malformed = False, "", False
        self.requests: set[asyncio.Task] = set()  # that wait for the policy
        self.tasks: WeakSet[asyncio.Task] = WeakSet()  # of the agent
        self.failed = asyncio.get_running_loop().create_future()
        self.last_sign = time.monotonic()  # of life

    async def answer(self, request: ChatRequest) -> list[Reply]:
        """Reply to a request of the agent, which the endpoint received."""
        try:
            if await self._is_done() or self.is_over:
                return [Reply(ChatMessage("assistant", "The task is over."))] * request.number
            self.requests.add(asyncio.current_task())
            # Turns are counted before sampling, so that `_sample` begins in this order. Equal
            # prompts get their random numbers by it.
            turns: list[int] = []
            while len(turns) < request.number and self.episode.turns < self.max_turns:
                turns.append(await self._begin_turn())
            replies = await asyncio.gather(*[self._sample(request, turn) for turn in turns])
        except RequestError:
            raise
        except Exception as e:  # of the LLM or the environment: `_result` raises it
            if not (self.failed.done() or self.is_over):
                self.failed.set_exception(e)
            raise
        finally:
            self.requests.discard(asyncio.current_task())
        missing = request.number - len(turns)
        self.spent = "max_turns" if missing else self.spent
        return replies + [Reply(ChatMessage("assistant", ""), finish="length")] * missing

    async def _sample(self, request: ChatRequest, turn: int) -> Reply:
        if self.demonstrator:
            self.recorder.llm = Script(self.chat, [self._recite(request)])
        reply = await self.recorder.sample(request, self.temperature, turn)
        if not reply.sampled_tokens:
            self.spent = "context"
            return reply
        self.last_sign = time.monotonic()
        self.malformed = reply.malformed
        self.episode.thinking += len(reply.thinking.split())
        self.episode.tool_calls += len(reply.message.calls)
        return reply

    async def _is_done(self) -> bool:
        return await self._ask("done", lambda: bool(self.env.done))

    def recite(self, demonstrator: Generator) -> None:
        """Let a generator write the messages, in the place of the LLM.

        It is sent the conversation of each request, a list of ChatMessage, and yields the reply:

            conversation = yield
            while True:
                conversation = yield "a message"
        """
        self.demonstrator = demonstrator

    def _recite(self, request: ChatRequest) -> str:
        try:
            if inspect.getgeneratorstate(self.demonstrator) == inspect.GEN_CREATED:
                next(self.demonstrator)  # up to its first `yield`
            return self.demonstrator.send(request.messages)
        except StopIteration:
            raise ValueError("the agent asks for more messages than are demonstrated") from None

    async def _solve(self) -> None:
        """The workflow: let the agent play, and hand in its answer."""
        tools = {name: tool for name, tool in self.tools.items() if name != "final_answer"}
        functions = safe_tools(tools, self.tool_timeout, self._count)
        with self.endpoint.opened(self) as url:
            job = self._start_solving(functions, url)
            try:
                answer = await self._result(job)
            finally:
                self.is_over = True
                tools.clear()  # `safe_tools` looks in this very dictionary: late calls find nothing
                running = [task for task in [job, *self.tasks, *self.requests] if not task.done()]
                for task in running:
                    task.cancel()
            if not running:  # so nothing of this agent will ask at the URL of another episode
                self.endpoint.release(url)
        await self._hand_in(answer)

    def _start_solving(self, tools: list[Callable], url: str) -> asyncio.Future:
        """Starts the agent's code. The future gets (what it returns, what it raises)."""
        task = self.episode.task

        async def in_loop():
            asyncio.get_running_loop().set_task_factory(_make_task)
            OWN_TASKS.set(self.tasks)
            try:
                return await self.solve(task, tools, url), None
            # SystemExit would end the event loop.
            except (Exception, SystemExit, asyncio.CancelledError) as e:
                return None, e

        def in_own_thread():
            try:
                return self.solve(task, tools, url), None
            except BaseException as e:
                return None, e

        if inspect.iscoroutinefunction(self.solve):
            return asyncio.ensure_future(in_loop())
        return in_thread(in_own_thread)

    async def _result(self, job: asyncio.Future) -> Any:
        """What the agent returns. None if it fails and the episode keeps its reward."""
        while not (job.done() or self.failed.done() or self._is_idle()):
            await asyncio.wait({job, self.failed}, timeout=self.idle_timeout / 4,
                               return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done():
            raise self.failed.exception()
        error = TimeoutError(f"no sign of life for {self.idle_timeout:g} s")
        if job.done():
            answer, error = job.result()
            if error is None:
                return answer
        if self.spent or self.malformed or await self._is_done():
            return None
        trace = "".join(format_exception(error))
        self.endpoint.say_once("failure", f"the agent's own code failed:\n{trace}")
        raise AgentFailure(f"agent: {describe(error)}")

    def _is_idle(self) -> bool:
        return not self.requests and time.monotonic() - self.last_sign > self.idle_timeout

    async def _hand_in(self, answer: Any) -> None:
        episode = self.episode
        if await self._is_done():
            episode.finish = "env_done"
        elif isinstance(answer, str) and answer.strip() and "final_answer" in self.tools:
            call = Call("final_answer", {"answer": _text(answer)})
            [observation] = await run_calls([call], self.tools, timeout=self.tool_timeout)
            episode.tool_errors += observation.error
            if await self._is_done():
                episode.finish = "answered"
        episode.finish = episode.finish or self.spent

    def _count(self, observation: Observation) -> None:
        if not self.is_over:
            self.episode.tool_errors += observation.error
            self.last_sign = time.monotonic()


# The asyncio tasks that an agent starts, and that these start: each inherits this variable.
OWN_TASKS: ContextVar[WeakSet | None] = ContextVar("own tasks", default=None)


def _make_task(loop: asyncio.AbstractEventLoop, coroutine, **options) -> asyncio.Task:
    """Make a task, as asyncio does, and note whose it is."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    if (own := OWN_TASKS.get()) is not None:
        own.add(task)
    return task


# --------------------------------------------------------------------------------------------------
# python agent.py


class PearShop:
    """The demo's environment."""

    state, done, reward = "", False, 0.0

    def reset(self, seed: int) -> str:
        return "What do 3 pears cost?"

    def price(self) -> str:
        """Look up what a pear costs."""
        return "4 coins"

    def final_answer(self, answer: str) -> None:
        """Give the answer.

        Args:
            answer: A number
        """
        self.done, self.reward = True, float(answer == "12")

    def get_reward(self) -> float:
        return self.reward


def _demo() -> None:
    call = '<tool_call>\n{"name": "price", "arguments": {}}\n</tool_call>'
    messages = [call, '<tool_call>\n{"name": "price"}\n</tool_call>', "12"]
    words = "What do pears cost? error: user assistant system tool coins"
    tokenizer = small_tokenizer([*messages, INSTRUCTIONS, words])
    chat = Chat(tokenizer)
    plain = asyncio.run(plain_episode(Script(chat, messages), tokenizer, PearShop()))
    segment = plain.segments[0]
    print("           token    id  turn  sampled   (of the prompt, the end only)")
    for i in range(segment.turn.count(-1) - 6, len(segment.ids)):
        sampled = "yes" if segment.sampled[i] else "-"
        token = repr(tokenizer.decode(segment.ids[i]))
        print(f"{token:>16}  {segment.ids[i]:>4}  {segment.turn[i]:>4}  {sampled:>7}")
    episode = asyncio.run(Agent(Script(chat, messages), chat).run(PearShop()))
    print(f"\nAgent.run gives the same tokens: {episode.segments == plain.segments}\n")
    print(transcript(episode, tokenizer, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    _demo()
