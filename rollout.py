"""Many agents at once: from one context without a cache to an engine that serves all of them.

An agent asks the model for a message, runs a tool, and asks again with a longer context. Training
plays hundreds of such episodes: the rollouts. This file samples their tokens in four ways. Each
removes what is slow in the one before, and gives the same tokens (up to rounding):

    plain_generate     One context. Every new token sends the whole context through the model again.
    cached_generate    One context and a KV cache: the keys and values of tokens already computed.
                       Prefill computes the context once. Decode then computes one token at a time.
    batched_generate   Several contexts in one batch. A pass decodes a token for each of them. But
                       the batch runs until its longest message ends, and nothing new can join.
    Engine             Continuous batching. Requests join and leave between two passes, so nobody
                       waits for the longest message. Keys and values stay when a message has ended.

The first three stand above the line of ====. Stop there, and you know how a rollout is sampled.
The engine below it has five parts, in the order of the file:

    KVCache        The keys and values, in slots. A slot is room for one context.
    PrefixCache    Which tokens each slot holds. A slot keeps them when its message has ended, and a
                   request starts from the slot that holds the longest prefix of its context: the
                   agent's own last turn, or another agent's copy of the same prompt.
    Decoder        Its `step` admits requests to slots, prefills, and decodes one token of each. It
                   computes duplicate requests once: the attempts of a group begin with the same
                   prompt, and a trained policy often samples the same tokens.
    RejoinWindow   Optional. Rounding depends on which requests share a batch, and that depends on
                   the speed of tools. So before each step the engine waits a short time for the
                   agents it has just answered. If all ask again in time, a run repeats bit by bit.
    Engine         What agents call: `await engine.generate(ids, ...)`. Steps run in a second
                   thread, so agents and tools go on meanwhile.

`play` runs many episodes on one engine. Each episode has its own random numbers, so no episode
changes those of another. Only rounding depends on the neighbours: the last bits of a log-prob may
differ with the shape of the batch. In rare cases this changes a token.

Left out: paged memory, preemption, speculative decoding; top-k and top-p (a policy must be trained
on the distribution it was sampled from); models with sliding windows or recurrent layers
(`check_model` refuses them); Apple's GPUs, which have no float64. Agents of agent.py ask the
engine, and their episodes go to grpo.py. `python rollout.py` compares the four ways. To reuse this
file, copy agent.py, env.py, tools.py and memory.py, too.

Below the second line of ==== is the `Endpoint`: agents written elsewhere ask the engine over HTTP.
`python rollout.py --serve runs/NAME` serves a finished run, `--chat` talks with it.
"""

import argparse
import asyncio
import io
import json
import os
import re
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from operator import attrgetter
from pathlib import Path
from random import Random, SystemRandom
from secrets import token_urlsafe
from typing import Protocol

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from agent import (
    Chat,
    ChatMessage,
    ChatRequest,
    Completion,
    OutsideAgent,
    Recorder,
    Reply,
    RequestError,
    read_request,
)
from env import make_env
from tools import parse, run_calls, schema, tools_of

# --------------------------------------------------------------------------------------------------
# One request: sample a token, append it, repeat


def sample(logits, temperature, uniform) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from softmax(logits / temperature).

    `uniform` is a random number for each row. Add up the probabilities, from token 0 on. The first
    token at which the sum exceeds the number is drawn.

    logits [B, V], temperature [B], uniform [B] in [0, 1) -> tokens [B], log-probs [B].
    Temperature 0 means greedy: the most likely token, with its log-prob at temperature 1.

    >>> logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    >>> uniform = torch.tensor([0.9, 0.9], dtype=torch.float64)
    >>> sample(logits, torch.tensor([0.0, 1.0]), uniform)[0].tolist()
    [1, 2]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    greedy = temperature == 0
    divisor = temperature.masked_fill(greedy, 1.0).to(logits.dtype)  # [B]
    logps = torch.log_softmax(logits / divisor[:, None], dim=-1)  # [B, V]
    # In float64: a float32 sum of 150,000 probabilities loses the last ones to rounding.
    cumulative = logps.exp().cumsum(-1, dtype=torch.float64)  # [B, V]
    # The sum of all is 1 up to rounding, so scale the random number by it.
    threshold = uniform[:, None] * cumulative[:, -1:]  # [B, 1]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # [B]
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logps.argmax(-1), drawn)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


@dataclass(eq=False)
class Request:
    """A context to continue, and what has been sampled for it. It grows by a token at a time."""

    ids: list[int]  # the tokens of the context, then the sampled ones
    max_new_tokens: int
    stop_ids: set[int]  # each of them ends the message
    rng: Random  # the episode's own random stream
    temperature: float
    completion: Completion = field(init=False)  # the sampled tokens. `finish` is "" until the end

    def __post_init__(self):
        self.ids = list(self.ids)  # grows, unlike the list of the caller
        self.completion = Completion([], [], "")

    def append(self, token: int, logp: float) -> None:
        """Add a sampled token. A stop token, or the last one that is allowed, ends the message."""
        self.ids.append(token)
        self.completion.ids.append(token)
        self.completion.logps.append(logp)
        if token in self.stop_ids:
            self.completion.finish = "stop"
        elif len(self.completion.ids) >= self.max_new_tokens:
            self.completion.finish = "length"


def sample_next(requests: list[Request], logits: torch.Tensor) -> None:
    """Append one sampled token to each of R requests, whose next tokens have these logits [R, V].

    Each request draws from its own random stream, so its tokens do not depend on the others.
    """
    options = [[request.temperature, request.rng.random()] for request in requests]
    options = torch.tensor(options, dtype=torch.float64, device=logits.device)  # [R, 2]
    tokens, logps = sample(logits, *options.unbind(1))  # [R] each
    if logps.isnan().any():
        raise FloatingPointError("the model's logits are not finite: has the run diverged?")
    for request, token, logp in zip(requests, tokens.tolist(), logps.tolist()):
        request.append(token, logp)


