"""Many agents at once: one engine that generates tokens for all of them.

An agent asks the model for a message, runs a tool, and asks again with a longer context. Training
plays hundreds of such episodes. This file generates their tokens in three steps, each faster:

    plain_generate    One context. Every new token sends the whole context through the model again.
    cached_generate   One context and a KV cache: the keys and values of tokens already computed.
                      Prefill computes the context once. Decode then computes one token at a time.
    Engine            Many contexts. One pass through the model decodes a token for each of them.

What the engine adds to `cached_generate`:

    slots                 The KV cache has room for a fixed number of contexts. The room for one
                          context is a slot.
    prefix cache          A slot keeps its keys and values when its message is finished. A request
                          starts from the slot that holds the longest prefix of its context: the
                          agent's own last turn, or another agent's copy of the same prompt.
    duplicate requests    The attempts of a group begin with the same prompt, and a trained policy
                          often samples the same tokens. The engine computes equal contexts once.
    continuous batching   Requests join and leave between two passes. A finished message frees its
                          slot at once, and nobody waits for the longest message of a batch.
    random streams        Each episode samples with its own random numbers. Its tokens do not
                          depend on the episodes beside it.
    decoding thread       Passes run in a second thread, so agents and tools are never blocked.
    rejoin window         Optional. Before each pass the engine waits a short time for the agents
                          it has just answered. The same requests then always share a pass, and
                          a run can be repeated bit by bit.

Left out: paged memory, preemption, speculative decoding; top-k and top-p (a policy must be trained
on the distribution it was sampled from); models with sliding windows or recurrent layers
(`check_model` refuses them). Takes a transformers causal model. Serves agent.py, whose episodes go
to grpo.py. `python rollout.py` compares `plain_generate` with the engine. To reuse this file, copy
agent.py and its imports, too.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from random import Random

import numpy as np
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from agent import Completion

# --------------------------------------------------------------------------------------------------
# One context: sample a token, append it, repeat


def sample(logits, temperature, uniform) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row: the first whose cumulative probability exceeds `uniform`.

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
    threshold = uniform[:, None] * cumulative[:, -1:]  # [B, 1]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # [B]
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logps.argmax(-1), drawn)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def sample_one(logits: torch.Tensor, rng: Random, temperature: float) -> tuple[int, float]:
    """`sample` for one row of logits [1, V], with the next number of a random stream."""
    options = torch.tensor([[temperature], [rng.random()]], dtype=torch.float64)
    token, logp = sample(logits, *options.to(logits.device))
    return token.item(), logp.item()


@torch.inference_mode()
def plain_generate(model, ids: list[int], max_new_tokens: int, stop_ids: set[int], rng: Random,
                   temperature: float = 1.0) -> Completion:
    """Continue `ids` until a stop token or `max_new_tokens`. No cache: the reference for the rest.

    With T tokens of context and N new ones, about N * (T + N / 2) tokens go through the model.
    """
    new_ids, logps = [], []
    while len(new_ids) < max_new_tokens:
        context = torch.tensor([ids + new_ids], device=model.device)  # [1, T]
        logits = model(input_ids=context, use_cache=False).logits[:, -1]  # [1, V]
        token, logp = sample_one(logits, rng, temperature)
        new_ids.append(token)
        logps.append(logp)
        if token in stop_ids:
            return Completion(new_ids, logps, "stop")
    return Completion(new_ids, logps, "length")


@torch.inference_mode()
def cached_generate(model, ids: list[int], max_new_tokens: int, stop_ids: set[int], rng: Random,
                    temperature: float = 1.0) -> Completion:
    """The same tokens with a KV cache: only T + N - 1 tokens go through the model.

    The first pass is the prefill and takes the whole context. Each later pass decodes: it takes
    the one token that is new. A token attends to the keys and values of all tokens before it, and
    these never change, so they can be kept.
    """
    cache, not_in_cache = DynamicCache(config=model.config), ids
    new_ids, logps = [], []
    while len(new_ids) < max_new_tokens:
        inputs = torch.tensor([not_in_cache], device=model.device)  # [1, T], then [1, 1]
        logits = model(input_ids=inputs, past_key_values=cache).logits[:, -1]  # [1, V]
        token, logp = sample_one(logits, rng, temperature)
        new_ids.append(token)
        logps.append(logp)
        if token in stop_ids:
            return Completion(new_ids, logps, "stop")
        not_in_cache = [token]
    return Completion(new_ids, logps, "length")


# ==================================================================================================
# Many contexts: the engine. Its tokens and log-probs are those of `plain_generate`

PREFILL_TOKENS = 4096  # most tokens in one pass of a prefill: bounds its memory
WORTH_WAITING = 16  # a request waits one batch for a prefix if that saves this many tokens

# One thread decodes for all engines: each thread that runs torch operations keeps helper threads.
DECODING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")

# An agent's number among those of `play`. Requests are admitted in this order, in every run.
AGENT: ContextVar[int] = ContextVar("agent", default=0)


@dataclass(eq=False)
class Request:
    """A context to continue. It grows by one sampled token per step."""

    ids: list[int]  # the prompt (the context as given), then the tokens sampled so far
    max_new_tokens: int
    rng: Random  # the episode's own random stream
    temperature: float
    agent: int  # its number
    answered: asyncio.Future  # the agent waits for this
    completion: Completion  # what was sampled so far; `finish` is "" until the end


@dataclass(eq=False)
class Row:
    """One row of a batch: a slot, and the requests that are continued in it.

    Duplicate requests share a row for as long as they sample the same tokens.
    """

    slot: int
    requests: list[Request]  # one or more, all with the same ids

    @property
    def ids(self) -> list[int]:
        return self.requests[0].ids


# --------------------------------------------------------------------------------------------------
# The KV cache, in slots


class SlotCache:
    """Keys and values of all slots, with the interface that transformers expects of a cache.

    A pass begins with `plan`, which says where its tokens belong. Then each attention layer calls
    `update`.
    """

    is_compileable = False  # transformers asks

    def __init__(self, slots: int, context: int):
        self.slots, self.context = slots, context
        # Keys and values of each layer: [slots, context + 1, heads, size]. Padding is written to
        # the last position, which no token ever attends to.
        self.layers: list[list[torch.Tensor]] = []
        # Of the next pass: the slot of each row [B], the positions of its tokens [B, T], and how
        # many positions of a slot these attend to.
        self.rows = self.positions = torch.empty(0, dtype=torch.int64)
        self.length, self.in_place = 0, False

    def plan(self, rows, positions, length: int) -> None:
        self.rows, self.positions, self.length = rows, positions, length
        self.in_place = rows.tolist() == list(range(len(rows)))

    def update(self, keys, values, layer_idx: int, *args, **kwargs) -> list[torch.Tensor]:
        """Store new keys and values [B, heads, T, size]. Return the rows' [B, heads, S, size]."""
        if layer_idx == len(self.layers):
            self.layers.append([self._room_for(new) for new in (keys, values)])
        for stored, new in zip(self.layers[layer_idx], (keys, values)):
            stored[self.rows[:, None], self.positions] = new.transpose(1, 2)
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
        # Slots 0, 1, 2, ... in order are read in place. Any others must be copied.
        chosen = used[: len(self.rows)] if self.in_place else used.index_select(0, self.rows)
        return chosen.transpose(1, 2)

    def _room_for(self, new: torch.Tensor) -> torch.Tensor:
        # Zeros: a value that is masked counts 0 times itself, and 0 times NaN would be NaN.
        return new.new_zeros(self.slots, self.context + 1, new.shape[1], new.shape[3])


