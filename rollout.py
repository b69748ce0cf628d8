"""Many agents at once: one batched token engine behind `generate`.

Agents are coroutines. Each asks for tokens when it wants some; the engine decodes for all that are waiting, one token each
per pass through the model. A row that is finished gives its place to the next at once, and while an agent waits for a tool
the others go on. Five ideas carry the file:

    slots        The keys and values of a context stay in a slot. A request starts from the slot that holds the longest
                 prefix of it: its own last turn, or somebody else's copy of the same prompt. One rule covers turns, groups,
                 shared instructions and rewritten histories; losing a slot costs time, never correctness.
    twins        Requests that come together with the same context are computed once, for as long as they sample the same. A
                 group's attempts often do, the more so the better the policy knows what to do.
    trunks       A decoding pass does little but read keys and values; those that contexts have in common it reads once. On a GPU
                 launching its kernels takes longer still, so there it is recorded for each size, as a CUDA graph, and replayed.
    streams      Each episode samples from a random stream of its own, so it does not depend on its neighbours.
    grace        Agents that were answered in one step get a short time to come back before the next one. Quick tools thus
                 always rejoin at the same step, and a run can be repeated.

Left out: paged memory, preemption, speculative decoding, top-k and top-p (what is sampled must be what is trained), models
with sliding windows, recurrent layers or logits that are more than a product (`check_model` refuses them). Takes a transformers
causal model; serves agent.py; its episodes go to grpo.py. `python rollout.py` plays with 8 agents, `--bench [--model MODEL]` measures
64. Lift it with agent.py.
"""

import argparse
import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agent import Completion

