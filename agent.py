"""The agent loop, and the record it leaves. Tokens in, tokens out.

An agent asks a language model for a message, runs the tool calls in it, shows the model the
results, and asks again. A chat program keeps the messages as its record. Reinforcement learning
cannot: a message that is decoded to text and encoded again may give other tokens than those that
were sampled. A chat template may also rewrite earlier turns. So the record here is the token stream
itself. It only grows: by ids that the policy sampled, or by ids that the environment gave (the
prompt, the results of tools). `Segment.sampled` says which of the two a token is. The mark is set
when the token is chosen, and never worked out later.

`plain_episode` is the whole idea in 20 lines. Below the ruler, `Agent` does the same with all that
a real run needs: a limited window, time limits, errors, and any chat template.

Left out: streaming, images, a choice of tools per message, several agents in one episode. To write
a workflow of your own, write an `async def` function: await `start`, then `query` and `act` in your
own loops and ifs, then `close`.

Takes an LLM (the engine of rollout.py, or any object with `generate`), a tokenizer and an
environment (env.py). Gives an Episode (to grpo.py). `python agent.py` prints one episode token by
token. To copy it, take tools.py and memory.py too.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, groupby
from random import Random
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memory import keep_turns
from tools import (
    Call,
    CallError,
    Message,
    Observation,
    clip,
    describe,
    format_call,
    in_thread,
    parse,
    run_calls,
    schema,
    tools_of,
)

# --------------------------------------------------------------------------------------------------
# The record


@dataclass
class Completion:
    """What an LLM returns for one request."""

    ids: list[int]  # the sampled tokens, with the stop token if that was sampled
    logps: list[float]  # log-prob of each, under the distribution it was sampled from
    finish: str  # "stop": the model ended its turn; "length": the limit cut it


class LLM(Protocol):
    """Anything that continues a list of tokens.

    rng: the episode's own random numbers. temperature: 0 means greedy.
    """

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random,
                       temperature: float) -> Completion: ...


@dataclass
class Segment:
    """The tokens of one context window, append-only: exactly what the model saw, in order."""

    ids: list[int] = field(default_factory=list)
    # Did the policy choose this token, here? (Not: "does it belong to an assistant's message?")
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # log-prob when sampled; 0 where not sampled
    turn: list[int] = field(default_factory=list)  # number of its turn; -1: the prompt

    def extend(self, ids: list[int], turn: int, logps: list[float] | None = None) -> None:
        """Append tokens of the environment or, with `logps`, tokens that the policy sampled.

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
    """One attempt at one task."""

    seed: int = 0  # of the task, not of the sampling
    task: str = ""  # what the environment asks, in words
    # One, unless the window filled up. A sampled token is `sampled` in exactly one of them.
    segments: list[Segment] = field(default_factory=list)
    states: list[str] = field(default_factory=list)  # the environment's `state` before each turn
    reward: float = 0.0  # of the whole episode, in [0, 1]
    finish: str = ""  # answered | env_done | max_turns | context | length | error
    error: str = ""  # the environment's own failure, if it failed (the reward then means nothing)
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
        """One of our budgets cut the episode, not the task."""
        return self.finish in ("max_turns", "context", "length")

    @property
    def success(self) -> bool:
        """The full reward."""
        return self.reward >= 1.0 and not self.error


# --------------------------------------------------------------------------------------------------
# The idea: append what the policy samples, append what the environment answers, repeat

