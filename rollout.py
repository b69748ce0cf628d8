"""Many agents at once: one batched token engine behind `generate`.

Agents are coroutines. Each asks for tokens when it wants some; the engine decodes for all that are waiting, one token each
per pass through the model (continuous batching). A row that is finished gives its place to the next at once, and while an
agent waits for a tool the others go on.

    KV cache     The keys and values of a context stay in a slot. A request starts from the slot that holds the longest prefix
                 of it: its own last turn, or another agent's copy of the same prompt (prefix cache). One rule covers turns,
                 groups, shared instructions and rewritten histories. Losing a slot costs time, never correctness.
    duplicates   Requests that come together with the same context are computed once, for as long as they sample the same
                 tokens. The attempts of a group often do.
    randomness   Each episode samples from a random stream of its own, so it does not depend on its neighbours.
    threads      Passes run in a thread of their own, so the event loop, and with it every tool and agent, stays responsive.
    rejoin       With a `rejoin_window` the engine gives the agents it has just answered a short time to come back before the
    window       next pass. Quick tools then always rejoin at the same pass, and a run can be repeated bit by bit.

Left out: paged memory, preemption, speculative decoding, top-k and top-p (what is sampled must be what is trained), models
with sliding windows, recurrent layers or logits that are more than a product (`check_model` refuses them). Takes a
transformers causal model; serves agent.py; its episodes go to grpo.py. `python rollout.py` plays with 8 agents,
`--bench [--model MODEL]` measures 64. Lift it with agent.py.
"""

import argparse
import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_thread
from dataclasses import dataclass, field
from random import Random
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agent import Completion

# ----------------------------------------------------------------------------------------------------------------------
# The idea: sample a token, append it, repeat