@torch.inference_mode()
def plain_generate(model, ids: list[int], max_new_tokens: int, stop_ids: set[int], rng: Random,
                   temperature: float = 1.0) -> Completion:
    """Continue `ids` until a stop token or `max_new_tokens`. No cache: the reference for the rest.

    With T tokens of context and N new ones, about N * (T + N / 2) tokens go through the model.
    """
    request = Request(ids, max_new_tokens, stop_ids, rng, temperature)
    while not request.completion.finish:
        context = torch.tensor([request.ids], device=model.device)  # [1, T]
        logits = model(input_ids=context, use_cache=False).logits[:, -1]  # [1, V]
        sample_next([request], logits)
    return request.completion


@torch.inference_mode()
def cached_generate(model, ids: list[int], max_new_tokens: int, stop_ids: set[int], rng: Random,
                    temperature: float = 1.0) -> Completion:
    """The same tokens with a KV cache: only T + N - 1 tokens go through the model.

    The first pass is the prefill and takes the whole context. Each later pass decodes: it takes
    the one token that is new. A token attends to the keys and values of all tokens before it, and
    these never change, so they can be kept.
    """
    request = Request(ids, max_new_tokens, stop_ids, rng, temperature)
    cache, not_in_cache = DynamicCache(config=model.config), ids
    while not request.completion.finish:
        inputs = torch.tensor([not_in_cache], device=model.device)  # [1, T] at first, then [1, 1]
        logits = model(input_ids=inputs, past_key_values=cache).logits[:, -1]  # [1, V]
        sample_next([request], logits)
        not_in_cache = request.ids[-1:]
    return request.completion


# --------------------------------------------------------------------------------------------------
# Several requests in one batch: prefill all of them, then decode all of them


