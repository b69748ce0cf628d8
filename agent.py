"""The agent loop, and the record it leaves. Tokens in, tokens out.

An agent asks a language model for a message, runs the tool calls in it, shows the model what came back, and asks again.
For a chat program the messages are the record. For reinforcement learning they are not: a message decoded to text and
encoded again need not give the tokens that were sampled, and a chat template may rewrite earlier turns. So here the record
is the token stream itself. It only ever grows: by ids the policy sampled, or by ids of the world (the prompt, what a tool
returned). Which of the two a token is, is noted where the token is chosen (`Segment.sampled`), never worked out afterwards.

Left out: streaming, images, tool-choice modes, several agents in one episode, any language of graphs. A workflow of your
own is an `async def` function: await `start`, `query`, `act` in your loops and ifs; then await `close`.

Takes an LLM (rollout.py's engine; any object with `generate`), a tokenizer and an environment (env.py); gives an Episode
(to grpo.py). `python agent.py` prints one episode token by token. Lift it together with tools.py and memory.py.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memory import keep_turns
from tools import Call, Message, Observation, clip, describe, format_call, in_thread, parse, run_calls, schema, tools_of

# ----------------------------------------------------------------------------------------------------------------------
# The record


@dataclass
class Completion:
    """What an LLM gives back for one request."""

    ids: list[int]  # sampled tokens, the stop token included if it was sampled
    logps: list[float]  # log-prob of each under the distribution it was sampled from (temperature applied)
    finish: str  # "stop": the model ended its turn; "length": it was cut


class LLM(Protocol):
    """Anything that continues a list of tokens. `rng` is the episode's own stream; temperature 0 means greedy."""

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random, temperature: float) -> Completion: ...


@dataclass
class Segment:
    """The tokens of one context window, append-only: exactly what the model saw, in order."""

    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # did the policy choose this token, here? (not: "is it an assistant's")
    logps: list[float] = field(default_factory=list)  # log-prob it was sampled with; 0 where not sampled
    turn: list[int] = field(default_factory=list)  # which of the episode's turns it belongs to; -1: before the first

    def extend(self, ids: list[int], turn: int, logps: list[float] | None = None) -> None:
        """Append tokens of the world, or, with `logps`, tokens the policy sampled.

        >>> s = Segment(); s.extend([7, 8], turn=-1); s.extend([9], turn=0, logps=[-0.5]); s.sampled
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
    task: str = ""  # what the environment asked, as a user would put it
    segments: list[Segment] = field(default_factory=list)  # one, unless the window filled up; a sampled token is in exactly one
    states: list[str] = field(default_factory=list)  # the environment's `state` before each turn
    reward: float = 0.0  # of the whole episode, in [0, 1]
    finish: str = ""  # answered | env_done | max_turns | context | length | error
    error: str = ""  # what failed, if the environment itself did (then the reward means nothing)
    turns: int = 0  # messages the policy wrote
    thinking: int = 0  # words it thought, between <think> and </think>
    tool_calls: int = 0  # calls it made, well-formed or not
    tool_errors: int = 0  # of these and of its cut or empty messages: those answered with an error
    behaviour: dict[str, float] = field(default_factory=dict)  # what the environment counted, for the logs only
    env: str = ""  # name of the environment; set by the caller, as are the next two
    group: int = 0  # which task of the step: episodes with the same number are compared with one another
    member: int = 0  # which attempt at it

    @property
    def terminated(self) -> bool:
        """The task itself came to an end (a reward of 0 is then deserved)."""
        return self.finish in ("answered", "env_done")

    @property
    def truncated(self) -> bool:
        """A budget of ours cut the episode, not the task."""
        return self.finish in ("max_turns", "context", "length")

    @property
    def success(self) -> bool:
        return self.reward >= 1.0 and not self.error


def transcript(episode: Episode, tokenizer, longest: int = 600) -> str:
    """A whole episode to read: `>` stands before what the policy wrote, `|` before what it was given to read.

    Every line has its mark, so no text can pass for another's. Texts of the world over `longest` characters lose their middle.
    """
    e = episode
    counts = f"{e.turns} turns, {e.tool_calls} tool calls, {e.tool_errors} errors"
    lines = [f"=== {e.env or 'episode'}, seed {e.seed}: reward {e.reward:g}, {e.finish or 'not finished'}, {counts}"]
    lines += [f"{what}: {_visible(clip(text, longest))}" for what, text in (("task", e.task), ("failed", e.error)) if text]
    for number, s in enumerate(e.segments, 1):
        lines.append(f"--- context {number} of {len(e.segments)}: {len(s.ids)} tokens, {sum(s.sampled)} of them sampled")
        for (sampled, turn), span in groupby(zip(s.sampled, s.turn, s.ids), key=lambda token: token[:2]):
            text = tokenizer.decode([i for _, _, i in span], clean_up_tokenization_spaces=False)
            who = f"turn {turn}" if turn >= 0 else "prompt"
            for line in (text if sampled else clip(text, longest)).split("\n"):
                lines.append(f"{who:>8} {'>' if sampled else '|'} {_visible(line)}".rstrip())
                who = ""
    return "\n".join(lines)


def _visible(text: str) -> str:
    """Codes that would move the cursor, colour the terminal or begin a line, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