def sample(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution. Greedy where the temperature is 0.

    logits [B, V], temperature [B], uniform [B] in [0, 1) -> tokens [B], their log-probs [B] (greedy: at temperature 1).

    >>> logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    >>> sample(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.9], dtype=torch.float64))[0].tolist()
    [1, 2]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    greedy = temperature == 0
    logps = torch.log_softmax(logits / temperature.masked_fill(greedy, 1.0).to(logits.dtype)[:, None], dim=-1)  # [B, V]
    # In float32 the last of 150,000 terms would be lost to rounding.
    cumulative = logps.exp().cumsum(-1, dtype=torch.float64)  # [B, V]
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]  # [B]
    tokens = torch.where(greedy, logps.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


@torch.inference_mode()
def plain_generate(model, ids: list[int], max_new_tokens: int, stop_ids: set[int], rng: Random,
                   temperature: float = 1.0) -> Completion:
    """What the engine does, for one agent and without a KV cache: the whole context goes through the model for each token."""
    new_ids, logps = [], []
    while len(new_ids) < max_new_tokens:
        logits = model(input_ids=torch.tensor([ids + new_ids], device=model.device)).logits[:, -1]  # [1, V]
        drawn = torch.tensor([[temperature], [rng.random()]], dtype=torch.float64, device=model.device)
        token, logp = sample(logits, *drawn)
        new_ids.append(token.item())
        logps.append(logp.item())
        if new_ids[-1] in stop_ids:
            return Completion(new_ids, logps, "stop")
    return Completion(new_ids, logps, "length")


# ======================================================================================================================
# The fast version. Its tokens and log-probs are those of `plain_generate`

PREFILL_TOKENS = 4096  # tokens of context that one pass reads: bounds the memory of prefill, not what can be read
WORTH_WAITING = 16  # tokens that a request must be spared by waiting for the next batch: a pass has a price, too

# One thread decodes for all engines: each thread that runs torch operations would keep helper threads of its own.
DECODING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")


@dataclass(eq=False)
class Request:
    """A context that wants to be continued."""

    ids: list[int]  # the context, and what was sampled behind it
    prompt: int  # how many of these were given
    limit: int  # how many may be sampled
    rng: Random
    temperature: float
    order: int  # of its agent: first come, first served, and the same in every run
    future: asyncio.Future
    logps: list[float] = field(default_factory=list)
    slot: int = -1  # none, while it waits or is computed by its leader
    leader: "Request | None" = None  # the duplicate that is computed for this one, too; None: it is computed itself
    finish: str = ""  # "stop" or "length" once it is done


class Engine:
    """Continuous batching over `slots` contexts of at most `context` tokens each.

    stop_ids: tokens that end a message. rejoin_window: seconds that agents have to come back before the next pass; 0: while
    anything can be decoded, nobody is waited for. Changing the model's weights in place (an optimizer does) is noticed, and
    all keys and values are then forgotten.
    `stats` counts, since the engine was made: steps, passes (through the model), context (tokens of all contexts it was
    given), read (tokens that went through the model) and sampled; and seconds: reading (prefill), decoding, and waiting (for
    agents, within the window). Raises ValueError for a model it would get wrong.
    """

    def __init__(self, model, stop_ids: set[int], *, slots: int = 64, context: int = 1024, rejoin_window: float = 0.0):
        check_model(model)
        self.model, self.backbone, self.head = model, model.base_model, model.get_output_embeddings()
        self.head_weight = self.head.weight  # [V, D], in float32 at least; see _forget_if_trained
        self.stop_ids, self.slots, self.context, self.rejoin_window = stop_ids, slots, context, rejoin_window
        self.stats = Counter()

        # What the slots hold. Touched by the decoding thread during a step, by nobody else.
        self.cache = SlotCache(slots, context)
        self.held = np.full((slots, context), -1, dtype=np.int64)  # tokens whose keys and values are in a slot; -1: none
        self.length = np.zeros(slots, dtype=np.int64)  # how many these are
        self.used = np.zeros(slots, dtype=np.int64)  # when a slot was last used, in steps
        self.clock = 0
        self.weights: list = []  # what the keys and values were computed with
        self.waiting: list[Request] = []
        self.active: list[Request] = []  # being continued: in a slot, or computed by a leader

        # What agents and the event loop touch. Taken in between two steps.
        self.arrived: list[Request] = []
        self.cancelled: list[Request] = []
        self.serving: asyncio.Task | None = None
        self.running: list[Future] = []  # the step that the decoding thread is at, if any
        self.away: set[asyncio.Task] = set()  # agents that may be back soon
        self.somebody_back: asyncio.Event | None = None
        self.order: WeakKeyDictionary[asyncio.Task, int] = WeakKeyDictionary()
        self.agents = itertools.count()

    # ------------------------------------------------------------------------------------------------------------------
    # In the event loop: requests come, answers go

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random, temperature: float = 1.0) -> Completion:
        """Continue `ids` until a stop token or `max_new_tokens`. Raises ValueError if that cannot fit the context."""
        if not ids or max_new_tokens < 1 or len(ids) + max_new_tokens > self.context:
            raise ValueError(f"{len(ids)} tokens and {max_new_tokens} new ones do not fit a context of {self.context}")
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        request = Request(list(ids), len(ids), max_new_tokens, rng, temperature, self._order_of(task), loop.create_future())
        self._serve_in(loop)
        self.arrived.append(request)
        self._is_back(task)
        try:
            await request.future
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        self.expect(task)
        return Completion(request.ids[request.prompt :], request.logps, request.finish)

    def expect(self, task: asyncio.Task) -> None:
        """This agent may soon ask for tokens: within the rejoin window it is waited for, unless it ends."""
        self._order_of(task)
        if task not in self.away:
            self.away.add(task)
            task.add_done_callback(self._is_back)

    def forget(self) -> None:
        """Be as good as new, but for `stats`."""
        self.weights = []

    def _order_of(self, task: asyncio.Task) -> int:
        if task not in self.order:
            self.order[task] = next(self.agents)
        return self.order[task]

    def _is_back(self, task: asyncio.Task) -> None:
        task.remove_done_callback(self._is_back)
        self.away.discard(task)
        if self.somebody_back:
            self.somebody_back.set()

    def _serve_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make sure that somebody serves, in this event loop."""
        if self.serving and not self.serving.done() and self.serving.get_loop() is loop:
            return
        # What an event loop that is no more has left behind goes, once its last step is over.
        wait_for_thread(self.running)
        self.arrived, self.cancelled, self.waiting, self.active = [], [], [], []
        self.away = {task for task in self.away if task.get_loop() is loop}
        self.serving = loop.create_task(self._serve())

    async def _serve(self) -> None:
        """Decode for as long as anybody waits, and nobody serves in another event loop."""
        task = asyncio.current_task()
        try:
            await self._rejoin()
            while self.serving is task and self._take_in():
                for request in await self._in_thread(self._step):
                    if not request.future.done():  # it is, if its agent was cancelled during the step
                        request.future.set_result(None)
                await self._rejoin()
        except BaseException as e:
            if self.serving is task:
                self._fail(e)
            if not isinstance(e, Exception):
                raise

    async def _in_thread(self, step: Callable):
        """Run a step in the decoding thread. Returns only when it is over, even if this task is cancelled."""
        self.running = [DECODING.submit(step)]
        try:
            return await asyncio.wrap_future(self.running[0])
        finally:
            wait_for_thread(self.running)

    async def _rejoin(self) -> None:
        """Let the agents that were just answered come back, but for no longer than the window."""
        await asyncio.sleep(0)  # they have not run yet
        if not self.rejoin_window or not self.away:
            return
        began, self.somebody_back = time.perf_counter(), asyncio.Event()
        try:
            async with asyncio.timeout(self.rejoin_window):
                while self.away:
                    await self.somebody_back.wait()
                    self.somebody_back.clear()
        except TimeoutError:
            for task in self.away:
                task.remove_done_callback(self._is_back)
            self.away.clear()
        self.stats["waiting"] += time.perf_counter() - began

    def _take_in(self) -> bool:
        """Take requests that arrived, and forget those cancelled, since the last step. Is there anything to decode?"""
        self.waiting += self.arrived
        self.stats["context"] += sum(request.prompt for request in self.arrived)
        for request in self.cancelled:
            self._drop(request)
        self.arrived, self.cancelled = [], []
        return bool(self.waiting or self.active)

    def _fail(self, error: BaseException) -> None:
        """Everybody who waits must hear of it. What the slots hold is not known any more; after NaN it must not stay."""
        for request in self.arrived + self.waiting + self.active:
            if not request.future.done():
                request.future.set_exception(error)
        self.arrived, self.waiting, self.active, self.weights = [], [], [], []
        self.cache = SlotCache(self.slots, self.context)

    def _drop(self, request: Request) -> None:
        """Forget a request whose agent no longer waits for it. One of its duplicates inherits its slot."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request not in self.active:
            return
        self.active.remove(request)
        duplicates = [r for r in self.active if r.leader is request]
        for duplicate in duplicates:
            duplicate.leader = duplicates[0]
        if duplicates:
            duplicates[0].leader, duplicates[0].slot = None, request.slot

    # ------------------------------------------------------------------------------------------------------------------
    # In the decoding thread: one token for everybody

    @torch.inference_mode()
    def _step(self) -> list[Request]:
        """One token for every request; new contexts are read first. Returns who is finished."""
        if not self.active:
            self._forget_if_trained()
        self.clock += 1
        began, finished = time.perf_counter(), []
        decoding = [r for r in self.active if not r.leader]
        while batch := self._admit():
            for part in _by_length(batch, self.length):
                self._prefill(part)
                finished += self._advance(part)
        read = time.perf_counter()
        if decoding:
            finished += self._advance(decoding)
        self.stats.update(steps=1, reading=read - began, decoding=time.perf_counter() - read)
        return finished

    def _prefill(self, requests: list[Request]) -> None:
        """Read long contexts piece by piece: all but the last piece of each, behind which `_advance` samples."""
        piece = max(1, PREFILL_TOKENS // len(requests))
        while unread := [r for r in requests if len(r.ids) - self.length[r.slot] > piece]:
            self._read(unread, piece)

    def _advance(self, leaders: list[Request]) -> list[Request]:
        """Sample the next token for each of these, and for their duplicates. Returns who is finished."""
        groups = {leader: [leader] for leader in leaders}
        for request in self.active:
            if request.leader in groups:
                groups[request.leader].append(request)
        requests = [r for group in groups.values() for r in group]
        logits = self._logits(self._read(leaders))  # [B, V]
        if len(requests) > len(leaders):
            rows = np.repeat(np.arange(len(leaders)), [len(group) for group in groups.values()])
            logits = logits[self._there(rows)]
        self._sample(requests, logits)
        finished = [r for r in requests if r.finish]
        for request in finished:
            self.active.remove(request)
        if len(requests) > len(leaders):
            self._separate(groups)
        return finished

    def _sample(self, requests: list[Request], logits: torch.Tensor) -> None:
        """One token for each request, from its row of logits [B, V] and its own random stream."""
        drawn = np.array([[r.temperature, r.rng.random()] for r in requests])  # [B, 2]
        temperature, uniform = self._there(np.ascontiguousarray(drawn.T))
        tokens, logps = sample(logits, temperature, uniform)
        self.stats["sampled"] += len(requests)
        both = torch.stack([tokens.double(), logps.double()], dim=1).tolist()  # one wait for the device, not two
        for request, (token, logp) in zip(requests, both):
            if math.isnan(logp):
                raise FloatingPointError("the model's logits are not finite: has the run diverged?")
            request.ids.append(int(token))
            request.logps.append(logp)
            if int(token) in self.stop_ids:
                request.finish = "stop"
            elif len(request.logps) == request.limit:
                request.finish = "length"

    def _separate(self, groups: dict[Request, list[Request]]) -> None:
        """Duplicates that sampled another token than their leader go on by themselves, with a copy of its keys and values."""
        copies = []
        for leader, group in groups.items():
            leader_of = {} if leader.finish else {leader.ids[-1]: leader}  # by the token that was sampled
            for request in group[1:]:
                if request.finish:
                    continue
                request.leader = leader_of.get(request.ids[-1])
                if request.leader is None:
                    leader_of[request.ids[-1]] = request
                    request.slot = self._oldest(self._free())
                    self._hold(request.slot, leader.ids[:-1])
                    copies.append((leader.slot, request.slot, len(leader.ids) - 1))
        self.cache.copy(copies)

    # ------------------------------------------------------------------------------------------------------------------
    # Admission: find a prefix, choose a slot

    def _admit(self) -> list[Request]:
        """Move waiting requests into slots, each behind the longest prefix of its context that some slot holds.

        Of several with the same context the first is computed, the others follow it. A request that shares more with one of
        this very batch than with any slot waits for the next batch: what they have in common is read once, and copied.
        """
        batch: list[Request] = []
        contexts = np.full((self.slots, self.context), -1)  # of the batch, a row each
        copies: dict[int, tuple[int, int]] = {}  # to slot: from slot, tokens
        leaders: dict[tuple[int, ...], Request] = {}  # by their context
        for request in sorted(self.waiting, key=lambda r: r.order):
            if len(self.active) == self.slots:  # a slot for each, should duplicates part
                break
            request.leader = leaders.get(tuple(request.ids))
            if request.leader is None:
                ids = np.array(request.ids)
                shared = self._shared_prefixes(ids)  # [slots]
                within = _common_prefix(contexts[: len(batch)], ids[:-1]).max(initial=0)
                if within >= shared.max() + WORTH_WAITING:
                    continue
                self._place(request, shared, copies)
                contexts[len(batch), : len(ids)] = ids
                batch.append(request)
                leaders[tuple(request.ids)] = request
            self.active.append(request)
        admitted = set(self.active)
        self.waiting = [r for r in self.waiting if r not in admitted]
        self.cache.copy([(source, target, n) for target, (source, n) in copies.items()])
        return batch

    def _shared_prefixes(self, ids: np.ndarray) -> np.ndarray:
        """[slots]: how many tokens of a context each slot holds. The last token must be fed, to predict from."""
        return _common_prefix(self.held[:, : len(ids) - 1], ids[:-1])

    def _place(self, request: Request, shared: np.ndarray, copies: dict[int, tuple[int, int]]) -> None:
        """Choose a slot for a request. `shared` [slots]: tokens of its context in each slot. Notes the copy it needs, if any.

        It goes on in the slot with its prefix only if that slot is idle and holds nothing else: the rest may belong to an
        agent that waits for a tool.
        """
        best, free = int(shared.max()), self._free()
        # A context that is asked for again ends with a token that its slot holds already, and that is fed once more.
        own = [s for s in free if shared[s] == best and self._holds_only(s, request.ids)]
        request.slot = own[0] if own else self._oldest(free)
        if not own:
            source = int(shared.argmax())
            # A slot that is about to receive a copy still holds what it held: take it from where that comes from.
            copies[request.slot] = copies[source][0] if source in copies else source, best
        self._hold(request.slot, request.ids[:best])

    def _holds_only(self, slot: int, ids: list[int]) -> bool:
        """Is all that the slot holds a prefix of these tokens?"""
        held = self.held[slot, : self.length[slot]]
        return len(held) <= len(ids) and held.tolist() == ids[: len(held)]

    def _free(self) -> list[int]:
        busy = {r.slot for r in self.active}
        return [slot for slot in range(self.slots) if slot not in busy]

    def _oldest(self, slots: list[int]) -> int:
        return min(slots, key=lambda slot: (self.used[slot], slot))

    def _hold(self, slot: int, ids: list[int]) -> None:
        """Note that a slot has the keys and values of these tokens, and of no others."""
        self.held[slot, : len(ids)] = ids
        self.held[slot, len(ids) :] = -1
        self.length[slot] = len(ids)

    def _forget_if_trained(self) -> None:
        """Keys and values of other weights are worthless."""
        parameters = list(self.model.parameters())
        probe = torch.cat([p.detach().flatten()[:4] for p in parameters]).tolist()  # fused optimizers do not count versions
        weights = [[p.data_ptr() for p in parameters], probe, [p._version for p in parameters]]
        if weights == self.weights:
            return
        self.weights, self.length[:], self.held[:] = weights, 0, -1
        self.clock, self.used[:] = 0, 0  # as good as new: a resumed run must go on as one that was never stopped
        # Logits in 16 bits would be rounded before the softmax, and sampling would differ from training.
        self.head_weight = self.head.weight.to(torch.promote_types(self.head.weight.dtype, torch.float32))

    # ------------------------------------------------------------------------------------------------------------------
    # The model

    def _read(self, requests: list[Request], most: int | None = None) -> torch.Tensor:
        """Feed what their slots do not hold yet, at most `most` tokens of each. Hidden states [B, D] of each one's last."""
        slots = np.array([r.slot for r in requests])
        fed = [r.ids[held:][:most] for r, held in zip(requests, self.length[slots])]
        tokens, positions = self._padded(fed, self.length[slots])  # [B, T] each
        self._note(slots, fed)
        # Keys of neighbouring slots are a view, those of scattered ones a copy: decode rows of idle slots along with the
        # busy ones while they are the fewer.
        decoding = tokens.shape[1] == 1
        if slots.max() < (2 if decoding else 1) * len(slots):
            where, rows = slice(0, slots.max() + 1), slots
        else:
            where, rows = self._there(slots), np.arange(len(slots))
        feed = self._there(self._in_rows(tokens, positions, rows))  # [2, rows, T]
        hidden = _forward(self.backbone, self.cache, where, feed, int(self.length[slots].max()))  # [rows, T, D]
        last = np.array([len(ids) - 1 for ids in fed])
        return hidden[*self._there(np.stack([rows, last]))]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, V]"""
        return hidden.to(self.head_weight.dtype) @ self.head_weight.T

    def _padded(self, fed: list[list[int]], behind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, T], and their positions [B, T] behind `behind` [B] others. Padding has the position `context`."""
        counts = np.array([len(ids) for ids in fed])
        steps = np.arange(counts.max())
        valid = steps < counts[:, None]  # [B, T]
        positions = np.where(valid, behind[:, None] + steps, self.context)
        tokens = np.zeros_like(positions)
        tokens[valid] = list(itertools.chain(*fed))
        return tokens, positions

    def _note(self, slots: np.ndarray, fed: list[list[int]]) -> None:
        """Note that these tokens are in the slots from now on."""
        for slot, ids in zip(slots, fed):
            end = self.length[slot] + len(ids)
            self.held[slot, self.length[slot] : end] = ids
            self.length[slot] = end
        self.used[slots] = self.clock
        self.stats.update(passes=1, read=sum(map(len, fed)))

    def _in_rows(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Tokens and positions [2, R, T] with requests in these rows; the other rows are padding."""
        out = np.zeros((2, rows.max() + 1, tokens.shape[1]), dtype=np.int64)
        out[1] = self.context
        out[0, rows], out[1, rows] = tokens, positions
        return out

    def _there(self, x: np.ndarray) -> torch.Tensor:
        """On the model's device, without waiting for what the device is doing."""
        x, device = torch.from_numpy(x), self.head.weight.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _by_length(batch: list[Request], length: np.ndarray) -> list[list[Request]]:
    """Cut a batch by how much is to be read: a turn's few new tokens are not to be padded to the length of a whole prompt."""
    parts: dict[int, list[Request]] = {}
    for request in sorted(batch, key=lambda r: len(r.ids) - length[r.slot]):
        unread = int(len(request.ids) - length[request.slot])
        parts.setdefault(max(unread, 31).bit_length(), []).append(request)
    return list(parts.values())


def _forward(backbone, cache: "SlotCache", rows: slice | torch.Tensor, feed: torch.Tensor, in_use: int) -> torch.Tensor:
    """Hidden states [B, T, D] of the tokens and positions [2, B, T] of `feed`, behind what these slots of `cache` hold.

    in_use: how many positions matter. Padding has the position `cache.context`: it is written there, and nobody sees it.
    """
    tokens, positions = feed
    cache.plan(rows, positions, in_use)
    # Causal, and no row sees past its own.
    unseen = torch.arange(in_use, device=feed.device) > positions[:, None, :, None]  # [B, 1, T, S]
    mask = torch.zeros(unseen.shape, dtype=backbone.dtype, device=feed.device).masked_fill_(unseen, -torch.inf)
    return backbone(input_ids=tokens, position_ids=positions % cache.context, attention_mask=mask, past_key_values=cache,
                    use_cache=True).last_hidden_state


class SlotCache:
    """Keys and values of all slots, as transformers' attention layers expect a cache: they call `update`, no more."""

    is_compileable = False

    def __init__(self, slots: int, context: int):
        self.slots, self.context = slots, context
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys, values: [slots, heads, context + 1, size] each

    def plan(self, rows: slice | torch.Tensor, positions: torch.Tensor, in_use: int) -> None:
        """Of the next forward pass: which slots are its rows, where in them its tokens [B, T] are, how many positions matter."""
        self.rows, self.in_use = rows, in_use
        self.at = torch.arange(self.slots, device=positions.device)[rows, None], positions

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """Write the new keys and values [B, heads, T, size]; return all that the rows hold [B, heads, S, size]."""
        if layer_idx == len(self.layers):
            shape = (self.slots, keys.shape[1], self.context + 1, keys.shape[3])
            self.layers.append((keys.new_zeros(shape), values.new_zeros(*shape[:3], values.shape[3])))
        (slots, positions), out = self.at, []
        for store, new in zip(self.layers[layer_idx], (keys, values)):
            store[slots, :, positions] = new.transpose(1, 2)
            out.append(store[self.rows, :, : self.in_use])
        return out[0], out[1]

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy the first n tokens of one slot into another, for each (from, to, n)."""
        longest = max((n for _, _, n in copies), default=0)
        if longest:
            source, target = torch.tensor([copy[:2] for copy in copies], device=self.layers[0][0].device).T
            for store in (s for layer in self.layers for s in layer):
                store[target, :, :longest] = store[source, :, :longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.in_use


def _common_prefix(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How many leading tokens of `ids` [L] each row [R, L'] shares: [R].

    >>> _common_prefix(np.array([[1, 2, 9], [1, 2, 3], [7, 2, 3]]), np.array([1, 2, 3])).tolist()
    [2, 3, 0]
    """
    width = min(rows.shape[1], len(ids))
    differ = np.ones((len(rows), width + 1), dtype=bool)  # the last column ends the search
    differ[:, :width] = rows[:, :width] != ids[:width]
    return differ.argmax(1)


# ----------------------------------------------------------------------------------------------------------------------
# Models: which ones will do, and a small one


@torch.no_grad()
def check_model(model) -> None:
    """Raise ValueError unless the model's logits are its head times what its layers make of keys and values in slots.

    This file and grpo.py rely on it. Says what is in the way if it is known; else compares numbers, in three short passes.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    window = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    kinds = set(getattr(config, "layer_types", None) or window)
    obstacles = {f"its layers are of the kind {', '.join(sorted(kinds))}": kinds - {"full_attention"},
                 "its head has a bias": getattr(head, "bias", None) is not None,
                 "its logits are capped": getattr(config, "final_logit_softcapping", None)}
    try:
        obstacles["its logits are not its head times its last hidden states"] = not _agrees(model, head)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:  # a model of another make
        obstacles[f"{type(e).__name__}: {e}"] = True
    for obstacle, found in obstacles.items():
        if found:
            raise ValueError(f"{type(model).__name__} cannot be used here: {obstacle}")


def _agrees(model, head) -> bool:
    """Do two passes through slots give the logits of one without?"""
    places = torch.arange(8, device=head.weight.device)
    feed, cache, hidden = torch.stack([places % head.weight.shape[0], places])[:, None], SlotCache(1, 8), []
    for part in (slice(0, 5), slice(5, 8)):
        hidden.append(_forward(model.base_model, cache, slice(0, 1), feed[..., part], part.stop))
    mask = (places[:, None] >= places)[None, None]  # as grpo.py has them
    ours, theirs = (torch.cat(hidden, 1) @ head.weight.T).float(), model(input_ids=feed[0], attention_mask=mask).logits.float()
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 0.1
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def small_model(vocab_size: int, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.7 million parameters, random but the same for the same seed. Two layers are the fewest that can copy.

    >>> sum(p.numel() for p in small_model(1024).parameters())
    656064
    """
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        head_dim=16, intermediate_size=512, tie_word_embeddings=True, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0})  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        # Heads begin by copying what they look at: where to look is all that is left to learn.
        for layer in model.model.layers:
            values, out = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
            out.copy_(0.2 * torch.nn.init.orthogonal_(values).T)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Episodes