def chatml(role: str, text: str) -> str:
    """One message in ChatML, the format of Qwen's models and of `small_tokenizer`."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


async def plain_episode(llm: LLM, tokenizer, env, seed: int = 0) -> Episode:
    """What `Agent.run` does, without limits: the window never fills up, and nothing fails.

    llm samples the messages; env is an environment of env.py with the tool `final_answer`.
    """
    rng, segment = Random(seed), Segment()
    task, tools = env.reset(seed), tools_of(env)
    schemas = [schema(tool) for tool in tools.values()]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": task}], tools=schemas,
                                           add_generation_prompt=True, tokenize=False)
    segment.extend(tokenizer.encode(prompt), turn=-1)
    for turn in count():
        out = await llm.generate(segment.ids, 256, rng=rng, temperature=1.0)
        segment.extend(out.ids, turn, out.logps)  # the policy chose these: they are `sampled`
        message = parse(tokenizer.decode(out.ids[:-1]), schemas)  # the last id is <|im_end|>
        calls = message.calls or [Call("final_answer", {"answer": message.text})]
        observations = await run_calls(calls, tools)
        if env.done:
            break
        # Only the new text is encoded. The ids before it stay as they are.
        text = "".join(chatml("tool", observation.text) for observation in observations)
        segment.extend(tokenizer.encode("\n" + text + "<|im_start|>assistant\n"), turn)
    return Episode(seed, task, [segment], reward=env.get_reward(), turns=turn + 1)


# ==================================================================================================
# The agent. On a simple task its tokens are those of `plain_episode`

SHORTER_TEXTS = (1000, 500, 250, 125, 62, 31, 15)  # characters, tried in this order


class Agent:
    """One policy in one environment, one episode at a time. Four verbs: run, step, query, act.

    context: tokens that one segment may hold, the message being sampled included.
    tool_timeout: seconds for a tool call, and for each question to the environment.
    """

    def __init__(self, llm: LLM, chat: "Chat", *, max_turns: int = 8, max_new_tokens: int = 256,
                 context: int = 4096, temperature: float = 1.0, tool_timeout: float = 10.0):
        self.llm, self.chat = llm, chat
        self.max_turns, self.max_new_tokens, self.context = max_turns, max_new_tokens, context
        self.temperature, self.tool_timeout = temperature, tool_timeout
        # Of the current episode; `start` sets all of it.
        self.episode, self.rng, self.env = Episode(), Random(), None
        self.tools, self.schemas = {}, []
        self.prompt: list[int] = []  # ids before the first message
        self.window: list[list[int]] = []  # ids of each turn after it: a message, its observation
        self.state = ""  # the environment's, before the next message
        self.cut = False  # did the length limit cut the newest message?

    async def run(self, env, seed: int = 0, rng: Random | None = None) -> Episode:
        """Play one episode. `env`: an environment, or a function that makes one.

        If the environment or that function fails, the episode says so. A failing LLM raises.
        """
        try:
            await self.start(env, seed, rng)
            while not self.episode.finish:
                await self.step()
            return await self.close()
        except WorldError as e:  # not the policy's fault, so grpo.py leaves this episode out
            self.episode.finish, self.episode.error = "error", str(e)
            return self.episode

    async def start(self, env, seed: int = 0, rng: Random | None = None) -> None:
        """Reset the environment and write the prompt. Raises WorldError."""
        self.episode, self.rng = Episode(seed=seed), rng or Random(seed)
        self.env = await self._ask("constructor", env) if callable(env) else env
        self.episode.task = await self._ask("reset", lambda: _text(self.env.reset(seed)))
        self.state = await self._ask("state", lambda: _text(self.env.state))
        self.tools = tools_of(self.env)
        self.schemas = [schema(tool) for tool in self.tools.values()]
        self.prompt = self.chat.prompt(self.episode.task, self.schemas)
        self.window, self.cut = [], False
        self._open_segment()

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
        if not self._fits(self.window):
            self._drop_old_turns()
        episode.states.append(self.state)
        out = await self.llm.generate(self.segment.ids, self.max_new_tokens, rng=self.rng,
                                      temperature=self.temperature)
        self.segment.extend(out.ids, episode.turns, out.logps)
        self.window.append(list(out.ids))
        episode.turns += 1
        self.cut = out.finish == "length"
        if self.cut:  # half a call must never run: `{"path": "/` is not what the policy asked for
            text = f"error: your message was cut at {len(out.ids)} tokens and nothing in it was run"
            self.observe([Observation(text, error=True)])
            return None
        message = parse(self.chat.decode(out.ids), self.schemas)
        episode.thinking += len(message.thinking.split())
        return message

    async def act(self, message: Message) -> None:
        """Run the calls of a message. Without any, its text is the final answer."""
        self.episode.tool_calls += len(message.calls)
        calls = message.calls
        if not calls and message.text and "final_answer" in self.tools:
            calls = [Call("final_answer", {"answer": message.text})]
        if not calls:
            calls = [CallError("your message holds no tool call and no answer")]
        observations = await run_calls(calls, self.tools, timeout=self.tool_timeout)
        if await self._ask("done", lambda: bool(self.env.done)):
            # Nobody will read the observations. The episode ends with the policy's own token.
            self.episode.tool_errors += sum(o.error for o in observations)
            accepted = [call.name for call, o in zip(calls, observations) if not o.error]
            self.episode.finish = "answered" if "final_answer" in accepted else "env_done"
            return
        self.state = await self._ask("state", lambda: _text(self.env.state))
        self.observe(observations)

    def observe(self, observations: list[Observation]) -> None:
        """Append what the environment says, once after each message. It is never trained on."""
        if not self.window:
            raise RuntimeError("observe answers a message, and there is none yet: "
                               "text before the first message belongs in the task")
        self.episode.tool_errors += sum(o.error for o in observations)
        ids = self._observation_ids([o.text for o in observations])
        self.window[-1] += ids
        # If the next message no longer fits, `query` puts this turn into the next segment.
        if self._fits(self.window):
            self.segment.extend(ids, self.episode.turns - 1)

    async def close(self) -> Episode:
        """Score the episode. Raises WorldError."""
        reward = await self._ask("get_reward", lambda: float(self.env.get_reward()))
        # NaN fails this test, too. After one NaN, the next update makes every weight NaN.
        if not 0 <= reward <= 1:
            raise WorldError(f"get_reward: {reward} is not in [0, 1]")
        self.episode.behaviour = await self._ask("behaviour", lambda: _behaviour(self.env))
        self.episode.reward = reward
        if not self.episode.finish:  # a workflow stopped by itself: its budget, not the task's end
            self.episode.finish = "max_turns"
        return self.episode

    @property
    def segment(self) -> Segment:
        """The context window that the policy sees."""
        return self.episode.segments[-1]

    def _spent_budget(self) -> str:
        """Which budget leaves no room for another message, as `finish` names it. Else ""."""
        if self.episode.turns >= self.max_turns:
            return "length" if self.cut else "max_turns"
        return "" if self._fits([]) else "context"

    def _fits(self, turns: list[list[int]]) -> bool:
        """Can the window hold the prompt, these turns and one more message?"""
        tokens = len(self.prompt) + sum(len(turn) for turn in turns)
        return tokens + self.max_new_tokens <= self.context

    def _drop_old_turns(self) -> None:
        """The window is full: open a new segment with the prompt and the newest whole turns.

        It is filled to half of the window only, so that not every later turn opens a segment.
        The newest turn stays even if it is longer than that: it holds what the policy asked for.
        """
        if self._fits(self.window[-1:]):
            fixed = len(self.prompt) + len(self.window[-1])
            half = min(self.context // 2, self.context - self.max_new_tokens)
            older = [len(turn) for turn in self.window[:-1]]
            self.window = self.window[keep_turns(fixed, older, max(half, fixed)) :]
        else:
            self.window = []
        self._open_segment()

    def _observation_ids(self, texts: list[str]) -> list[int]:
        """Ids of an observation, its texts shortened until they take at most half of what is free.

        So a tool that returns very much does not push the message that called it out of the window.
        """
        message = self.window[-1]
        closed = message[-1:] == [self.chat.end_id]  # not if it was cut, or has another stop token
        free = self.context - self.max_new_tokens - len(self.prompt)
        room = min(free // 2, free - len(message))
        ids = self.chat.observation(texts, closed)
        for max_chars in SHORTER_TEXTS:
            if len(ids) <= room:
                break
            ids = self.chat.observation([clip(text, max_chars) for text in texts], closed)
        return ids

    def _open_segment(self) -> None:
        """Begin a segment with the prompt and the turns of the window.

        None of it is `sampled` here: each token is trained in the segment where it was chosen.
        """
        self.episode.segments.append(Segment())
        self.segment.extend(self.prompt, turn=-1)
        first = self.episode.turns - len(self.window)
        for turn, ids in enumerate(self.window, first):
            self.segment.extend(ids, turn)

    async def _ask(self, part: str, question: Callable[[], Any]) -> Any:
        """Run the environment's own code in a thread, within the time limit.

        So a slow environment delays no other episode. One that fails or hangs costs its own episode
        only: this raises a WorldError that names the part.
        """

        def answer() -> Any:
            try:
                return question()
            except BaseException as e:  # sys.exit() too: this thread is the environment's
                raise WorldError(f"{part}: {describe(e)}") from e

        future = in_thread(answer)
        try:
            await asyncio.wait({future}, timeout=self.tool_timeout)
            if not future.done():
                raise WorldError(f"{part}: took longer than {self.tool_timeout:g} s")
            return future.result()
        except RuntimeError as e:  # the system gives no more threads
            raise WorldError(f"{part}: {describe(e)}") from e
        finally:
            future.cancel()  # of no effect if it is done


class WorldError(Exception):
    """The environment's own code failed or took too long, outside any tool call."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"want text, not {type(value).__name__}")
    return value.encode("utf-8", "replace").decode("utf-8")  # no tokenizer takes half a character