def pad_left(rows: list[list[int]], padding: int, device="cpu") -> torch.Tensor:
    """A rectangle of integers [B, T] from rows of different lengths.

    The padding is on the left, so the last column holds the last token of every row.

    >>> pad_left([[7, 8], [9]], padding=0).tolist()
    [[7, 8], [0, 9]]
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=device)


@torch.inference_mode()
def batched_generate(model, prompts: list[list[int]], max_new_tokens: int, stop_ids: set[int],
                     rngs: list[Random], temperature: float = 1.0) -> list[Completion]:
    """The same tokens for B contexts. Each pass computes one more token of every context.

    A pass reads all weights once. With few tokens, this takes most of its time. So a pass over B
    tokens costs little more than a pass over one. Two things waste time. A row that has ended still
    goes through the model, and still takes memory in the cache. And a new request waits until the
    longest message of the batch has ended.
    """
    requests = [Request(ids, max_new_tokens, stop_ids, rng, temperature)
                for ids, rng in zip(prompts, rngs)]
    inputs = pad_left(prompts, 0, model.device)  # [B, T] at first, then [B, 1]
    # 1 for a token, 0 for padding, which no token may attend to. [B, T], and a column more per pass
    mask = pad_left([[1] * len(ids) for ids in prompts], 0, model.device)
    cache = DynamicCache(config=model.config)
    running = list(range(len(requests)))  # the rows whose message has not ended
    while running:
        # The position of a token counts the tokens before it, without padding.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]  # like inputs
        logits = model(input_ids=inputs, attention_mask=mask, position_ids=positions,
                       past_key_values=cache).logits[:, -1]  # [B, V]
        sample_next([requests[row] for row in running], logits[running])
        running = [row for row in running if not requests[row].completion.finish]
        # A row that has ended repeats its last token. The result is not used.
        inputs = torch.tensor([request.ids[-1:] for request in requests], device=model.device)
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
    return [request.completion for request in requests]


# ==================================================================================================
# Continuous batching: the engine. It gives what `plain_generate` gives, up to rounding.
#
# Each row of a pass belongs to a slot of the KV cache. When its message ends, the slot goes to the
# next request, before the next pass. What happens to a request:
#
#     Engine.generate    adds it to `arrived`. The agent waits.
#     Decoder.step       `_admit` finds a slot and the longest prefix that is computed already.
#                        `_prefill` computes the rest of the context and samples the first token.
#     Decoder.step       `_sample` decodes one more token, in each step until the message ends.
#     Engine._serve      answers the agent.

# --------------------------------------------------------------------------------------------------
# The KV cache, in slots


class KVCache:
    """The keys and values of all slots, in the place of a transformers cache.

    Before a pass, `plan` says where its tokens are stored. In the pass, transformers calls `update`
    in each attention layer, and asks for the other attributes that its own caches have.
    """

    is_compileable = False

    def __init__(self, slots: int, context: int):
        self.slots, self.context = slots, context
        # Keys and values of each layer: [slots, context + 1, heads, size]. Padding is written to
        # the last position, which no token ever attends to.
        self.layers: list[list[torch.Tensor]] = []
        # What the next pass needs: the slot of each row [B], the positions of its tokens [B, T],
        # and how many positions of a slot these attend to.
        self.slot_of_row = self.positions = torch.empty(0, dtype=torch.int64)
        self.length, self.in_place = 0, False

    def plan(self, slot_of_row, positions, length: int) -> None:
        self.slot_of_row, self.positions, self.length = slot_of_row, positions, length
        self.in_place = slot_of_row.tolist() == list(range(len(slot_of_row)))

    def update(self, keys, values, layer_idx: int, *args, **kwargs) -> list[torch.Tensor]:
        """Store the new keys and values, each [B, heads, T, size].

        Returns all keys and values that these rows can attend to, each [B, heads, S, size]. S is
        the `length` of `plan`.
        """
        if layer_idx == len(self.layers):
            self.layers.append([self._room_for(new) for new in (keys, values)])
        for stored, new in zip(self.layers[layer_idx], (keys, values)):
            stored[self.slot_of_row[:, None], self.positions] = new.transpose(1, 2)
        return [self._of_rows(stored) for stored in self.layers[layer_idx]]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for layer in self.layers:
            for stored in layer:
                stored[target, :length] = stored[source, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def _of_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """[slots, context + 1, heads, size] -> [B, heads, S, size]"""
        used = stored[:, : self.length]
        # Rows that are the slots 0, 1, 2, ... in order are read in place. Any others are copied.
        rows = self.slot_of_row
        chosen = used[: len(rows)] if self.in_place else used.index_select(0, rows)
        return chosen.transpose(1, 2)

    def _room_for(self, new: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty memory: a masked value is multiplied by 0, and 0 * NaN is NaN.
        return new.new_zeros(self.slots, self.context + 1, new.shape[1], new.shape[3])


def forward(backbone, cache: KVCache, slot_of_row, tokens, positions, length: int) -> torch.Tensor:
    """Send tokens [B, T] through the model, at these positions [B, T] of these slots [B].

    Each token attends to the positions up to its own, of which there are at most `length`.
    Padding has position `cache.context`. Returns hidden states [B, T, D].
    """
    cache.plan(slot_of_row, positions, length)
    # A token must not attend to later positions. [B, 1, T, S]
    future = torch.arange(length, device=tokens.device) > positions[:, None, :, None]
    mask = torch.zeros(future.shape, dtype=backbone.dtype, device=tokens.device)
    mask.masked_fill_(future, -torch.inf)
    # Padding has a place in the cache, but no position in the text. The model gets 0 for it.
    position_ids = positions.masked_fill(positions == cache.context, 0)  # [B, T]
    return backbone(input_ids=tokens, position_ids=position_ids, attention_mask=mask,
                    past_key_values=cache, use_cache=True).last_hidden_state


# --------------------------------------------------------------------------------------------------
# The prefix cache: which tokens each slot holds

WORTH_WAITING = 16  # a request waits for a prefill if that saves at least so many tokens


@dataclass
class Prefix:
    """The longest part of a context whose keys and values are in a slot already."""

    source: int  # the slot that holds it
    length: int  # in tokens
    target: int  # the idle slot that the request takes. It can be the source


class PrefixCache:
    """Which tokens each slot holds, and which slots are idle.

    >>> cache = PrefixCache(slots=3, context=8)
    >>> cache.take(0, [5, 6, 7], length=0)  # a request, whose prefill computes three tokens
    >>> cache.extend(0, [5, 6, 7])
    >>> cache.release(0)  # its message has ended. The slot keeps the tokens
    >>> cache.find([5, 6, 7, 8])  # the same agent comes back: it goes on in slot 0
    Prefix(source=0, length=3, target=0)
    >>> cache.find([5, 6, 9])  # another agent: two tokens are copied to slot 1, idle for longer
    Prefix(source=0, length=2, target=1)
    """

    def __init__(self, slots: int, context: int):
        # tokens[slot]: the tokens it holds, or will hold at the end of this step. The rest is -1.
        # length[slot]: how many of them have keys and values in the KV cache already. The others
        # are promised: they are computed in this step. `find` waits for them if that saves enough.
        self.tokens = np.full((slots, context), -1)  # [slots, context]
        self.length = np.zeros(slots, dtype=np.int64)  # [slots]
        self.idle = list(range(slots))  # the one that was released first comes first

    def find(self, ids: list[int]) -> Prefix | None:
        """Find the longest prefix of a context, and an idle slot for it. Changes nothing.

        None: a prefill of this step computes a longer prefix, for another request. Wait for it.
        """
        # The last token is left out. It must go through the model, to predict the next one.
        promised = common_prefix(self.tokens, np.array(ids[:-1]))  # [slots]
        ready = np.minimum(promised, self.length)  # [slots]
        longest = int(ready.max())
        if promised.max() >= longest + WORTH_WAITING:
            return None  # if less would be saved, compute these tokens a second time
        # If an idle slot holds exactly this prefix, the request goes on there. Nothing is copied.
        for slot in self.idle:
            if ready[slot] == self.length[slot] == longest:
                return Prefix(slot, longest, slot)
        # Else it takes the slot that has been idle longest, and the prefix is copied there. So the
        # source keeps its other tokens, as their agent may come back. If the source itself has
        # been idle longest, source and target are the same slot, and its tokens are overwritten.
        return Prefix(int(ready.argmax()), longest, self.idle[0])

    def take(self, slot: int, ids: list[int], length: int) -> None:
        """An idle slot is in use from now on. The KV cache holds `length` of these tokens."""
        self.idle.remove(slot)
        self.tokens[slot, : len(ids)] = ids
        self.tokens[slot, len(ids) :] = -1
        self.length[slot] = length

    def extend(self, slot: int, ids: list[int]) -> None:
        """From now on the KV cache holds the keys and values of these tokens, too."""
        start, end = self.length[slot], self.length[slot] + len(ids)
        self.tokens[slot, start:end] = ids
        self.length[slot] = end

    def release(self, slot: int) -> None:
        """The slot is idle from now on. It keeps what it holds until another request takes it."""
        self.idle.append(slot)


def common_prefix(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How many leading tokens each row [R, L] has in common with `ids` [at most L]: [R].

    >>> common_prefix(np.array([[1, 2, 9], [1, 2, 3], [7, 2, 3]]), np.array([1, 2, 3])).tolist()
    [2, 3, 0]
    """
    differ = np.ones((len(rows), len(ids) + 1), dtype=bool)  # the last column ends the search
    differ[:, : len(ids)] = rows[:, : len(ids)] != ids
    return differ.argmax(1)


# --------------------------------------------------------------------------------------------------
# The decoder: admission, prefill, decode. Runs in the decoding thread

PREFILL_TOKENS = 4096  # most tokens in one pass of a prefill: bounds its memory


@dataclass(eq=False)
class AgentRequest(Request):
    """A request of an agent that waits for the answer."""

    agent: int  # its number. Requests are admitted in this order
    answered: asyncio.Future