WORTH_WAITING = 16  # tokens that a request must be spared by waiting for the next wave: a pass has a price, too
WORTH_A_TRUNK = 2000  # tokens whose keys and values a pass must be spared by reading together what contexts share


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def sample(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution. Greedy where the temperature is 0.

    logits [B, V], temperature [B], uniform [B] in [0, 1) -> tokens [B], their log-probs [B] (greedy: at temperature 1).

    >>> logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    >>> sample(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.9], dtype=torch.float64))[0].tolist()
    [1, 2]
    """
    greedy = temperature == 0
    logps = torch.log_softmax(logits.float() / temperature.masked_fill(greedy, 1.0).float()[:, None], dim=-1)  # [B, V]
    cumulative = logps.exp().cumsum(-1, dtype=torch.float64)  # in float32 the last of 150,000 terms would be rounding
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logps.argmax(-1), drawn)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# The engine


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
    slot: int = -1  # none, while it waits or goes along with its leader
    leader: "Request | None" = None  # the twin that is computed; None: itself


class Engine:
    """Continuous batching over `slots` contexts of at most `context` tokens each.

    stop_ids: tokens that end a message. grace: seconds that agents answered in one step have to come back before the next.
    Changing the model's weights in place (an optimizer does) is noticed, and all keys and values are then forgotten.
    `stats` counts, since the engine was made: steps, passes (through the model), context (tokens of all contexts it was
    given), read (tokens that went through the model) and sampled; and seconds: reading (what is new in a context), decoding, and
    waiting (for agents and their tools, while nobody decodes). Raises ValueError for a model it would get wrong.
    """

    def __init__(self, model, stop_ids: set[int], *, slots: int = 64, context: int = 1024, grace: float = 0.25):
        check_model(model)
        self.model, self.backbone, self.head = model, model.base_model, model.get_output_embeddings()
        self.stop_ids, self.slots, self.context, self.grace = stop_ids, slots, context, grace
        self.cache = SlotCache(slots, context)
        self.trunk: Trunk | None = None  # what the requests of the last decoding pass have in common
        self.decoding: list[Request] = []  # which these were
        on_gpu = model.device.type == "cuda"
        self.recorded: dict[tuple[int, int], Callable] | None = {} if on_gpu else None  # decoding passes, by rows and positions
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.held = np.full((slots, context), -1, dtype=np.int64)  # the tokens whose keys and values are in a slot; -1: none
        self.length = np.zeros(slots, dtype=np.int64)  # how many these are
        self.used = np.zeros(slots, dtype=np.int64)  # when a slot was last used, in steps
        self.active: list[Request] = []  # being continued: in a slot, or behind a leader
        self.waiting: list[Request] = []
        self.clock = 0
        self.weights: list = []  # what the keys and values were computed with
        self.serving: asyncio.Task | None = None
        self.stats = Counter()
        self.away: set[asyncio.Task] = set()  # agents that were answered in the last step
        self.all_back: asyncio.Future | None = None
        self.order: WeakKeyDictionary[asyncio.Task, int] = WeakKeyDictionary()  # first come, first served
        self.arrivals = itertools.count()

    async def generate(self, ids: list[int], max_new_tokens: int, *, rng: Random, temperature: float = 1.0) -> Completion:
        """Continue `ids` until a stop token or `max_new_tokens`. Raises ValueError if that cannot fit the context."""
        if not ids or max_new_tokens < 1 or len(ids) + max_new_tokens > self.context:
            raise ValueError(f"{len(ids)} tokens and {max_new_tokens} new ones do not fit a context of {self.context}")
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        order = self.order[task] if task in self.order else self.order.setdefault(task, next(self.arrivals))
        request = Request(list(ids), len(ids), max_new_tokens, rng, temperature, order, loop.create_future())
        if self.serving is None or self.serving.done() or self.serving.get_loop() is not loop:
            self.waiting, self.active = [], []  # of an event loop that is no more
            self.serving = asyncio.ensure_future(self._serve())
        self.waiting.append(request)
        self.stats["context"] += len(ids)
        self._back(task)
        task.remove_done_callback(self._back)
        try:
            out = await request.future
        finally:
            self._drop(request)
        self.away.add(task)
        task.add_done_callback(self._back)
        return out

    def forget(self) -> None:
        """Be as good as new, but for `stats`."""
        self.weights = self.weights[:1]

    async def _serve(self) -> None:
        """Decode for as long as anybody waits."""
        try:
            while True:
                await self._settle()
                if not self.waiting and not self.active:
                    return
                self._step()
        except BaseException as e:  # everybody who waits must hear of it, and what the slots hold is not known any more
            for request in self.waiting + self.active:
                request.future.done() or request.future.set_exception(e)
            self.waiting, self.active, self.weights = [], [], []
            if not isinstance(e, Exception):
                raise
        finally:
            self.away.clear()

    async def _settle(self) -> None:
        """Let the agents of the last step come back, but not for longer than the grace."""
        await asyncio.sleep(0)  # those that were just answered have not run yet
        if self.away:
            began = time.perf_counter()
            self.all_back = asyncio.get_running_loop().create_future()
            await asyncio.wait([self.all_back], timeout=self.grace)
            self.away.clear()
            self.stats["waiting"] += time.perf_counter() - began

    def _back(self, task: asyncio.Task) -> None:
        self.away.discard(task)
        if not self.away and self.all_back and not self.all_back.done():
            self.all_back.set_result(None)

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every request; the new ones are read first."""
        if not self.active:
            self._forget_if_trained()
        self.clock += 1
        decoding, began = [r for r in self.active if not r.leader], time.perf_counter()
        while wave := self._admit():
            for part in self._alike(wave):
                self._advance(part)
        read = time.perf_counter()
        if decoding:
            self._advance(decoding)
        self.stats.update(steps=1, reading=read - began, decoding=time.perf_counter() - read)

    def _advance(self, leaders: list[Request]) -> None:
        """Feed what their slots do not hold yet, sample the next token for each and for its twins, retire who is finished."""
        families = {leader: [leader] for leader in leaders}
        for request in self.active:
            if request.leader in families:
                families[request.leader].append(request)
        requests = [r for family in families.values() for r in family]
        logits = self._forward(leaders)  # [B, V]
        if len(requests) > len(leaders):
            logits = logits[self._there(np.repeat(np.arange(len(leaders)), [len(family) for family in families.values()]))]
        temperature, uniform = self._there(np.array([[r.temperature, r.rng.random()] for r in requests]).T)
        tokens, logps = sample(logits, temperature, uniform)
        self.stats["sampled"] += len(requests)
        sampled = torch.stack([tokens.double(), logps.double()], dim=1).tolist()  # one wait for the device, not two
        for request, (token, logp) in zip(requests, sampled):
            if math.isnan(logp):
                raise FloatingPointError("the model's logits are not finite: has the run diverged?")
            request.ids.append(int(token))
            request.logps.append(logp)
            if token in self.stop_ids or len(request.logps) == request.limit:
                self._retire(request, "stop" if token in self.stop_ids else "length")
        if len(requests) > len(leaders):
            self._separate(families)

    def _retire(self, request: Request, finish: str) -> None:
        self.active.remove(request)
        out = Completion(request.ids[request.prompt :], request.logps, finish)
        request.future.done() or request.future.set_result(out)

    def _separate(self, families: dict[Request, list[Request]]) -> None:
        """Twins that sampled another token than their leader go on behind a new one, with a copy of its keys and values."""
        copies, active = [], set(self.active)
        for leader, family in families.items():
            by_token = {leader.ids[-1]: leader} if leader in active else {}
            for request in (r for r in family[1:] if r in active):
                request.leader = by_token.get(request.ids[-1])
                if not request.leader:
                    by_token[request.ids[-1]] = request
                    request.slot = min(self._free(), key=lambda s: (self.used[s], s))
                    self._hold(request.slot, leader.ids[:-1])
                    copies.append((leader.slot, request.slot, len(leader.ids) - 1))
        self.cache.copy(copies)

    # ------------------------------------------------------------------------------------------------------------------
    # Slots

    def _admit(self) -> list[Request]:
        """Give slots to waiting requests, and to each the longest prefix of its context that some slot holds.

        Of several in a wave with the same context the first leads, the others follow. A request that shares more with one of this very
        wave than with any slot waits for the next wave: what they have in common is read once, and copied.
        """
        wave: list[Request] = []
        if not self.waiting:
            return wave
        read = np.full((self.slots, self.context), -1)  # contexts of the wave, a row each
        copies: dict[int, tuple[int, int]] = {}  # to slot: from slot, tokens
        leaders: dict[bytes, Request] = {}  # by their context
        for request in sorted(self.waiting, key=lambda r: r.order):
            if len(self.active) == self.slots:  # one for each, should twins part
                break
            ids = np.array(request.ids)
            request.leader = leaders.get(ids.tobytes())
            if request.leader:
                self.waiting.remove(request)
                self.active.append(request)
                continue
            shared = _common_prefix(self.held[:, : len(ids)], ids)  # [slots]
            # One token at least must be fed, to have something to predict from.
            best = min(int(shared.max()), len(ids) - 1)
            if wave and min(_common_prefix(read[: len(wave)], ids).max(), len(ids) - 1) >= best + WORTH_WAITING:
                continue
            free = self._free()
            # Go on in a slot only if all it holds is ours: the rest may be somebody's who is waiting for a tool.
            own = [s for s in free if shared[s] == self.length[s] and min(shared[s], len(ids) - 1) == best]
            request.slot = own[0] if own else min(free, key=lambda s: (self.used[s], s))
            if not own:
                source = int(shared.argmax())
                source = copies[source][0] if source in copies else source  # what it is about to receive is still there
                copies[request.slot] = source, best
            self._hold(request.slot, ids[:best])
            self.waiting.remove(request)
            self.active.append(request)
            read[len(wave), : len(ids)] = ids
            wave.append(request)
            leaders[ids.tobytes()] = request
        self.cache.copy([(source, target, n) for target, (source, n) in copies.items()])
        return wave

    def _free(self) -> list[int]:
        busy = {r.slot for r in self.active}
        return [slot for slot in range(self.slots) if slot not in busy]

    def _hold(self, slot: int, ids: list[int] | np.ndarray) -> None:
        """Note that a slot has the keys and values of these tokens, and of no others."""
        self.held[slot, : len(ids)] = ids
        self.held[slot, len(ids) :] = -1
        self.length[slot] = len(ids)

    def _alike(self, wave: list[Request]) -> list[list[Request]]:
        """Cut a wave by what is to be read: a turn's few new tokens are not to be padded to the length of a whole prompt."""

        def new(request: Request) -> int:
            return len(request.ids) - int(self.length[request.slot])

        return [list(part) for _, part in itertools.groupby(sorted(wave, key=new), key=lambda r: max(new(r), 31).bit_length())]

    def _drop(self, request: Request) -> None:
        """Forget a request whose agent no longer waits for it (it was answered, or cancelled). A twin inherits its slot."""
        for queue in (self.waiting, self.active):
            if request in queue:
                queue.remove(request)
        twins = [r for r in self.active if r.leader is request]
        for twin in twins:
            twin.leader = twins[0] if twin is not twins[0] else None
        if twins:
            twins[0].slot = request.slot

    def _forget_if_trained(self) -> None:
        parameters = list(self.model.parameters())
        probe = torch.cat([p.detach().flatten()[:4] for p in parameters]).tolist()  # fused optimizers do not count versions
        weights = [[p.data_ptr() for p in parameters], probe, [p._version for p in parameters]]
        if self.recorded and weights[:1] != self.weights[:1]:
            self.recorded.clear()  # they read the old tensors
        if weights != self.weights:
            self.weights, self.length[:], self.held[:] = weights, 0, -1
            self.clock, self.used[:] = 0, 0  # as good as new: a resumed run must go on as one that was never stopped

    # ------------------------------------------------------------------------------------------------------------------
    # The model

    def _forward(self, requests: list[Request]) -> torch.Tensor:
        """Logits [B, V] of each request's next token."""
        slots = np.array([r.slot for r in requests])
        feed, last = self._feed(requests, slots)  # [2, B, T], [B]
        decoding, in_use = feed.shape[2] == 1, int(self.length[slots].max())
        if decoding and self.recorded is not None:
            return self._replay(slots, feed, in_use)
        # Keys of neighbouring slots are a view, those of scattered ones a copy: decode rows of idle slots along with the
        # busy ones while they are the fewer.
        dense = slots.max() < (2 if decoding else 1) * len(slots)
        where, rows = (slice(0, slots.max() + 1), slots) if dense else (self._there(slots), np.arange(len(slots)))
        feed = self._spread(feed, rows, rows.max() + 1)
        if decoding and requests != self.decoding:
            self.decoding, self.trunk = requests, self._trunk(requests, rows, feed.shape[1])
        hidden = _read(self.backbone, self.cache, where, self._there(feed), in_use, self.trunk if decoding else None)  # [B, T, D]
        return self.head(hidden[*self._there(np.stack([rows, last]))]).float()

    def _feed(self, requests: list[Request], slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What slots do not hold of their requests' contexts: tokens and positions [2, B, T]; where in T the last of each is, [B]."""
        fed = [r.ids[held:] for r, held in zip(requests, self.length[slots])]
        counts = np.array(list(map(len, fed)))
        valid = np.arange(counts.max()) < counts[:, None]  # [B, T]: the rest is padding
        positions = np.where(valid, self.length[slots, None] + np.arange(counts.max()), self.context)
        tokens = np.zeros_like(positions)
        tokens[valid] = list(itertools.chain(*fed))
        self.held[slots[valid.nonzero()[0]], positions[valid]] = tokens[valid]
        self.used[slots] = self.clock
        self.length[slots] += counts
        self.stats.update(passes=1, read=int(counts.sum()))
        return np.stack([tokens, positions]), counts - 1

    def _spread(self, feed: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
        """The same in these of `count` rows; the others are padding."""
        out = np.zeros((2, count, feed.shape[2]), dtype=np.int64)
        out[1] = self.context
        out[:, rows] = feed
        return out

    def _replay(self, slots: np.ndarray, feed: np.ndarray, in_use: int) -> torch.Tensor:
        """Logits [B, V] of a decoding pass, recorded once for each size: a GPU is done before its kernels are launched one by one."""
        count, in_use = _size(int(slots.max()) + 1, 8, self.slots), _size(in_use, 256, self.context)

        def logits(feed: torch.Tensor) -> torch.Tensor:
            return self.head(_read(self.backbone, self.cache, slice(0, count), feed, in_use)[:, 0]).float()

        feed = self._there(self._spread(feed, slots, count))
        if (count, in_use) not in self.recorded:
            self.recorded[count, in_use] = record(logits, feed, self.pool)
        return self.recorded[count, in_use](feed)[self._there(slots)]

    def _there(self, x: np.ndarray) -> torch.Tensor:
        """On the model's device, without waiting for what the device is doing."""
        x, device = torch.from_numpy(x), self.head.weight.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    def _trunk(self, requests: list[Request], rows: np.ndarray, count: int) -> "Trunk | None":
        """What the requests in these of `count` rows have in common, cut where most is saved; None if that is too little."""
        by_agent = np.argsort([r.order for r in requests], kind="stable")  # a group's agents came one after the other
        slots, rows = np.array([r.slot for r in requests])[by_agent], rows[by_agent]
        held = self.held[slots, : self.length[slots].max()]
        shared = np.minimum(_common_prefix(held[1:], held[:-1]), self.length[slots[1:]])  # [B - 1], with the one before
        lengths = np.sort(shared)[::-1]
        families = np.arange(len(lengths), 0, -1)  # that a trunk of such a length leaves
        saved = lengths * (len(rows) - 3 * families)  # the keys of each are read, written and read again
        if saved.max(initial=0) < WORTH_A_TRUNK:
            return None
        length = int(lengths[saved.argmax()])
        family = np.cumsum([0, *(shared < length)])
        first = np.flatnonzero(np.diff(family, prepend=-1))
        place = np.stack([family, np.arange(len(rows)) - first[family]])
        table = np.repeat(rows[first, None], place[1].max() + 1, axis=1)
        table[*place] = rows
        places = np.zeros((2, count), dtype=np.int64)
        places[:, rows] = place
        return Trunk(length, self._there(table), self._there(places))


def _read(backbone, cache: "SlotCache", rows: slice | torch.Tensor, feed: torch.Tensor, in_use: int, trunk: "Trunk | None" = None):
    """Hidden states [B, T, D] of the tokens and positions [2, B, T] of `feed`, behind what these slots of `cache` hold.

    in_use: how many positions matter. Padding has the position `cache.context`: it is written there, and nobody sees it.
    """
    tokens, positions = feed
    cache.plan(rows, positions, in_use)
    # Causal, and no row sees past its own.
    unseen = torch.arange(in_use, device=feed.device) > positions[:, None, :, None]  # [B, 1, T, S]
    mask = torch.zeros(unseen.shape, dtype=backbone.dtype, device=feed.device).masked_fill_(unseen, -torch.inf)
    config = backbone.config
    usual, config._attn_implementation = config._attn_implementation, "slots"
    try:
        return backbone(input_ids=tokens, position_ids=positions % cache.context, attention_mask=mask, past_key_values=cache,
                        use_cache=True, trunk=trunk).last_hidden_state
    finally:
        config._attn_implementation = usual


@dataclass
class Trunk:
    """Families: rows of a decoding pass whose contexts begin with the same tokens."""

    length: int  # how many tokens; the same number for all families
    rows: torch.Tensor  # [F, M] which rows a family has; a smaller one names its first again
    places: torch.Tensor  # [2, B] of which family a row is, and which of it
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # by layer: keys, values

    def gather(self, layer: int, *stores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, K, S, d] of each row -> [K, F, length, d] of each family; once for as long as the rows stay the same."""
        if layer not in self.kept:
            self.kept[layer] = tuple(x.transpose(0, 1)[:, self.rows[:, 0], : self.length] for x in stores)
        return self.kept[layer]

    def together(self, x: torch.Tensor) -> torch.Tensor:
        """[B, K, G, n] -> [K, F, M * G, n]"""
        return x.transpose(0, 1)[:, self.rows].flatten(2, 3)

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """[K, F, M * G, n] -> [B, K, G, n]"""
        return x.unflatten(2, (self.rows.shape[1], -1))[:, *self.places].transpose(0, 1)


def attend(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, *, scaling: float,
           trunk: Trunk | None = None, **kwargs) -> tuple[torch.Tensor, None]:
    """Attention of queries [B, H, T, d] over keys and values [B, K, S, d], as transformers' layers call it -> [B, T, H, d].

    A decoding pass (T = 1) does little but read keys and values. So those that a family has in common are read once for all of it,
    and those that several heads have in common once for all of them (torch's attention, given a mask, wants a copy for each).
    """
    if query.shape[2] > 1 or not trunk and query.shape[1] == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n = trunk.length if trunk else 0
    query = scaling * query.view(len(query), key.shape[1], -1, query.shape[3])  # [B, K, G, d], G = H / K
    scores = query @ key[:, :, n:].mT + attention_mask[..., n:]
    if trunk:
        keys, values = trunk.gather(module.layer_idx, key, value)
        scores = torch.cat([trunk.apart(trunk.together(query) @ keys.mT), scores], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)  # [B, K, G, S]
    out = shares[..., n:] @ value[:, :, n:]  # [B, K, G, d]
    if trunk:
        out = out + trunk.apart(trunk.together(shares[..., :n]) @ values)
    return out.flatten(1, 2)[:, None], None


AttentionInterface.register("slots", attend)


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


def record(function: Callable, feed: torch.Tensor, pool) -> Callable:
    """A CUDA graph of `function`, for inputs of this shape. It reads and writes the very tensors that were there when it was recorded
    (weights, slots), and each replay overwrites what the last one returned. Graphs of one memory pool share what they need in between.
    These lines have not met a GPU yet; the tests put something else in their place.
    """
    feed, graph, side = feed.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(feed)  # libraries set themselves up when they are first used, which cannot be recorded
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, pool=pool):
        out = function(feed)

    def replay(new: torch.Tensor) -> torch.Tensor:
        feed.copy_(new)
        graph.replay()
        return out

    return replay


def _size(n: int, least: int, most: int) -> int:
    """The next power of two times `least`, but not more than `most`: few sizes, none more than twice too large.

    >>> [_size(n, 8, 48) for n in (1, 8, 9, 30, 40)]
    [8, 8, 16, 32, 48]
    """
    return min(most, least << max(0, math.ceil(math.log2(n / least))))


def _common_prefix(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How many leading tokens of `ids`, or of its own line of them, each row shares.

    >>> _common_prefix(np.array([[1, 2, 9], [1, 2, 3], [7, 2, 3]]), np.array([1, 2, 3])).tolist()
    [2, 3, 0]
    """
    width = min(rows.shape[1], ids.shape[-1])
    differ = rows[:, :width] != ids[..., :width]
    return np.where(differ.any(1), differ.argmax(1), width)


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
        hidden.append(_read(model.base_model, cache, slice(0, 1), feed[..., part], part.stop))
    mask = (places[:, None] >= places)[None, None]  # as grpo.py has them
    ours, theirs = (torch.cat(hidden, 1) @ head.weight.T).float(), model(input_ids=feed[0], attention_mask=mask).logits.float()
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 0.1
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def small_model(vocab_size: int, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of about a million parameters, random but the same for the same seed. Two layers are the fewest that can copy.

    >>> sum(p.numel() for p in small_model(1024).parameters())
    738208
    """
    config = Qwen3Config(vocab_size=vocab_size, hidden_size=160, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=8, head_dim=32, intermediate_size=256, tie_word_embeddings=True,
                         max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        for layer in model.model.layers:  # heads begin by copying what they look at: where to look is all that is left to learn
            values, out = layer.self_attn.v_proj.weight.data, layer.self_attn.o_proj.weight.data
            out.copy_(0.2 * torch.nn.init.orthogonal_(values).T)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Episodes


def play(starts: list[Callable[[], Coroutine]], at_once: int) -> list:
    """Run many episodes, at most `at_once` at a time; results in the order of `starts`. The first failure is raised.

    starts: functions that make an agent's coroutine, such as `lambda: Agent(engine, chat).run(env, seed)`.
    """

    async def all_of_them() -> list:
        gate = asyncio.Semaphore(at_once)

        async def one(start: Callable[[], Coroutine]):
            async with gate:
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