def play(starts: list[Callable[[], Coroutine]], at_once: int, engine: Engine | None = None) -> list:
    """Run many episodes, at most `at_once` at a time; results in the order of `starts`. The first failure is raised.

    starts: functions that make an agent's coroutine, such as `lambda: Agent(engine, chat).run(env, seed)`.
    engine: is told of each agent as it begins, so that the rejoin window holds for the first message, too.
    """

    async def all_of_them() -> list:
        gate = asyncio.Semaphore(at_once)

        async def one(start: Callable[[], Coroutine]):
            async with gate:
                if engine:
                    engine.expect(asyncio.current_task())
                return await start()

        return await asyncio.gather(*(one(start) for start in starts))

    return asyncio.run(all_of_them())


# ----------------------------------------------------------------------------------------------------------------------
# python rollout.py


async def _talk(engine: Engine, prompt: list[int], seed: int, turns: int = 5) -> list[int]:
    """A stand-in for an agent: what it samples, answered by random tokens of a world, several times."""
    rng, ids, vocab = Random(seed), list(prompt), engine.head.weight.shape[0]
    for _ in range(turns):
        ids += (await engine.generate(ids, 32, rng=rng)).ids
        await asyncio.sleep(0.005)  # its tool
        ids += [rng.randrange(vocab) for _ in range(12)]
    return ids