class Decoder:
    """Each `step` adds a token to each request. Between steps, the event loop adds requests."""

    def __init__(self, model, slots: int, context: int, stats: Counter):
        self.model, self.stats = model, stats
        self.head_weight = model.get_output_embeddings().weight  # [V, D]
        self.fingerprint: list = []  # of the weights that made the keys and values
        self.cache = KVCache(slots, context)
        self.prefixes = PrefixCache(slots, context)
        self.waiting: list[AgentRequest] = []  # for a slot
        # The requests in each slot that is not idle: one, or duplicates, which share a slot for as
        # long as they sample the same tokens.
        self.active: dict[int, list[AgentRequest]] = {}

    def requests(self) -> list[AgentRequest]:
        """All requests that are not finished."""
        return self.waiting + [request for sharing in self.active.values() for request in sharing]

    @torch.inference_mode()
    def step(self) -> None:
        """Sample one token for every request in a slot, after a prefill of the new ones."""
        if not self.active and self._fingerprint() != self.fingerprint:
            self._start_afresh()
        # asyncio cancels the future together with the agent that waits for it.
        self.waiting = [request for request in self.waiting if not request.answered.cancelled()]
        # Before admission: `_prefill` samples the first token of a new request in this step, so it
        # must not decode a second one. In order: the cache can read slots 0, 1, 2, ... in place.
        decoding = sorted(self.active)
        # Until nothing can be admitted: a prefill computes prefixes that other requests wait for.
        while admitted := self._admit():
            self._prefill(admitted)
        if decoding:
            self._sample(decoding)
        self.stats["steps"] += 1

    # ---- Admission: find a prefix, take a slot ----

    def _admit(self) -> list[int]:
        """Give slots to waiting requests, as far as there is room. Returns these slots.

        Of new contexts with a common prefix only one is admitted at first. The others follow when
        its prefill has run, and copy the prefix.
        """
        admitted: dict[tuple[int, ...], int] = {}  # context: slot
        for request in self._next_waiting():
            context = tuple(request.ids)
            if context in admitted:
                self.active[admitted[context]].append(request)
            elif prefix := self.prefixes.find(request.ids):
                self._start([request], prefix)
                admitted[context] = prefix.target
                self.stats["prefill_tokens"] += len(context) - prefix.length
            else:
                continue  # until the longer prefix is computed
            self.waiting.remove(request)
            self.stats["prompt_tokens"] += len(context)
        return list(admitted.values())

    def _next_waiting(self) -> list[AgentRequest]:
        """The waiting requests that can be admitted now, in the order of their agents.

        Two duplicates use one slot now, and may need two after the next token. So at most as many
        requests as slots are admitted, and `_split` always finds an idle slot.
        """
        in_slots = sum(len(requests) for requests in self.active.values())
        return sorted(self.waiting, key=attrgetter("agent"))[: self.cache.slots - in_slots]

    def _start(self, requests: list[AgentRequest], prefix: Prefix) -> None:
        """Put requests with the same ids into a slot, and copy the prefix there."""
        if prefix.source != prefix.target:
            self.cache.copy(prefix.source, prefix.target, prefix.length)
        self.prefixes.take(prefix.target, requests[0].ids, prefix.length)
        self.active[prefix.target] = requests

    # ---- Prefill and decode. Both compute what a slot lacks, and sample the next token ----

    def _prefill(self, slots: list[int]) -> None:
        """Compute new contexts without the prefixes that are there, and sample a token for each.

        Long contexts go in pieces: one pass would need memory for rows times length squared. The
        last piece gives the logits of the first token.
        """
        piece = max(1, PREFILL_TOKENS // len(slots))
        while unfinished := [slot for slot in slots if len(self._lacking(slot)) > piece]:
            self._compute(unfinished, piece)  # afterwards the slots lack a piece less
        self._sample(slots)

    def _sample(self, slots: list[int]) -> None:
        """Compute the tokens that the slots lack, and sample the next token of each request.

        In decoding a slot lacks one token, the newest.
        """
        requests, row_of = [], []  # [R] each
        for row, slot in enumerate(slots):
            requests += self.active[slot]
            row_of += [row] * len(self.active[slot])
        logits = self._logits(self._compute(slots))  # [B, V]
        sample_next(requests, logits[row_of])
        self.stats["sampled_tokens"] += len(requests)
        for slot in slots:
            self._split(slot)

    def _split(self, slot: int) -> None:
        """Drop ended and cancelled requests. Give those that sampled different tokens own slots."""
        by_token: dict[int, list[AgentRequest]] = {}
        for request in self.active[slot]:
            if not (request.completion.finish or request.answered.cancelled()):
                by_token.setdefault(request.ids[-1], []).append(request)
        if not by_token:
            del self.active[slot]
            self.prefixes.release(slot)
            return
        # Requests that sampled the first token keep the slot. Those of each other token get a copy
        # of all keys and values. Only the token just sampled has none yet.
        self.active[slot], *others = by_token.values()
        for requests in others:
            length = int(self.prefixes.length[slot])
            self._start(requests, Prefix(slot, length, self.prefixes.idle[0]))

    # ---- The model ----

    def _lacking(self, slot: int) -> list[int]:
        """The tokens of a context whose keys and values are not in its slot yet."""
        return self.active[slot][0].ids[self.prefixes.length[slot] :]

    def _compute(self, slots: list[int], most: int | None = None) -> torch.Tensor:
        """Send the tokens that the slots lack through the model, at most `most` of each.

        Returns the hidden state of the last token of each [B, D].
        """
        tokens, positions = [], []
        for slot in slots:
            start, new = int(self.prefixes.length[slot]), self._lacking(slot)[:most]
            tokens.append(new)
            positions.append(list(range(start, start + len(new))))
            self.prefixes.extend(slot, new)
        self.stats.update(passes=1, computed_tokens=sum(map(len, tokens)))
        device = self.model.device
        hidden = forward(self.model.base_model, self.cache, torch.tensor(slots, device=device),
                         pad_left(tokens, 0, device),
                         pad_left(positions, self.cache.context, device),
                         length=int(self.prefixes.length[slots].max()))  # [B, T, D]
        return hidden[:, -1]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, V]"""
        return hidden.to(self.head_weight.dtype) @ self.head_weight.T

    def _fingerprint(self) -> list:
        """Differs after a change of the weights: where they are, their versions, a few of them."""
        weights = list(self.model.parameters())
        # Fused optimizers change numbers without counting a version.
        numbers = torch.cat([weight.detach().flatten()[:4] for weight in weights]).tolist()
        return [numbers, [(weight.data_ptr(), weight._version) for weight in weights]]

    def _start_afresh(self) -> None:
        """Forget all keys and values: they belong to other weights."""
        self.fingerprint = self._fingerprint()
        self.prefixes = PrefixCache(self.cache.slots, self.cache.context)
        # Logits in 16 bits would be rounded before the softmax, unlike those of the update.
        weight = self.model.get_output_embeddings().weight
        self.head_weight = weight.to(torch.promote_types(weight.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# The rejoin window: a short wait for agents whose tools are quick


class RejoinWindow:
    """Waits for agents that were just answered and may soon ask again.

    `away` holds these agents. An agent leaves it when it asks again or ends. When a wait reaches
    its time limit, all agents leave it.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds  # the longest wait before a step
        self.waited = 0.0  # the sum of all waits
        self.away: set[asyncio.Task] = set()  # the agents to wait for
        self.all_back: asyncio.Future | None = None  # during a wait

    def expect(self, task: asyncio.Task) -> None:
        """Wait for this agent, unless it ends."""
        if self.seconds and task not in self.away:
            self.away.add(task)
            task.add_done_callback(self.stop_expecting)

    def stop_expecting(self, task: asyncio.Task) -> None:
        """The agent asks again, or it has ended."""
        task.remove_done_callback(self.stop_expecting)
        self.away.discard(task)
        if self.all_back and not self.all_back.done() and not self.away:
            self.all_back.set_result(None)

    async def wait(self) -> None:
        """Return when all agents are back, or when the time is over."""
        await asyncio.sleep(0)  # agents that were just answered run first
        if not self.away:
            return
        began, self.all_back = time.perf_counter(), asyncio.get_running_loop().create_future()
        await asyncio.wait([self.all_back], timeout=self.seconds)
        self.away.clear()  # an agent that is late is not waited for a second time
        self.waited += time.perf_counter() - began