class Agent:
    """One policy in one environment, one episode at a time: run, step, query, act.

    context: tokens one segment may hold, the message being sampled included.
    tool_timeout: seconds for a tool call, and for each look at the environment.
    """

    def __init__(self, llm: LLM, chat: "Chat", *, max_turns: int = 8, max_new_tokens: int = 256, context: int = 4096,
                 temperature: float = 1.0, tool_timeout: float = 10.0):
        self.llm, self.chat = llm, chat
        self.max_turns, self.max_new_tokens, self.context = max_turns, max_new_tokens, context
        self.temperature, self.tool_timeout = temperature, tool_timeout

    async def run(self, env, seed: int = 0, rng: Random | None = None) -> Episode:
        """Play one episode in an environment, or in the one that the function `env` makes.

        A failure of the environment itself, or of that function, is noted in the episode.
        A failure of the LLM raises.
        """
        self.episode = Episode(seed=seed)
        try:
            await self.start(env, seed, rng)
            while not self.episode.finish:
                await self.step()
            return await self.close()
        except WorldError as e:  # not the policy's fault: the episode says so, and will leave its group
            self.episode.finish, self.episode.error = "error", str(e)
            return self.episode

    async def start(self, env, seed: int = 0, rng: Random | None = None) -> None:
        """Reset the environment and lay down the prompt."""
        self.rng, self.episode = rng or Random(seed), Episode(seed=seed)
        self.cut = False  # was the newest message cut by the length limit?
        self.env, self.episode.task, self.beginning, self.state = await self._ask(_begin, env, seed)
        self.tools = tools_of(self.env)
        self.schemas = [schema(tool) for tool in self.tools.values()]
        self._begin(self.episode.task)
        self._open()

    async def step(self) -> None:
        """One turn: a message from the policy, and what the world makes of it."""
        message = await self.query()
        if message is not None:
            await self.act(message)

    async def query(self) -> Message | None:
        """Let the policy write one message. None if the episode ended instead, or the message was cut (and so not parsed)."""
        episode = self.episode
        if episode.turns >= self.max_turns:
            return self._end("length" if self.cut else "max_turns")
        if not self._make_room():
            return self._end("context")
        episode.states.append(self.state)
        out = await self.llm.generate(self.segment.ids, self.max_new_tokens, rng=self.rng, temperature=self.temperature)
        self.segment.extend(out.ids, episode.turns, out.logps)
        self.exchanges.append(list(out.ids))
        episode.turns += 1
        self.cut = out.finish == "length"
        if self.cut:  # half a call must never run: a repaired `{"path": "/` is not what the policy asked for
            text = f"error: your message was cut at {len(out.ids)} tokens and nothing in it was run"
            return self.observe([Observation(text, error=True)])
        message = parse(self.chat.decode(out.ids), self.schemas)
        episode.thinking += len(message.thinking.split())
        return message

    async def act(self, message: Message) -> None:
        """Run the message's calls; without any, the message itself is the answer."""
        calls = message.calls
        self.episode.tool_calls += len(calls)
        if not calls and message.text and "final_answer" in self.tools:
            calls = [Call("final_answer", {"answer": message.text})]
        observations = await run_calls(calls, self.tools, timeout=self.tool_timeout)
        if not calls:
            observations = [Observation("error: your message holds no tool call and no answer", True)]
        before = self.beginning
        done, self.beginning, self.state = await self._ask(_look, self.env)
        if done:  # nobody would read what came back: the episode ends with the policy's own token
            self.episode.tool_errors += sum(o.error for o in observations)
            took = [getattr(c, "name", "") for c, o in zip(calls, observations) if not o.error]
            return self._end("answered" if "final_answer" in took else "env_done")
        if self.beginning != before:
            self.episode.tool_errors += sum(o.error for o in observations)
            return self._begin(self.beginning)
        self.observe(observations)

    def observe(self, observations: list[Observation]) -> None:
        """Append what the world says, once per message. Its tokens are never trained on."""
        if not self.exchanges:
            raise RuntimeError("observe answers a message, and there is none yet: what comes before the first one belongs into the task")
        self.episode.tool_errors += sum(o.error for o in observations)
        closed = self.exchanges[-1][-1:] == [self.chat.end_id]  # not if it was cut, or ended by another stop token
        ids = self.chat.observation([o.text for o in observations], closed)
        free = self.context - self.max_new_tokens - len(self.prompt)  # what the prompt and the next message leave
        room = min(free // 2, free - len(self.exchanges[-1]))  # so no flood pushes out the message that caused it
        limit = 2000
        while len(ids) > room and limit > 20:
            limit //= 2
            ids = self.chat.observation([clip(o.text, limit) for o in observations], closed)
        self.exchanges[-1] += ids
        if len(self.segment.ids) + len(ids) + self.max_new_tokens <= self.context:
            self.segment.extend(ids, self.episode.turns - 1)
        else:
            self.full = True  # the turn is complete in `exchanges`; `_make_room` carries it into the next segment

    async def close(self) -> Episode:
        """Score the episode."""
        self.episode.reward, self.episode.behaviour = await self._ask(_score, self.env)
        self.episode.finish = self.episode.finish or "max_turns"  # a workflow that stopped by itself: its budget, not the task
        return self.episode

    @property
    def segment(self) -> Segment:
        """The window the policy is looking at."""
        return self.episode.segments[-1]

    def _begin(self, task: str) -> None:
        """Forget everything but this task: at the start, and whenever the environment begins anew (env.retry).

        The empty window is not opened before the policy is asked: an episode that ends here would have one without a message.
        """
        self.prompt = self.chat.prompt(task, self.schemas)
        self.exchanges: list[list[int]] = []  # ids of the whole turns in the window: a message and what it led to
        self.full = True

    def _open(self) -> None:
        """A new segment: the prompt, and the turns that stayed. They are not `sampled` here: each is trained where it was."""
        self.full = False
        self.episode.segments.append(Segment())
        self.segment.extend(self.prompt, turn=-1)
        for turn, ids in enumerate(self.exchanges, self.episode.turns - len(self.exchanges)):
            self.segment.extend(ids, turn)

    def _make_room(self) -> bool:
        """If the window is full, open a new segment from what stays: the prompt and the newest whole turns (memory.py)."""
        if not self.full and len(self.segment.ids) + self.max_new_tokens <= self.context:
            return True
        most = self.context - self.max_new_tokens
        if len(self.prompt) > most:
            return False
        # Down to half of the window, so that not every turn from here on opens a segment.
        budget = max(min(self.context // 2, most), len(self.prompt))
        leave = keep_turns(len(self.prompt), [len(x) for x in self.exchanges], budget)
        if 0 < leave == len(self.exchanges) and len(self.prompt) + len(self.exchanges[-1]) <= most:
            leave -= 1
        self.exchanges = self.exchanges[leave:]
        self._open()
        return True

    def _end(self, finish: str) -> None:
        self.episode.finish = finish


    async def _ask(self, question: Callable, *arguments) -> Any:
        """Run code of the environment in a thread, under the time limit. Other episodes go on.

        `question` says what it asks for before it asks: a WorldError names what failed or hung.
        """
        asked = ["thread"]

        def answer() -> Any:
            try:
                return question(asked.append, *arguments)
            except BaseException as e:  # sys.exit() too: this thread is the environment's
                raise WorldError(f"{asked[-1]}: {describe(e)}") from e

        future = in_thread(answer)
        try:
            await asyncio.wait({future}, timeout=self.tool_timeout)
            if not future.done():
                raise WorldError(f"{asked[-1]}: took longer than {self.tool_timeout:g} s")
            return future.result()
        except RuntimeError as e:  # the system gives no more threads
            raise WorldError(f"{asked[-1]}: {describe(e)}") from e
        finally:
            future.cancel()  # does nothing to one that is done


class WorldError(Exception):
    """An environment's own code failed, outside any tool call."""


# What an agent asks of an environment. What belongs together is one visit to a thread.


def _begin(asking: Callable[[str], None], env, seed: int) -> tuple[Any, str, str, str]:
    """The environment, made if need be and reset; its task, beginning and state."""
    asking("constructor")
    env = env() if callable(env) else env
    asking("reset")
    task = _text(env.reset(seed))
    return env, task, *_situation(asking, env)


def _situation(asking: Callable[[str], None], env) -> tuple[str, str]:
    asking("beginning")
    beginning = _text(getattr(env, "beginning", None) or "")
    asking("state")
    return beginning, _text(env.state)


def _look(asking: Callable[[str], None], env) -> tuple[bool, str, str]:
    """Is the task at its end? If not: its beginning and state."""
    asking("done")
    return (True, "", "") if env.done else (False, *_situation(asking, env))


def _score(asking: Callable[[str], None], env) -> tuple[float, dict[str, float]]:
    """Reward and behaviour."""
    asking("get_reward")
    reward = float(env.get_reward())
    # NaN too: after one of them, an update makes every weight of the model NaN.
    if not 0 <= reward <= 1:
        raise ValueError(f"the reward is {reward}, which is not in [0, 1]")
    asking("behaviour")
    return reward, {name: float(value) for name, value in getattr(env, "behaviour", {}).items()}


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"want text, not {type(value).__name__}")
    return value.encode("utf-8", "replace").decode("utf-8")  # half a character, which no tokenizer takes


# ----------------------------------------------------------------------------------------------------------------------
# Messages to tokens, once


CUT = "\ue000"  # a private character: text is cut here before it is tokenised, and the character itself is dropped
MARK = "\ue001"  # stands for an assistant's message when the template is asked what it puts behind one
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"  # else a run that is resumed tomorrow has other prompts

INSTRUCTIONS = """You can use the tools below. To call one, write
<tool_call>
{"name": "the tool", "arguments": {"argument": "value"}}
</tool_call>
and its result will follow. A message without a call is your final answer.

<tools>
%s
</tools>"""


class Chat:
    """A tokenizer's chat template as two functions: the ids of the first prompt, and the ids that follow a message.

    Nothing the policy sampled ever passes through the template. What follows a message is rendered behind a fixed stand-in
    for it, and cut off there (the trick is TRL's). Works with any template that marks the end of a turn with a token of its
    own; what a template cannot do (tools, the roles `tool` or `system`) is found out once, here, and said in plain text.
    Not prevented: where a template writes role headers in plain letters (Zephyr's `<|user|>`), text can imitate these.

    stop_ids: tokens that end a message and that the tokenizer does not know of, such as those of a
    model's generation_config. `chat.stop_ids` then has all that end one, for the engine.
    Raises ValueError if the tokenizer has no chat template, or none that marks the end of a turn.
    """

    def __init__(self, tokenizer, stop_ids: Iterable[int] = ()):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: an instruction-tuned model is needed")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        control = {i: t for i, t in added if len(t.content) > 1 and t.content.strip()}
        self._control_ids = set(control)
        longest_first = sorted((t.content for t in control.values()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Can other letters become a control token?
        self._normalises = any(t.normalized for t in control.values())
        empty = {"type": "object", "properties": {}}
        probe = {"type": "function", "function": {"name": MARK, "description": "", "parameters": empty}}
        user, assistant = {"role": "user", "content": "u"}, {"role": "assistant", "content": MARK}
        self._base = [user, assistant]
        self._template = TODAY + tokenizer.get_chat_template(tools=[probe])
        # Templates that ask for calls in another form (Llama 3, Qwen3-Coder) are not shown the tools: they get INSTRUCTIONS.
        native = self._try([user], tools=[probe])
        self._native_tools = all(x in native for x in (MARK, "<tool_call>", '"arguments"'))
        self._system = MARK in self._try([{"role": "system", "content": MARK}, user])
        self._role = "tool" if CUT in self._try([user, assistant, {"role": "tool", "content": CUT}]) else "user"
        tail = self._try(self._base).rpartition(MARK)[2]
        ends = [i for i in self._encode(tail) if i in self._control_ids]
        if not ends:
            raise ValueError("the chat template puts no control token behind an assistant's message, so a turn has no end")
        self.end_id, self._end = ends[0], tokenizer.added_tokens_decoder[ends[0]].content
        self.stop_ids = {self.end_id, *stop_ids} | ({tokenizer.eos_token_id} - {None})

    def prompt(self, task: str, schemas: list[dict]) -> list[int]:
        """Ids of everything before the first message of the policy: the tools, the task, the header of its turn."""
        messages = [{"role": "user", "content": self.plain(task)}]
        if schemas and not self._native_tools:
            system = INSTRUCTIONS % "\n".join(json.dumps(s["function"], ensure_ascii=False) for s in schemas)
            if self._system:
                messages.insert(0, {"role": "system", "content": system})
            else:
                messages[0]["content"] = system + "\n\n" + messages[0]["content"]
        return self._encode(self._render(messages, tools=schemas if self._native_tools else None, add_generation_prompt=True))

    def observation(self, texts: list[str], closed: bool = True) -> list[int]:
        """Ids from the end of the policy's message to the header of its next one. `closed`: it sampled the end token itself."""
        if self._role == "user":  # templates that have no tool role may also refuse two messages of the user in a row
            texts = ["\n".join(texts)]
        messages = self._base + [{"role": self._role, "content": self.plain(t)} for t in texts]
        ids = self._encode(self._render(messages, add_generation_prompt=True).partition(MARK)[2])
        return ids[ids.index(self.end_id) + 1 :] if closed else ids

    def decode(self, ids: list[int]) -> str:
        """The text of a sampled message, without the token that ended it."""
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids, clean_up_tokenization_spaces=False)

    def plain(self, text: str) -> str:
        """Text of the world, cut inside every control token it spells, so that `<|im_end|>` in a tool's result stays letters.

        Nothing else is changed: the template trims and quotes as ever, and harmless text gets the ids it always has.
        """
        text = text.replace(CUT, "").replace(MARK, "")
        text = self._control.sub(lambda m: m[0][0] + CUT + m[0][1:], text)
        left = self._control.search(text)  # one that overlapped another
        if left or self._normalises and self._control_ids.intersection(self._encode(text)):
            text = CUT.join(text)
        return text

    def _encode(self, text: str) -> list[int]:
        pieces = text.split(CUT)
        return [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False)]

    def _render(self, messages: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False, **options)

    def _try(self, messages: list[dict], **options) -> str:
        try:
            return self._render(messages, **options)
        except (TemplateError, TypeError, ValueError, LookupError):  # templates refuse roles by raising
            return ""


# ----------------------------------------------------------------------------------------------------------------------
# Stand-ins: an LLM that recites, a tokenizer made on the spot


class Script:
    """An LLM that recites given messages: how a demonstrator (env.py) passes through the very same loop as a policy.

    Raises ValueError if it is asked for more messages than it has, or if one is longer than `max_new_tokens`.
    """

    def __init__(self, chat: Chat, messages):
        self.chat, self.messages = chat, iter(messages)

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random, temperature: float) -> Completion:
        message = next(self.messages, None)
        if message is None:
            raise ValueError("the script is at its end, and the episode is not")
        ids = self.chat.tokenizer.encode(message, add_special_tokens=False) + [self.chat.end_id]
        if len(ids) > max_new_tokens:
            raise ValueError(f"a scripted message of {len(ids)} tokens is longer than max_new_tokens={max_new_tokens}")
        return Completion(ids, [0.0] * len(ids), "stop")


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def small_tokenizer(texts, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts` (any iterable of str), digits one by one, with the ChatML template.

    Any text can be written in it: what `texts` did not hold falls back to bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    # A blank belongs to the word before it. So names and numbers are the same tokens wherever they stand, right behind the word
    # that says what they are: copying a name is then copying a token, which a young model learns first. A JSON key is one token.
    pieces = r'[{\[]*"\p{Ll}[\p{Ll}_]*": "?|\p{Ll}[\p{Ll}_]* ?|\p{Lu}(?:\p{Ll}+|\p{N})?|\p{N}|[^\s\p{L}\p{N}]+ ?|\s'
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHATML)


def _demo() -> None:
    class Shop:
        state, done = "", False

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
            self.answer, self.done = answer, True

        def get_reward(self) -> float:
            return float(self.answer == "12")

    messages = [format_call("price"), '<tool_call>\n{"name": "price"}\n</tool_call>', "12"]
    tokenizer = small_tokenizer(messages + [INSTRUCTIONS, "What do pears cost? error: user assistant system tool coins"])
    episode = asyncio.run(Agent(Script(Chat(tokenizer), messages), Chat(tokenizer)).run(Shop()))
    segment = episode.segments[0]
    print(f"{'token':>16}    id  sampled  turn  logp   (the prompt but for its end is left out)")
    for i in range(segment.turn.count(-1) - 6, len(segment.ids)):
        sampled, logp = ("yes", f"{segment.logps[i]:.2f}") if segment.sampled[i] else ("-", "-")
        print(f"{tokenizer.decode(segment.ids[i])!r:>16}  {segment.ids[i]:>4}  {sampled:>7}  {segment.turn[i]:>4}  {logp:>4}")
    print("\n" + transcript(episode, tokenizer))


if __name__ == "__main__":
    _demo()