def _demo(model, agents: int, alone: int) -> None:
    prompt = [Random(0).randrange(model.config.vocab_size) for _ in range(200)]

    def talk(numbers) -> tuple[Counter, list[list[int]], float]:
        engine = Engine(model, stop_ids=set(range(32)), context=512)
        start = time.perf_counter()
        return engine.stats, play([lambda n=n: _talk(engine, prompt, n) for n in numbers], agents), time.perf_counter() - start

    talk([0])  # the first pass of all is slow
    n, together, seconds = talk(range(agents))
    single, [by_itself], seconds_alone = talk([alone])
    parts = {name: n[name] / seconds for name in ("reading", "decoding", "waiting")}
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {model.dtype}, {model.device}, {torch.get_num_threads()} "
          f"threads; {agents} agents of 5 turns behind one prompt of {len(prompt)} tokens")
    print(f"  speed     {n['sampled'] / seconds:,.0f} sampled tokens per second; one agent alone: {single['sampled'] / seconds_alone:,.0f}")
    print("  time      " + ", ".join(f"{name} {share:.0%}" for name, share in parts.items()) + f", the rest {1 - sum(parts.values()):.0%}")
    print(f"  reuse     {n['read']:,} tokens went through the model in {n['passes']} passes; without slots that outlive a turn, "
          f"{n['context'] + n['sampled'] - agents * 5:,}")
    same = "the same tokens" if by_itself == together[alone] else "DIFFERENT TOKENS"
    print(f"  streams   agent {alone} alone and among {agents}: {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Many agents on one engine: speed, and where the time goes.")
    parser.add_argument("--bench", action="store_true", help="64 agents instead of 8")
    parser.add_argument("--model", default="", help="folder or hub id of a causal language model; empty: a small one")
    options = parser.parse_args()
    agents = 64 if options.bench else 8
    model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else small_model(1024)
    _demo(model.to("cuda" if torch.cuda.is_available() else "cpu"), agents, agents // 3)