# --------------------------------------------------------------------------------------------------
# The engine: requests come, answers go. Runs in the event loop of the agents

# One thread decodes for all engines. torch gives each thread that calls it helper threads of its
# own, and several sets of these would compete for the cores.
DECODING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")

# An agent's number among those of `play`. Requests are admitted in this order, in every run. All
# agents written elsewhere have the number 0: they are admitted as they come.
AGENT: ContextVar[int] = ContextVar("agent", default=0)


class Engine:
    """Continuous batching over `slots` contexts of at most `context` tokens each.

    stop_ids: the tokens that end a message. rejoin_window: how many seconds the engine waits, at
    most, before a step. 0: it does not wait.

    When no request is in a slot, the engine notices whether the weights have changed in place, as
    an optimizer changes them. Then it forgets all keys and values.

    `stats` counts since the engine was made: steps; passes through the model; prompt_tokens, the
    tokens of all contexts; prefill_tokens, those of them that a prefill computes, because no slot
    holds them; computed_tokens, all tokens sent through the model; sampled_tokens;
    abandoned_tokens, those of them whose agent was cancelled before it got the message.
    `window.waited` is the time spent in the rejoin window, in seconds.
    Raises ValueError for a model whose log-probs it would get wrong.
    """

    def __init__(self, model, stop_ids: set[int], *, slots: int = 64, context: int = 1024,
                 rejoin_window: float = 0.0):
        check_model(model)
        self.model, self.stop_ids = model, stop_ids
        self.slots, self.context = slots, context
        self.stats: Counter = Counter()
        self.window = RejoinWindow(rejoin_window)
        self.new_decoder = partial(Decoder, model, slots, context, self.stats)
        self.decoder: Decoder = self.new_decoder()
        # During a step the decoder belongs to its thread. What comes meanwhile is kept here.
        self.arrived: list[AgentRequest] = []
        self.server: asyncio.Task | None = None  # runs `_serve`

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random,
                       temperature: float = 1.0) -> Completion:
        """Continue `ids` until a stop token or `max_new_tokens`.

        Raises ValueError if that cannot fit the context, and whatever a failing step raises.
        """
        if not ids or max_new_tokens < 1 or len(ids) + max_new_tokens > self.context:
            raise ValueError(f"{len(ids)} tokens and {max_new_tokens} new ones: want at least one "
                             f"of each, and together at most the context of {self.context}")
        answered = asyncio.get_running_loop().create_future()
        request = AgentRequest(ids, max_new_tokens, self.stop_ids, rng, temperature, AGENT.get(),
                               answered)
        self._start_server()
        self.arrived.append(request)
        self.window.stop_expecting(asyncio.current_task())
        try:
            await answered
        except asyncio.CancelledError:
            if not answered.cancelled():  # the message was complete
                self.stats["abandoned_tokens"] += len(request.completion.ids)
            raise
        self.window.expect(asyncio.current_task())
        return request.completion

    async def drain(self) -> None:
        """Wait until no request is left. Those whose agents were cancelled are dropped soon."""
        if self.server:
            await self.server

    def forget(self) -> None:
        """Forget all keys and values when next a step begins with no request in a slot."""
        self.decoder.fingerprint = []

    # ---- The server: a task that runs steps for as long as there are requests ----

    def _start_server(self) -> None:
        """Start a server in this event loop, unless one runs."""
        loop = asyncio.get_running_loop()
        if self.server and not self.server.done():
            if self.server.get_loop() is loop:
                return
            self._reset()  # another event loop was abandoned in the middle
        self.server = loop.create_task(self._serve(self.decoder))

    async def _serve(self, decoder: Decoder) -> None:
        """Run steps for as long as there are requests, and the decoder is the engine's."""
        loop = asyncio.get_running_loop()
        requests: list[AgentRequest] = []  # of the last step
        try:
            await self.window.wait()
            # `_reset` replaces the engine's decoder after a failed step, or if the agents run in a
            # new event loop. Then this server has nothing left to do.
            while decoder is self.decoder and (self.arrived or decoder.requests()):
                decoder.waiting += self.arrived
                self.arrived = []
                requests = decoder.requests()
                await loop.run_in_executor(DECODING, decoder.step)
                unfinished = set(decoder.requests())
                self._answer([request for request in requests if request not in unfinished])
                await self.window.wait()
        except BaseException as error:
            if decoder is self.decoder:
                self._fail(requests + self.arrived, error)
            if not isinstance(error, Exception):
                raise

    def _answer(self, ended: list[AgentRequest]) -> None:
        """Let the agents of these requests go on, as far as they still wait."""
        for request in ended:
            if request.answered.done():  # its agent was cancelled
                self.stats["abandoned_tokens"] += len(request.completion.ids)
            else:
                request.answered.set_result(None)

    def _fail(self, requests: list[AgentRequest], error: BaseException) -> None:
        """Raise the error in all agents that wait."""
        for request in requests:
            if not request.answered.done():
                request.answered.set_exception(error)
        self._reset()

    def _reset(self) -> None:
        """Start anew after a failure: what the slots hold is unknown."""
        self.arrived, self.decoder = [], self.new_decoder()
        self.window.away.clear()