def forward(backbone, cache: SlotCache, rows, tokens, positions, length: int) -> torch.Tensor:
    """Send tokens [B, T] through the model at these positions [B, T] of these slots (rows [B]).

    Each token attends to the positions up to its own, of which there are at most `length`.
    Padding has position `cache.context`. Returns hidden states [B, T, D].
    """
    cache.plan(rows, positions, length)
    future = torch.arange(length, device=tokens.device) > positions[:, None, :, None]
    mask = torch.zeros(future.shape, dtype=backbone.dtype, device=tokens.device)  # [B, 1, T, S]
    mask.masked_fill_(future, -torch.inf)
    return backbone(input_ids=tokens, position_ids=positions % cache.context, attention_mask=mask,
                    past_key_values=cache, use_cache=True).last_hidden_state


def pad(rows: list[list[int]], padding: int) -> torch.Tensor:
    """A rectangle of integers [B, T] from rows of different lengths.

    >>> pad([[7, 8], [9]], padding=0).tolist()
    [[7, 8], [9, 0]]
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [padding] * (longest - len(row)) for row in rows])


# --------------------------------------------------------------------------------------------------
# The prefix cache: which tokens each slot holds


@dataclass
class Prefix:
    """The longest part of a context whose keys and values are in a slot already."""

    slot: int
    length: int  # in tokens
    continues: bool  # the slot is idle and holds nothing else: the request can go on there
    growing: bool  # a prefill of this batch is about to compute a longer prefix


class Slots:
    """Which tokens each slot holds, and which slots are idle."""

    def __init__(self, slots: int, context: int):
        # The context given to each slot, and -1 behind it. The cache holds the keys and values of
        # its first `length` tokens. A prefill of this batch is about to compute the others.
        self.tokens = np.full((slots, context), -1)  # [slots, context]
        self.length = np.zeros(slots, dtype=np.int64)  # [slots]
        self.idle = list(range(slots))  # the one that was released first comes first

    def find_prefix(self, ids: list[int]) -> Prefix:
        """Find the slot that holds the longest prefix of a context. Changes nothing."""
        # The last token must go through the model in any case: it predicts the next one.
        shared = common_prefix(self.tokens, np.array(ids[:-1]))  # [slots]
        ready = np.minimum(shared, self.length)  # [slots]
        longest = int(ready.max())
        # Is the prefill of a longer prefix planned, in another row? Then it pays to wait for it.
        growing = bool(shared.max() >= longest + WORTH_WAITING)
        for slot in self.idle:
            holds_nothing_else = self.length[slot] == ready[slot]
            if ready[slot] == longest and holds_nothing_else:
                return Prefix(slot, longest, True, growing)
        return Prefix(int(ready.argmax()), longest, False, growing)

    def choose(self, prefix: Prefix) -> int:
        """Choose an idle slot for a request with this prefix. Changes nothing.

        A slot that holds more than the prefix is not continued in place: the rest may belong to an
        agent that waits for its tool.
        """
        return prefix.slot if prefix.continues else self.idle[0]

    def take(self, slot: int, ids: list[int], length: int) -> None:
        """An idle slot is in use from now on. The cache holds the first `length` of its tokens."""
        self.idle.remove(slot)
        self.tokens[slot, : len(ids)] = ids
        self.tokens[slot, len(ids) :] = -1
        self.length[slot] = length

    def extend(self, slot: int, ids: list[int]) -> None:
        """From now on the cache holds the keys and values of these tokens, too."""
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


class Decoder:
    """Continues requests, one token each per `step`. Between steps the event loop may change it."""

    def __init__(self, model, stop_ids: set[int], slots: int, context: int, stats: Counter):
        self.model, self.stop_ids, self.stats = model, stop_ids, stats
        self.head = model.get_output_embeddings()
        self.head_weight = self.head.weight  # [V, D]; `_start_afresh` makes it float32 at least
        self.fingerprint: list = []  # of the weights that made the keys and values
        self.cache = SlotCache(slots, context)
        self.slots = Slots(slots, context)
        self.waiting: list[Request] = []  # for a slot
        self.rows: list[Row] = []
        self.finished: list[Request] = []  # in the last step

    def requests(self) -> list[Request]:
        """All requests that are not finished."""
        return self.waiting + [request for row in self.rows for request in row.requests]

    def cancel(self, request: Request) -> None:
        """Drop a request, if it is not finished."""
        request.completion.finish = "cancelled"
        if request in self.waiting:
            self.waiting.remove(request)
        for row in list(self.rows):
            self._split(row)

    @torch.inference_mode()
    def step(self) -> None:
        """Sample one token for every request in a row, after a prefill of the new rows."""
        if not self.rows and self._fingerprint() != self.fingerprint:
            self._start_afresh()
        self.finished = []
        decoding = sorted(self.rows, key=attrgetter("slot"))
        while new_rows := self._admit():
            self._prefill(new_rows)
        if decoding:
            self._decode(decoding)
        self.stats["steps"] += 1

    # ---- Admission: find a prefix, choose a slot ----

    def _admit(self) -> list[Row]:
        """Make rows of waiting requests, as far as there is room. Returns the new rows.

        Of new contexts with a common prefix only one is admitted at first. The others follow when
        its prefill has run, and copy the prefix.
        """
        new: dict[tuple[int, ...], Row] = {}  # by context
        for request in self._with_room():
            context = tuple(request.ids)
            if context not in new:
                prefix = self.slots.find_prefix(request.ids)
                if prefix.growing:
                    continue
                new[context] = self._new_row(request.ids, prefix)
            new[context].requests.append(request)
            self.waiting.remove(request)
            self.stats["prompt_tokens"] += len(request.ids)
        self.rows += new.values()
        return list(new.values())

    def _with_room(self) -> list[Request]:
        """Waiting requests, as many as could each have a slot: duplicates may part soon."""
        in_rows = sum(len(row.requests) for row in self.rows)
        return sorted(self.waiting, key=attrgetter("agent"))[: self.cache.slots - in_rows]

    def _new_row(self, ids: list[int], prefix: Prefix) -> Row:
        slot = self.slots.choose(prefix)
        if not prefix.continues:
            self.cache.copy(prefix.slot, slot, prefix.length)
        self.slots.take(slot, ids, prefix.length)
        self.stats["prefill_tokens"] += len(ids) - prefix.length
        return Row(slot, [])

    # ---- Prefill and decode ----

    def _prefill(self, rows: list[Row]) -> None:
        """Compute what the slots lack of these contexts, and sample the first tokens."""
        # One pass over a batch of long contexts would need memory for rows times length squared.
        piece = max(1, PREFILL_TOKENS // len(rows))
        while long := [row for row in rows if len(row.ids) - self.slots.length[row.slot] > piece]:
            self._compute(long, piece)
        self._decode(rows)

    def _decode(self, rows: list[Row]) -> None:
        """Compute the tokens that the slots lack, and sample the next token of each request."""
        requests, row_numbers = [], []
        for number, row in enumerate(rows):
            requests += row.requests
            row_numbers += [number] * len(row.requests)
        logits = self._logits(self._compute(rows))  # [B, V]
        options = [[request.temperature, request.rng.random()] for request in requests]
        options = torch.tensor(options, dtype=torch.float64, device=logits.device)  # [R, 2]
        tokens, logps = sample(logits[row_numbers], *options.unbind(1))  # [R] each
        if logps.isnan().any():
            raise FloatingPointError("the model's logits are not finite: has the run diverged?")
        for request, token, logp in zip(requests, tokens.tolist(), logps.tolist()):
            self._append(request, token, logp)
        for row in rows:
            self._split(row)
        self.stats["sampled_tokens"] += len(requests)

    def _append(self, request: Request, token: int, logp: float) -> None:
        """Add a sampled token to its request. With a stop token or the last one it is finished."""
        completion = request.completion
        request.ids.append(token)
        completion.ids.append(token)
        completion.logps.append(logp)
        stopped = token in self.stop_ids
        if stopped or len(completion.ids) == request.max_new_tokens:
            completion.finish = "stop" if stopped else "length"
            self.finished.append(request)

    def _split(self, row: Row) -> None:
        """Drop finished requests. Requests that sampled different tokens get different rows."""
        by_token: dict[int, list[Request]] = {}
        for request in row.requests:
            if not request.completion.finish:
                by_token.setdefault(request.ids[-1], []).append(request)
        if not by_token:
            self.rows.remove(row)
            self.slots.release(row.slot)
            return
        row.requests, *others = by_token.values()
        length = self.slots.length[row.slot]  # of all but the new token
        for requests in others:
            slot = self.slots.idle[0]
            self.cache.copy(row.slot, slot, length)
            self.slots.take(slot, row.ids[:length], length)
            self.rows.append(Row(slot, requests))

    # ---- The model ----

    def _compute(self, rows: list[Row], most: int | None = None) -> torch.Tensor:
        """Send the tokens that the slots lack through the model, at most `most` of each row.

        Returns the hidden state behind the last token of each row [B, D].
        """
        slots = [row.slot for row in rows]
        starts = self.slots.length[slots].tolist()
        fed = [row.ids[start:][:most] for row, start in zip(rows, starts)]
        positions = [list(range(start, start + len(ids))) for start, ids in zip(starts, fed)]
        for slot, ids in zip(slots, fed):
            self.slots.extend(slot, ids)
        device, context = self.model.device, self.cache.context
        hidden = forward(self.model.base_model, self.cache, torch.tensor(slots, device=device),
                         pad(fed, 0).to(device), pad(positions, context).to(device),
                         length=int(self.slots.length[slots].max()))
        self.stats.update(passes=1, computed_tokens=sum(map(len, fed)))
        last = [len(ids) - 1 for ids in fed]
        return hidden[range(len(rows)), last]

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
        self.slots = Slots(self.cache.slots, self.cache.context)
        # Logits in 16 bits would be rounded before the softmax, unlike those of the update.
        weight = self.head.weight
        self.head_weight = weight.to(torch.promote_types(weight.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# The engine: requests come, answers go. Runs in the event loop


class RejoinWindow:
    """A short wait for agents that were just answered and may soon ask again."""

    def __init__(self, seconds: float):
        self.seconds, self.waited = seconds, 0.0  # at most for each step, and in all
        self.away: set[asyncio.Task] = set()  # the agents to wait for
        self.all_back: asyncio.Future | None = None  # during a wait

    def expect(self, task: asyncio.Task) -> None:
        """Wait for this agent, unless it ends."""
        if self.seconds and task not in self.away:
            self.away.add(task)
            task.add_done_callback(self.stop_expecting)

    def stop_expecting(self, task: asyncio.Task) -> None:
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


class Engine:
    """Continuous batching over `slots` contexts of at most `context` tokens each.

    stop_ids: tokens that end a message. rejoin_window: seconds that agents have to come back before
    the next step. 0: nobody is waited for while anything can be decoded.
    The engine notices when the model's weights change in place, as an optimizer changes them. It
    then forgets all keys and values.
    `stats` counts since the engine was made: steps, passes (through the model), prompt_tokens (of
    all requests), prefill_tokens (of these, the ones no slot held and no duplicate shares),
    computed_tokens (sent through the model in all), and sampled_tokens. `window.waited` is the time
    spent in the rejoin window, in seconds.
    Raises ValueError for a model whose log-probs it would get wrong.
    """

    def __init__(self, model, stop_ids: set[int], *, slots: int = 64, context: int = 1024,
                 rejoin_window: float = 0.0):
        check_model(model)
        self.model, self.slots, self.context = model, slots, context
        self.stats: Counter = Counter()
        self.window = RejoinWindow(rejoin_window)
        self.server: asyncio.Task | None = None  # runs `_serve`
        self.new_decoder = partial(Decoder, model, stop_ids, slots, context, self.stats)
        self.decoder: Decoder = self.new_decoder()
        # During a step the decoder belongs to its thread. What comes meanwhile is kept here.
        self.arrived: list[Request] = []
        self.cancelled: list[Request] = []

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random,
                       temperature: float = 1.0) -> Completion:
        """Continue `ids` until a stop token or `max_new_tokens`.

        Raises ValueError if that cannot fit the context, and whatever a failing step raises.
        """
        if not ids or max_new_tokens < 1 or len(ids) + max_new_tokens > self.context:
            raise ValueError(f"{len(ids)} tokens and {max_new_tokens} new ones do not fit "
                             f"a context of {self.context}")
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        request = Request(list(ids), max_new_tokens, rng, temperature, AGENT.get(),
                          loop.create_future(), Completion([], [], ""))
        self._start_server(loop)
        self.arrived.append(request)
        self.window.stop_expecting(task)
        try:
            await request.answered
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        self.window.expect(task)
        return request.completion

    def expect(self, task: asyncio.Task) -> None:
        """This agent will soon ask for tokens. Within the rejoin window it is waited for."""
        self.window.expect(task)

    def forget(self) -> None:
        """Forget all keys and values, before the next step that begins with no rows."""
        self.decoder.fingerprint = []

    # ---- The server: a task that runs steps, in the event loop of the agents ----

    def _start_server(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a server in this event loop, unless one runs."""
        if self.server and not self.server.done():
            if self.server.get_loop() is loop:
                return
            self._reset()  # another event loop was abandoned in the middle
        self.server = loop.create_task(self._serve(self.decoder))

    async def _serve(self, decoder: Decoder) -> None:
        """Run steps for as long as there are requests, and the decoder is the engine's."""
        loop = asyncio.get_running_loop()
        try:
            await self.window.wait()
            while decoder is self.decoder and (self.arrived or decoder.requests()):
                self._hand_over()
                await loop.run_in_executor(DECODING, decoder.step)
                for request in decoder.finished:
                    if not request.answered.done():  # its agent may have been cancelled meanwhile
                        request.answered.set_result(None)
                await self.window.wait()
        except BaseException as error:
            if decoder is self.decoder:
                self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _hand_over(self) -> None:
        """Tell the decoder what has come since the last step."""
        self.decoder.waiting += self.arrived
        for request in self.cancelled:
            self.decoder.cancel(request)
        self.arrived, self.cancelled = [], []

    def _fail(self, error: BaseException) -> None:
        """Raise the error in all agents that wait."""
        for request in self.arrived + self.decoder.requests():
            if not request.answered.done():
                request.answered.set_exception(error)
        self._reset()

    def _reset(self) -> None:
        """Start anew after a failure: what the slots hold is unknown."""
        self.arrived, self.cancelled, self.decoder = [], [], self.new_decoder()
        self.window.away.clear()


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
    """Compares eight tokens in two passes through a slot with one pass as in grpo.py."""
    head = model.get_output_embeddings().weight  # [V, D]
    positions = torch.arange(8, device=head.device)[None]  # [1, 8]
    tokens, cache, slots = positions % len(head), SlotCache(slots=1, context=8), positions[0, :1]
    hidden = []  # [1, 5, D] and [1, 3, D]
    for part in (slice(0, 5), slice(5, 8)):
        hidden.append(forward(model.base_model, cache, slots, tokens[:, part], positions[:, part],
                              length=part.stop))
    ours = (torch.cat(hidden, 1) @ head.T).float()  # [1, 8, V]
    mask = torch.full((1, 1, 8, 8), -torch.inf, dtype=model.dtype, device=head.device).triu(1)
    theirs = model(input_ids=tokens, attention_mask=mask).logits.float()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    agree = (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    return "" if agree else "its logits are not its head times its last hidden states"


def small_model(vocab_size: int, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.7 million random parameters. The same seed gives the same weights.

    Two layers are the fewest that can copy a token from earlier in the context.

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
        # Heads begin by copying what they attend to. Where to attend is all that is left to learn.
        for layer in model.model.layers:
            values, out = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
            out.copy_(0.2 * torch.nn.init.orthogonal_(values).T)
    return model


# --------------------------------------------------------------------------------------------------
# Episodes


def play(starts: list[Callable[[], Coroutine]], at_once: int,
         engine: Engine | None = None) -> list:
    """Run many episodes, at most `at_once` at a time. Raises the first failure.

    starts: functions that make an agent's coroutine, as `lambda: Agent(...).run(env, seed)` does.
    engine: is told of each agent that begins, so the rejoin window includes the first message.
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
                    engine.expect(asyncio.current_task())
                return await start()

        return await asyncio.gather(*(play_one(*pair) for pair in enumerate(starts)))

    return asyncio.run(play_all())


# --------------------------------------------------------------------------------------------------
# python rollout.py


def demo(agents: int = 8) -> None:
    """The same messages by `plain_generate` and by the engine."""
    model, stop_ids, prompt = small_model(1024), set(range(16)), list(range(100, 300))
    plain_generate(model, prompt, 1, stop_ids, Random(0))  # the first pass of all is slow
    engine = Engine(model, stop_ids, slots=agents, context=512)
    ask = partial(engine.generate, prompt, 64)
    start = time.perf_counter()
    plain = [plain_generate(model, prompt, 64, stop_ids, Random(n)) for n in range(agents)]
    middle = time.perf_counter()
    fast = play([partial(ask, rng=Random(n)) for n in range(agents)], agents)
    end = time.perf_counter()
    if [a.ids for a in plain] != [b.ids for b in fast]:
        raise AssertionError("the engine's tokens are not those of plain_generate")
    stats, sampled = engine.stats, engine.stats["sampled_tokens"]
    print(f"{agents} agents, one prompt of {len(prompt)} tokens: the same tokens both ways")
    print(f"  plain_generate   {sampled / (middle - start):6,.0f} sampled tokens per second")
    print(f"  Engine           {sampled / (end - middle):6,.0f} sampled tokens per second")
    print(f"  prefill          {stats['prefill_tokens']:,} of {stats['prompt_tokens']:,} tokens")


if __name__ == "__main__":
    demo()
