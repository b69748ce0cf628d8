"""Many agents at once: one batched token engine behind `generate`.

Agents are coroutines. Each asks for tokens when it wants some; the engine decodes for all that are waiting, one token each
per pass through the model. A row that is finished gives its place to the next at once, and while an agent waits for a tool
the others go on. Five ideas carry the file:

    slots        The keys and values of a context stay in a slot. A request starts from the slot that holds the longest
                 prefix of it: its own last turn, or somebody else's copy of the same prompt. One rule covers turns, groups,
                 shared instructions and rewritten histories; losing a slot costs time, never correctness.
    twins        Requests that come together with the same context are computed once, for as long as they sample the same. A
                 group's attempts often do, the more so the better the policy knows what to do.
    trunks       A decoding pass does little but read keys and values; those that contexts have in common it reads once.
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
    logps = torch.log_softmax(logits.float() / temperature.masked_fill(greedy, 1.0)[:, None], dim=-1)  # [B, V]
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
        self.weights = []

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
            logits = logits[[row for row, family in enumerate(families.values()) for _ in family]]
        uniform = torch.tensor([r.rng.random() for r in requests], dtype=torch.float64, device=logits.device)
        temperature = torch.tensor([r.temperature for r in requests], device=logits.device)
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
        weights = [probe, *((p.data_ptr(), p._version) for p in parameters)]
        if weights != self.weights:
            self.weights, self.length[:], self.held[:] = weights, 0, -1
            self.clock, self.used[:] = 0, 0  # as good as new: a resumed run must go on as one that was never stopped

    # ------------------------------------------------------------------------------------------------------------------
    # The model

    def _forward(self, requests: list[Request]) -> torch.Tensor:
        """Logits [B, V] of each request's next token."""
        slots = np.array([r.slot for r in requests])
        fed = [r.ids[held:] for r, held in zip(requests, self.length[slots])]
        counts = np.array(list(map(len, fed)))
        width, top = int(counts.max()), int(slots.max()) + 1
        valid = np.arange(width) < counts[:, None]  # [B, T]: the rest is padding
        positions = np.where(valid, self.length[slots, None] + np.arange(width), 0)
        tokens = np.zeros_like(positions)
        tokens[valid] = list(itertools.chain(*fed))
        row, column = valid.nonzero()  # [M] each
        at = np.stack([slots[row], positions[valid]])  # where their keys and values go
        self.held[*at], self.used[slots] = tokens[valid], self.clock
        self.length[slots] += counts
        self.stats.update(passes=1, read=len(row))
        # Keys of neighbouring slots are a view, those of scattered ones a copy: decode rows of idle slots along with the
        # busy ones while they are the fewer.
        dense = top <= (2 if width == 1 else 1) * len(slots)
        rows = slots if dense else np.arange(len(slots))
        feed = np.zeros((2, top if dense else len(slots), width), dtype=np.int64)
        feed[:, rows] = tokens, positions
        if width == 1 and requests != self.decoding:
            self.decoding, self.trunk = requests, self._trunk(requests, rows, feed.shape[1])
        where, new, last = slice(0, top) if dense else self._there(slots), np.stack([rows[row], column]), np.stack([rows, counts - 1])
        self.cache.plan(where, self._there(new), self._there(at), int(self.length[slots].max()))
        hidden = _read(self.backbone, self.cache, *self._there(feed), self.trunk if width == 1 else None)  # [B, T, D]
        return self.head(hidden[*self._there(last)]).float()

    def _there(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(self.head.weight.device)

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


def _read(backbone, cache: "SlotCache", tokens: torch.Tensor, positions: torch.Tensor, trunk: "Trunk | None" = None) -> torch.Tensor:
    """Hidden states [B, T, D] of new tokens [B, T] behind what `cache` holds; it knows from `plan` in which slots these are."""
    # Causal, and no row sees past its own.
    unseen = torch.arange(cache.in_use, device=tokens.device) > positions[:, None, :, None]  # [B, 1, T, S]
    mask = torch.zeros(unseen.shape, dtype=backbone.dtype, device=tokens.device).masked_fill_(unseen, -torch.inf)
    config = backbone.config
    usual, config._attn_implementation = config._attn_implementation, "slots"
    try:
        return backbone(input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True,
                        trunk=trunk).last_hidden_state
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

    A decoding pass (T = 1) does little but read keys and values. So those that a family has in common are read once for all of it.
    """
    if not trunk:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n, (keys, values) = trunk.length, trunk.gather(module.layer_idx, key, value)
    query = scaling * query.view(len(query), key.shape[1], -1, query.shape[3])  # [B, K, G, d], G = H / K
    scores = trunk.apart(trunk.together(query) @ keys.mT), query @ key[:, :, n:].mT + attention_mask[..., n:]
    shares = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)  # [B, K, G, S]
    out = trunk.apart(trunk.together(shares[..., :n]) @ values) + shares[..., n:] @ value[:, :, n:]  # [B, K, G, d]
    return out.flatten(1, 2)[:, None], None


AttentionInterface.register("slots", attend)


class SlotCache:
    """Keys and values of all slots, as transformers' attention layers expect a cache: they call `update`, no more."""

    is_compileable = False

    def __init__(self, slots: int, context: int):
        self.slots, self.context = slots, context
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys, values: [slots, heads, context, size] each

    def plan(self, rows: slice | torch.Tensor, new: torch.Tensor, at: torch.Tensor, in_use: int) -> None:
        """Of the next forward pass: which slots are its rows, which of its tokens are no padding, where their keys and values go.

        new: [2, M] row and column. at: [2, M] slot and position. in_use: how many positions matter.
        """
        self.rows, self.new, self.at, self.in_use = rows, new, at, in_use

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """Write the new keys and values [B, heads, T, size]; return all that the rows hold [B, heads, S, size]."""
        if layer_idx == len(self.layers):
            shape = (self.slots, keys.shape[1], self.context, keys.shape[3])
            self.layers.append((keys.new_zeros(shape), values.new_zeros(*shape[:3], values.shape[3])))
        (slots, positions), out = self.at, []
        for store, new in zip(self.layers[layer_idx], (keys, values)):
            store[slots, :, positions] = new.transpose(1, 2)[*self.new]
            out.append(store[self.rows, :, : self.in_use])
        return out[0], out[1]

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy the first n tokens of one slot into another, for each (from, to, n)."""
        longest = max((n for _, _, n in copies), default=0)
        if longest:
            source, target = (torch.tensor(x) for x in list(zip(*copies))[:2])
            for store in (s for layer in self.layers for s in layer):
                store[target, :, :longest] = store[source, :, :longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.in_use


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
    ids, cache, hidden = places[None] % head.weight.shape[0], SlotCache(1, 8), []
    for part in (places[:5], places[5:]):
        at = torch.stack([torch.zeros_like(part), part])  # in slot 0
        cache.plan(slice(0, 1), at - at[:, :1], at, len(part) + int(part[0]))
        hidden.append(_read(model.base_model, cache, ids[:, part], part[None]))
    mask = (places[:, None] >= places)[None, None]  # as grpo.py has them
    ours, theirs = (torch.cat(hidden, 1) @ head.weight.T).float(), model(input_ids=ids, attention_mask=mask).logits.float()
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
    _demo(AutoModelForCausalLM.from_pretrained(options.model) if options.model else small_model(1024), agents, agents // 3)