def play(starts: list[Callable[[], Coroutine]], at_once: int, engine: Engine | None = None,
         endpoint: "Endpoint | None" = None) -> list:
    """Run many episodes, at most `at_once` at a time. Raises the first failure.

    starts: functions that make an agent's coroutine, as `lambda: Agent(...).run(env, seed)` does.
    engine: is told of each agent that begins, so the rejoin window includes the first message.
    endpoint: serves meanwhile.
    Returns results in the order of `starts`.

    >>> async def episode():
    ...     return "done"
    >>> play([episode, episode], at_once=2)
    ['done', 'done']
    """

    async def play_all() -> list:
        places = asyncio.Semaphore(at_once)

        async def play_one(number: int, start: Callable[[], Coroutine]):
            async with places:
                AGENT.set(number)
                if engine:
                    engine.window.expect(asyncio.current_task())
                return await start()

        async with endpoint or nullcontext():
            results = await asyncio.gather(*(play_one(*pair) for pair in enumerate(starts)))
        if engine:
            await engine.drain()
        return results

    return asyncio.run(play_all())


# --------------------------------------------------------------------------------------------------
# Models: which ones can be used, and a small one


def check_model(model) -> None:
    """Raise ValueError unless the engine and grpo.py get this model's log-probs right.

    Both need logits that are the head times the last hidden states, and layers that need nothing
    but the keys and values of all earlier tokens.
    """
    try:
        obstacle = _known_obstacle(model) or _measured_obstacle(model)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        obstacle = f"{type(error).__name__}: {error}"  # a model of another make
    if obstacle:
        raise ValueError(f"{type(model).__name__} cannot be used here: {obstacle}")


def _known_obstacle(model) -> str:
    """What the configuration says is in the way, or ""."""
    config = model.config.get_text_config()
    window = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    kinds = set(getattr(config, "layer_types", None) or window)
    if kinds - {"full_attention"}:
        return f"its layers are of the kind {', '.join(sorted(kinds))}"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "its head has a bias"
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are capped"
    return ""