def _behaviour(env) -> dict[str, float]:
    return {name: float(value) for name, value in getattr(env, "behaviour", {}).items()}


# --------------------------------------------------------------------------------------------------
# From messages to tokens

INSTRUCTIONS = """You can use the tools below. To call one, write
<tool_call>
{"name": "the tool", "arguments": {"argument": "value"}}
</tool_call>
and its result will follow. A message without a call is your final answer.

<tools>
%s
</tools>"""


def instructions(schemas: list[dict]) -> str:
    """What a system message says about tools."""
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in schemas]
    return INSTRUCTIONS % "\n".join(functions)


# Two characters that Unicode leaves to private use, so no real text holds them.
# Text is split at CUT before it is encoded, and CUT is dropped. So the letters `<|im_` and `end|>`
# on its two sides never become one control token.
CUT = "\ue000"
MARK = "\ue001"  # stands for a text, to see where a template puts that text
# A fixed date. With today's, a run that is resumed tomorrow would have other prompts.
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": MARK}
MARKED_TOOL = {"type": "function", "function": {
    "name": MARK, "description": "", "parameters": {"type": "object", "properties": {}}}}


class Chat:
    """A tokenizer's chat template as two functions: ids of the first prompt, ids after a message.

    Nothing that the policy sampled passes through the template. To get the text after a message,
    `observation` renders a fixed message in its place and cuts the result there (as TRL does).
    Any template works that ends a turn with a token of its own. The constructor tries what else the
    template can do (tools, the roles `tool` and `system`). Plain text replaces what it cannot.
    Not prevented: if a template writes its role headers in plain letters (Zephyr's `<|user|>`), a
    text from a tool can imitate them.

    stop_ids: more tokens that end a message, such as those of a model's generation_config. The
    attribute `stop_ids` has all that end one, for the engine.
    Raises ValueError if the tokenizer has no chat template, or none that marks the end of a turn.
    """

    def __init__(self, tokenizer, stop_ids: Iterable[int] = ()):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
        self.tokenizer = tokenizer
        # Tokens that are written in letters, such as `<|im_end|>`. No text may turn into one.
        control = {i: token for i, token in tokenizer.added_tokens_decoder.items()
                   if len(token.content) > 1 and token.content.strip()}
        self._control_ids = set(control)
        texts = "|".join(re.escape(token.content) for token in control.values())
        self._first_letter = re.compile(f"(?={texts}).", re.DOTALL)  # of a control token
        self._normalises = any(token.normalized for token in control.values())
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
        """Ids of all before the policy's first message: tools, task, and the header of its turn."""
        system = "" if self._shows_tools or not schemas else instructions(schemas)
        messages = [{"role": "user", "content": self.plain(task)}]
        if system and self._has_system_role:
            messages.insert(0, {"role": "system", "content": system})
        elif system:
            messages[0]["content"] = system + "\n\n" + messages[0]["content"]
        tools = schemas if self._shows_tools else None
        return self._encode(self._render(messages, tools=tools, add_generation_prompt=True))

    def observation(self, texts: list[str], closed: bool = True) -> list[int]:
        """Ids from the end of the policy's message to the header of its next one.

        closed: the policy sampled the end token itself, so it is not among these ids.
        """
        if self._tool_role == "user":  # such templates may also refuse two user messages in a row
            texts = ["\n".join(texts)]
        messages = [USER, ASSISTANT]
        messages += [{"role": self._tool_role, "content": self.plain(text)} for text in texts]
        rendered = self._render(messages, add_generation_prompt=True)
        ids = self._encode(rendered.partition(MARK)[2])
        return ids[ids.index(self.end_id) + 1 :] if closed else ids

    def decode(self, ids: list[int]) -> str:
        """The text of a sampled message, without the token that ended it."""
        ids = [i for i in ids if i not in self.stop_ids]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def plain(self, text: str) -> str:
        """Text from outside, cut inside every control token that it spells.

        So `<|im_end|>` in the result of a tool stays letters. Nothing else changes: the template
        trims and quotes as always, and harmless text gets its usual ids.
        """
        text = text.replace(CUT, "").replace(MARK, "")
        text = self._first_letter.sub(r"\g<0>" + CUT, text)
        # A tokenizer that normalises makes control tokens of other letters, too.
        if self._normalises and not self._control_ids.isdisjoint(self._encode(text)):
            return CUT.join(text)
        return text

    def _find_end(self) -> int:
        """The first control token that the template puts after an assistant's message."""
        after = self._try([USER, ASSISTANT]).rpartition(MARK)[2]
        control = [i for i in self._encode(after) if i in self._control_ids]
        if not control:
            raise ValueError("the chat template ends no turn with a control token")
        return control[0]

    def _encode(self, text: str) -> list[int]:
        ids = []
        for piece in text.split(CUT):
            ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _render(self, messages: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self._template,
                                                  tokenize=False, **options)

    def _try(self, messages: list[dict], **options) -> str:
        """The rendered messages; "" if the template refuses them, which it does by raising."""
        try:
            return self._render(messages, **options)
        except (TemplateError, TypeError, ValueError, LookupError):
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


# The chat template of the small tokenizer: messages as the function `chatml` writes them. Of a tool
# it gives the name, the arguments and the purpose only: each token of a prompt costs training time.
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
    messages = [format_call("price"), '<tool_call>\n{"name": "price"}\n</tool_call>', "12"]
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