@torch.no_grad()
def _measured_obstacle(model) -> str:
    """Compares eight tokens in two passes through a slot with one plain pass."""
    head = model.get_output_embeddings().weight  # [V, D]
    positions = torch.arange(8, device=head.device)[None]  # [1, 8]
    tokens, slot = positions % len(head), positions[0, :1]
    through_slot = partial(forward, model.base_model, KVCache(slots=1, context=8), slot)
    first = through_slot(tokens[:, :5], positions[:, :5], length=5)  # [1, 5, D]
    second = through_slot(tokens[:, 5:], positions[:, 5:], length=8)  # [1, 3, D]
    ours = (torch.cat([first, second], 1) @ head.T).float()  # [1, 8, V]
    theirs = model(input_ids=tokens).logits.float()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    agree = (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    return "" if agree else "its logits are not its head times its last hidden states"


def small_model(vocab_size: int, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.7 million random parameters. The same seed gives the same weights.

    Two layers are enough to find an earlier copy of the newest token and repeat what followed it.

    >>> sum(p.numel() for p in small_model(1024).parameters())
    656064
    """
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, head_dim=16, intermediate_size=512, tie_word_embeddings=True,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        # At first each head copies what it attends to. Training mostly learns where to attend.
        for layer in model.model.layers:
            values, out = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
            out.copy_(0.2 * torch.nn.init.orthogonal_(values).T)
    return model


# ==================================================================================================
# The endpoint: agents written elsewhere ask the engine over HTTP, as they would ask OpenAI.
# Training needs none of this: skip it on first reading.
#
# Such a client knows one thing of its own only: the URL that it was given. So each episode has its
# own URL, and the object that answers there is its *session*. What happens to a request:
#
#     OutsideAgent._solve       opens a URL, and gives it to the agent
#     Endpoint._connect         reads the request: `_read`, `read_request`
#     Endpoint._dispatch        finds the session of the URL
#     OutsideAgent.answer       samples: Recorder.sample, Engine.generate
#     openai_json               turns the reply into the JSON of OpenAI

MOST_BYTES = 4_000_000  # of a request's body
MOST_CONNECTIONS = 256
MOST_SECONDS = 30.0  # to send a request, and to read the response
LOOPBACK = ("127.0.0.1", "localhost")
SAMPLING_OPTIONS = {"temperature", "top_p", "top_k", "seed", "logit_bias", "presence_penalty",
                    "frequency_penalty"}


class Session(Protocol):
    """Who replies to the requests for one URL, such as agent.OutsideAgent."""

    async def answer(self, request: ChatRequest) -> list[Reply]: ...


class Endpoint:
    """An OpenAI-compatible server: POST .../chat/completions and GET .../models.

    It listens on this machine only, unless `host` is its address in a network. A URL is random, so
    no stray request reaches an episode. Clients are slow to make, and some libraries keep one for
    each URL. So an agent that ended and left nothing running gives its URL back, and `opened` uses
    it again.

    Use it in `async with`, in the event loop of the agents. Each connection takes one request:
    a client must not keep a connection for the next event loop.
    """

    def __init__(self, port: int = 0, host: str = LOOPBACK[0]):
        self.listening = socket.create_server((host, port), backlog=MOST_CONNECTIONS)
        port = self.listening.getsockname()[1]  # 0 means: any that is free
        self.address = f"http://{host}:{port}"
        self.hosts = {f"{name}:{port}" for name in (*LOOPBACK, host)}
        self.sessions: dict[str, Session] = {}  # by path
        self.free_urls: list[str] = []  # to use again
        # The task of each connection, the oldest first. True: it waits for a session's reply.
        self.connections: dict[asyncio.Task, bool] = {}
        self.said: set[str] = set()
        # A proxy cannot reach this machine's loopback. Of both variables, small letters win.
        direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        if direct != "*" and not direct.endswith(",".join(LOOPBACK)):
            direct = ",".join([*filter(None, [direct]), *LOOPBACK])
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = direct

    async def __aenter__(self) -> "Endpoint":
        self.http = await asyncio.start_server(self._connect, sock=self.listening.dup())
        return self

    async def __aexit__(self, *error) -> None:
        self.http.close()
        for connection in self.connections:
            connection.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    @contextmanager
    def opened(self, session: Session) -> Iterator[str]:
        """A base_url for this session, while the block runs."""
        new = f"{self.address}/{token_urlsafe(16)}/v1"
        url = self.free_urls.pop() if self.free_urls else new
        path = url.removeprefix(self.address)
        self.sessions[path] = session
        try:
            yield url
        finally:
            del self.sessions[path]

    def release(self, url: str) -> None:
        """This URL may be used again."""
        self.free_urls.append(url)

    def say_once(self, topic: str, text: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            print(text, file=sys.stderr)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections[asyncio.current_task()] = False
        if len(self.connections) > MOST_CONNECTIONS:
            self._drop_oldest()
        try:
            response = await self._respond(reader)
            self.connections[asyncio.current_task()] = False
            writer.write(response)
            writer.write_eof()
            async with asyncio.timeout(MOST_SECONDS):
                await writer.drain()
                # To close a connection with unread data would also discard the response.
                while await reader.read(2**16):
                    pass
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the client has gone or does not read, or the episode has ended
        finally:
            self.connections.pop(asyncio.current_task(), None)
            writer.transport.abort()

    def _drop_oldest(self) -> None:
        """End the connection that has been sending or reading for longest."""
        oldest = next((task for task, waits in self.connections.items() if not waits), None)
        if oldest:
            del self.connections[oldest]
            oldest.cancel()

    async def _respond(self, reader: asyncio.StreamReader) -> bytes:
        """Read one request. Returns the whole response."""
        try:
            async with asyncio.timeout(MOST_SECONDS):
                method, path, body = await self._read(reader)
            return await self._dispatch(method, path, body)
        except RequestError as e:
            return _error(e.status, str(e))
        except TimeoutError:
            return _error(408, "the request took too long")
        except Exception:  # the session raises it in the run; the client gets no details
            return _error(500, "the server failed")

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
        """(method, path, body). Raises RequestError."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")  # of at most 64 KiB
            line, _, rest = head.partition(b"\r\n")
            method, path, _ = line.decode("ascii").split(" ")
            headers = parse_headers(io.BytesIO(rest))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, HTTPException,
                ValueError) as e:
            raise RequestError("this is not an HTTP request") from e
        # A web page in a browser must not reach this server, not even under another host name.
        if headers.get("Host", "") not in self.hosts or headers.get("Origin"):
            raise RequestError("only programs on this machine may ask", 403)
        length = headers.get("Content-Length", "0")
        if "Transfer-Encoding" in headers or not re.fullmatch("[0-9]{1,9}", length):
            raise RequestError("want a Content-Length", 411)
        if int(length) > MOST_BYTES:
            raise RequestError(f"the body has more than {MOST_BYTES:,} bytes", 413)
        try:
            return method, path, await reader.readexactly(int(length))
        except asyncio.IncompleteReadError as e:
            raise RequestError("the body is shorter than its Content-Length") from e

    async def _dispatch(self, method: str, path: str, body: bytes) -> bytes:
        # "/KEY/v1/chat/completions": the session "/KEY/v1". A served run has "/v1".
        base, _, rest = path.partition("/v1/")
        session = self.sessions.get(base + "/v1")
        if session is None:
            raise RequestError(f"there is no {path[:80]}, or its episode has ended", 404)
        if (method, rest) == ("GET", "models"):
            return _json({"object": "list", "data": [{"id": "policy", "object": "model"}]})
        if (method, rest) != ("POST", "chat/completions"):
            raise RequestError("want POST /v1/chat/completions or GET /v1/models", 404)
        try:
            asked = json.loads(body)
            request = read_request(asked)
        except (ValueError, RecursionError) as e:
            raise RequestError("the body is not JSON, or is nested too deeply") from e
        if isinstance(session, OutsideAgent) and asked.keys() & SAMPLING_OPTIONS:
            self.say_once("sampling", "the agent's temperature, top_p and the like are not used: "
                          "the policy is trained on the distribution it is sampled from")
        self.connections[asyncio.current_task()] = True
        answer = openai_json(await session.answer(request), request.messages)
        return _events(answer, asked) if asked.get("stream") else _json(answer)


def openai_json(replies: list[Reply], messages: list[ChatMessage]) -> dict:
    """The JSON that OpenAI's API returns for a chat completion."""
    before = sum(len(message.calls) for message in messages)  # ids of calls count on from these
    choices = []
    for index, reply in enumerate(replies):
        # Null only beside calls, as in the API: agents take the text of any other message.
        text = reply.message.text or (None if reply.message.calls else "")
        message: dict = {"role": "assistant", "content": text}
        if reply.thinking:
            message["reasoning_content"] = reply.thinking
        if reply.message.calls:
            message["tool_calls"] = [
                {"id": f"call_{number}", "type": "function",
                 "function": {"name": call.name, "arguments": call.arguments}}
                for number, call in enumerate(reply.message.calls, before + 1)]
        choices.append({"index": index, "message": message, "finish_reason": reply.finish,
                        "logprobs": None})
    read = sum(reply.prompt_tokens for reply in replies)
    sampled = sum(reply.sampled_tokens for reply in replies)
    usage = {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}
    return {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "policy",
            "choices": choices, "usage": usage}


def _events(answer: dict, asked: dict) -> bytes:
    """The same answer for `stream`: each whole message as one event."""
    shared = {**answer, "object": "chat.completion.chunk"}
    usage = shared.pop("usage")
    chunks = []
    for choice in answer["choices"]:
        delta = dict(choice["message"])
        if "tool_calls" in delta:
            delta["tool_calls"] = [{**call, "index": place}
                                   for place, call in enumerate(delta["tool_calls"])]
        whole = {**choice, "delta": delta}
        whole.pop("message")
        chunks.append({**shared, "choices": [whole]})
    options = asked.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        chunks.append({**shared, "choices": [], "usage": usage})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    return _http(200, "text/event-stream", "".join(lines).encode())


def _json(value: dict, status: int = 200) -> bytes:
    return _http(status, "application/json", json.dumps(value).encode())


def _error(status: int, message: str) -> bytes:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _json({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def _http(status: int, kind: str, body: bytes) -> bytes:
    head = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")
    return head.encode() + body


# --------------------------------------------------------------------------------------------------
# A finished run: python rollout.py --serve runs/NAME, or --chat runs/NAME


class FinishedRun:
    """The model of a run, to serve or to chat with. Nothing is recorded."""

    def __init__(self, run: Path):
        config = json.loads((run / "run.json").read_text())["config"]
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
        self.chat = make_chat(model, AutoTokenizer.from_pretrained(run / "model"))
        self.envs, self.context = config["env"], config["context"]
        self.max_new_tokens = config["max_new_tokens"]
        self.engine = Engine(model, self.chat.stop_ids, slots=16, context=self.context)

    async def answer(self, request: ChatRequest) -> list[Reply]:
        """For an Endpoint, which finds no other session at this URL."""
        samples = [self.sample(request) for _ in range(request.number)]
        try:
            return await asyncio.gather(*samples)
        except RequestError:
            raise
        except Exception:  # the client gets no details, so show them here
            traceback.print_exc()
            raise

    async def sample(self, request: ChatRequest) -> Reply:
        recorder = Recorder(self.engine, self.chat, [], max_new_tokens=self.max_new_tokens,
                            context=self.context, seed=SystemRandom().getrandbits(64))
        return await recorder.sample(request, request.temperature, turn=0)


def make_chat(model, tokenizer) -> Chat:
    """With all tokens that end a message: Llama 3 has several, and its tokenizer knows one.

    Raises ValueError if the tokenizer has no usable chat template.
    """
    ends = model.generation_config.eos_token_id
    return Chat(tokenizer, set(ends if isinstance(ends, list) else [ends]) - {None})


async def serve(run: FinishedRun, port: int, host: str) -> None:
    """An OpenAI-compatible server until Ctrl-C."""
    async with Endpoint(port, host) as endpoint:
        endpoint.sessions["/v1"] = run
        print(f"base_url {endpoint.address}/v1 (any api_key; Ctrl-C stops it)")
        await asyncio.Event().wait()


async def talk(run: FinishedRun) -> None:
    """A chat in the terminal, with the tools of the run's first environment."""
    env = make_env(run.envs[0])()
    task, messages = env.reset(SystemRandom().getrandbits(32)), []
    tools = {name: tool for name, tool in tools_of(env).items() if name != "final_answer"}
    schemas = [schema(tool) for tool in tools.values()]
    print(f"Tools: {', '.join(tools) or 'none'}. An empty line asks: {task}")
    while True:
        messages.append(ChatMessage("user", input("you> ") or task))
        while messages and (messages[-1].role != "assistant" or messages[-1].calls):
            reply = await run.sample(ChatRequest(messages, schemas))
            if reply.thinking:
                print(f"(thinks) {reply.thinking}")
            print(f"policy> {reply.message.text}" + (" [cut]" if reply.finish == "length" else ""))
            if not reply.sampled_tokens:
                print("(the context is full: the conversation begins anew)")
                messages.clear()
                break
            messages.append(reply.message)
            for call in reply.message.calls:
                written = parse(f"<tool_call>{call.as_json()}</tool_call>", schemas).calls
                [observation] = await run_calls(written, tools)
                print(f"tool> {call.name} {call.arguments} -> {observation.text}")
                messages.append(ChatMessage("tool", observation.text))


# --------------------------------------------------------------------------------------------------
# python rollout.py


def demo(agents: int = 8) -> None:
    """The same messages in all four ways, and how fast each of them is."""
    model, stop_ids, prompt = small_model(1024), set(range(16)), list(range(100, 300))
    engine = Engine(model, stop_ids, slots=agents, context=512)

    def one_by_one(generate) -> list[Completion]:
        return [generate(model, prompt, 64, stop_ids, Random(n)) for n in range(agents)]

    prompts, rngs = [prompt] * agents, [Random(n) for n in range(agents)]
    asks = [partial(engine.generate, prompt, 64, rng=Random(n)) for n in range(agents)]
    ways = {"plain_generate": partial(one_by_one, plain_generate),
            "cached_generate": partial(one_by_one, cached_generate),
            "batched_generate": partial(batched_generate, model, prompts, 64, stop_ids, rngs),
            "Engine": partial(play, asks, agents)}
    print(f"{agents} messages, one prompt of {len(prompt)} tokens, the same tokens in four ways:")
    expected = one_by_one(cached_generate)  # untimed: torch is slow in its first pass
    sampled = sum(len(message.ids) for message in expected)
    for name, way in ways.items():
        start = time.perf_counter()
        found = way()
        seconds = time.perf_counter() - start
        if [a.ids for a in found] != [b.ids for b in expected]:
            raise AssertionError(f"{name} samples other tokens")
        print(f"  {name:18}{sampled / seconds:7,.0f} sampled tokens per second")


def command_line() -> None:
    parser = argparse.ArgumentParser(description="Without options: compare four ways to sample.")
    parser.add_argument("--serve", metavar="RUN", type=Path, help="serve the model of a run")
    parser.add_argument("--chat", metavar="RUN", type=Path, help="chat with the model of a run")
    parser.add_argument("--port", type=int, default=8000, help="for --serve")
    parser.add_argument("--host", default=LOOPBACK[0], help="for --serve: this machine's address "
                        "in a network (default: this machine only)")
    options = parser.parse_args()
    if not (options.serve or options.chat):
        return demo()
    disable_progress_bar()
    try:
        run = FinishedRun(options.serve or options.chat)
        asyncio.run(serve(run, options.port, options.host) if options.serve else talk(run))
    except (OSError, LookupError, ValueError, RequestError) as e:
        print(f"rollout.py: {e}", file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    command_line()
