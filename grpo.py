"""GRPO for agents, by hand: advantages within a group, rows folded into trees, one update.

    episodes of one task -> advantage of each = its reward minus the group's mean
    segments             -> rows: ids, and which of them were sampled
    rows                 -> `plain_loss`: the idea. All below it computes the same, faster:
    rows                 -> trees: what rows have in common is computed once, be it a prompt or what several attempts did
    trees                -> hidden states at the sampled tokens -> linear_policy_loss -> gradients -> AdamW

Unlike PPO there is no value network: the other attempts at the same task are the baseline. Unlike the first GRPO, the
advantage is not divided by the group's standard deviation, every token of the step weighs the same, clipping is wider
upwards, and there is no KL term: this is where the field has settled (each is an option below). Imitation is the same
update with advantage 1 and `kind="reinforce"`.

Several processes hold the same batch: each computes its share of the packs, and gradients are added up.

Left out: a replay buffer, a critic, LoRA. Takes episodes from rollout.py (anything with `segments`, `reward`, `group`,
`finish`, `states`, `task`); changes a model's weights; reports a dict. `python grpo.py` solves a bandit, `--bench [--model MODEL]`
says where the time of an update goes. Lift it together with kernels.py.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from kernels import linear_logps, linear_policy_loss

if TYPE_CHECKING:
    from agent import Episode


@dataclass
class GRPOConfig:
    """The options of the update. In the order in which they take effect."""

    divide_by_std: bool = field(default=False, metadata={"help": "divide a group's advantages by their deviation (GRPO)"})
    leave_one_out: bool = field(default=False, metadata={"help": "baseline: the mean of the other attempts only (RLOO)"})
    negative_weight: float = field(default=1.0, metadata={
        "help": "factor of advantages below 0: blame spreads probability over all other tokens, praise gathers it"})
    turn_credit: float = field(default=0.0, metadata={"help": "weight of turn-level credit among equal states of a task (GiGPO)"})
    normaliser: Literal["token", "episode", "constant"] = field(default="token", metadata={
        "help": "token: all tokens weigh the same (DAPO); episode: every episode (GRPO), constant: normaliser_tokens (Dr. GRPO)"})
    normaliser_tokens: int = field(default=256, metadata={"help": "for normaliser=constant: tokens an episode is taken to have"})
    kind: Literal["clip", "cispo", "reinforce"] = field(default="clip", metadata={"help": "policy loss; clip is PPO's"})
    sequence_ratio: bool = field(default=False, metadata={"help": "one ratio for all of an episode's tokens (GSPO)"})
    eps_low: float = field(default=0.2, metadata={"help": "ratios below 1 - eps_low are clipped"})
    eps_high: float = field(default=0.28, metadata={"help": "ratios above 1 + eps_high are clipped"})
    dual_clip: float | None = field(default=None, metadata={"help": "bound on the ratio where the advantage is negative (3)"})
    tis_cap: float | None = field(default=None, metadata={"help": "cap of the correction for rollouts in another precision (2)"})
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL term to the model before RL"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus"})
    epochs: int = field(default=3, metadata={"help": "updates per batch of episodes"})
    pack_tokens: int = field(default=2048, metadata={
        "help": "tokens computed in one pass (memory, not maths); rows that share a prefix may exceed it"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "the gradient is scaled down to this norm"})


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def advantages(rewards: Sequence[float], groups: Sequence, divide_by_std=False, leave_one_out=False) -> list[float]:
    """Advantage of each episode: its reward minus the mean of its group (DeepSeekMath, arXiv 2402.03300; RLOO, 2402.14740).

    A group of one, or of rewards that are equal but for rounding, gives exactly 0, and the deviation has a floor: Adam makes a
    full step of a gradient however small, so rounding must not become signal.

    >>> advantages([1.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 7])
    [0.5, -0.5, -0.5, 0.5, 0.0]
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    out = [0.0] * len(rewards)
    for group in members.values():
        r = np.array([rewards[i] for i in group], dtype=np.float64)
        if r.max() - r.min() < 1e-6:
            continue
        a = r - r.mean()
        a = a * len(r) / (len(r) - 1) if leave_one_out else a
        a = a / max(r.std(), 1e-3) if divide_by_std else a
        for i, value in zip(group, a.tolist()):
            out[i] = value
    return out


def turn_advantages(episodes: Sequence[Episode], divide_by_std: bool = False, leave_one_out: bool = False) -> list[list[float]]:
    """Advantage of each turn: what followed it, minus the mean of what followed in the same state of the same task.

    GiGPO (arXiv 2505.10978), with the episode's reward as return. A state that an episode visits twice counts once, so
    the baseline is over episodes. Turns are compared by state, never by number: those still alive at turn k are a biased
    sample of the group.

    >>> from types import SimpleNamespace as E
    >>> turn_advantages([E(group=0, reward=1.0, states=["start", "door"]), E(group=0, reward=0.0, states=["start"])])
    [[0.5, 0.0], [-0.5]]
    """
    visits = {(i, state): (e.group, state) for i, e in enumerate(episodes) for state in e.states}
    rewards = [episodes[i].reward for i, _ in visits]
    value = dict(zip(visits, advantages(rewards, list(visits.values()), divide_by_std, leave_one_out)))
    return [[value[i, state] for state in e.states] for i, e in enumerate(episodes)]


# ----------------------------------------------------------------------------------------------------------------------
# Rows: what there is to learn from


@dataclass
class Row:
    """One segment as the update sees it."""

    ids: list[int]
    trained: list[int]  # positions of the sampled tokens in `ids`, ascending, never 0
    advantages: list[float]  # one for each of these
    logps: list[float]  # and the log-prob it was sampled with: the engine's word, for diagnostics and tis_cap
    episode: int  # which episode: the sequence of a sequence ratio

    @property
    def inputs(self) -> list[int]:
        """What a model must read: the last trained token, and what follows it, predicts nothing that is trained."""
        return self.ids[: self.trained[-1]]


def make_rows(episodes: Sequence[Episode], config: GRPOConfig) -> tuple[list[Row], list[float], dict[str, float]]:
    """Rows of the episodes that carry signal, the advantage of every episode, and the share of groups without any.

    Statistics are over episodes, never over segments. An episode whose environment failed, or could not say how good it was,
    leaves its group. KL and entropy are signal for every sampled token, whatever its advantage:
    otherwise they would fade as the policy gets better and ever more groups have equal rewards.
    """
    silent_too = bool(config.kl_coef or config.entropy_coef)
    sound = [e for e in episodes if e.finish != "error" and math.isfinite(e.reward)]
    options = config.divide_by_std, config.leave_one_out
    values = advantages([e.reward for e in sound], [e.group for e in sound], *options)
    turns = turn_advantages(sound, *options) if config.turn_credit else None
    rows = []
    for i, e in enumerate(sound):
        of_turn = [values[i] + config.turn_credit * t for t in turns[i]] if turns else [values[i]] * e.turns
        of_turn = [a if a > 0 else config.negative_weight * a for a in of_turn]
        rows += episode_rows(e, i, of_turn, silent_too)
    by_id = {id(e): a for e, a in zip(sound, values)}
    groups = {e.group for e in episodes}
    signal = {e.group for e, a in zip(sound, values) if a}
    return rows, [by_id.get(id(e), 0.0) for e in episodes], {"no_signal": 1 - len(signal) / len(groups) if groups else 1.0}


def episode_rows(episode: Episode, number: int, of_turn: Sequence[float],
                 silent_too: bool = False) -> list[Row]:
    """One row for each segment of which some token is trained. `of_turn`: advantage of each turn.

    Trained are the sampled tokens whose advantage is not 0; with `silent_too`, all sampled tokens.
    """
    rows = []
    for s in episode.segments:
        sampled = [p for p, chosen in enumerate(s.sampled) if chosen]
        trained = [p for p in sampled if silent_too or of_turn[s.turn[p]]]
        if trained:
            rows.append(Row(s.ids, trained, [of_turn[s.turn[p]] for p in trained], [s.logps[p] for p in trained], number))
    return rows


def token_weights(rows: Sequence[Row], config: GRPOConfig) -> list[list[float]]:
    """The factor of each trained token in the loss. Fixed here for the whole batch, before it is cut into packs.

    What is not trained is not counted: a group of equal rewards must not dilute the others, unless
    KL or entropy train its tokens, too.

    >>> rows = [Row([1, 2, 3], [1, 2], [1.0, 1.0], [0.0, 0.0], 0), Row([1, 2], [1], [-1.0], [0.0], 1)]
    >>> token_weights(rows, GRPOConfig(normaliser="episode"))
    [[0.25, 0.25], [0.5]]
    """
    tokens = defaultdict(int)
    for row in rows:
        tokens[row.episode] += len(row.trained)
    total = sum(tokens.values())
    factor = {"token": lambda e: 1 / total,
              "episode": lambda e: 1 / (tokens[e] * len(tokens)),
              "constant": lambda e: 1 / (config.normaliser_tokens * len(tokens))}[config.normaliser]
    return [[factor(row.episode)] * len(row.trained) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# The plain loss: all of GRPO that is not advantages


def plain_loss(model, rows: Sequence[Row], config: GRPOConfig, temperature: float = 1.0):
    """PPO's clipped loss of all rows, in the plainest way. `update` computes the same, but faster.

    Rows are padded to one length, and every token gets logits for the whole vocabulary. The ratio
    is to the policy that sampled. Without KL, entropy, and the other options of the loss.
    """
    device = next(model.parameters()).device
    length = max(len(row.ids) for row in rows)
    padded = [row.ids + [0] * (length - len(row.ids)) for row in rows]
    ids = torch.tensor(padded, device=device)  # [R, T]

    # Padding stands at the right, so no token of a row looks at it.
    logits = model(input_ids=ids).logits / temperature  # [R, T, V]
    log_probs = logits.log_softmax(-1)  # [R, T, V]

    loss = 0.0
    for number, (row, weights) in enumerate(zip(rows, token_weights(rows, config))):
        position = torch.tensor(row.trained, device=device)  # [N]
        token = ids[number, position]  # [N]
        logps = log_probs[number, position - 1, token]  # [N] what stands before a token predicts it

        values = torch.tensor([row.logps, row.advantages, weights], dtype=torch.float64)  # [3, N]
        old_logps, advantage, weight = values.to(logps)
        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        # The smaller of the two: a step that goes too far gains nothing more.
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = loss - (weight * gain).sum()
    return loss


# ======================================================================================================================
# This is the idea. What follows computes the same, faster and in less memory; a test compares them.
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Packs: what rows have in common, once

# A tree saves tokens, but each of its tokens looks at all others.
DENSE = 300  # tokens at which that costs as much as the rest of a layer (measured with the small model; more for larger ones)
PASS = 100  # tokens that cost as much as starting one more pass


class Tree:
    """A prefix tree of rows: a token is one node for all rows that are the same up to it.

    Rows are added in sorted order. So nodes are numbered depth first, and the nodes below a node
    are the ones right behind it. `ends` says where these end: node i lies below node j, or is j,
    if j <= i < ends[j]. That is all that attention has to know.

    >>> tree = Tree()
    >>> for ids in ([5, 6, 7, 1], [5, 6, 8, 9, 1]):
    ...     tree.add(Row(ids, [len(ids) - 1], [1.0], [0.0], 0), [1.0])
    >>> tree.ids, tree.positions, tree.ends
    ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3], [5, 5, 3, 5, 5])
    """

    def __init__(self):
        self.ids: list[int] = []  # a token for each node
        self.positions: list[int] = []  # in the rows that share it
        self.ends: list[int] = []  # one past the last node below it
        self.path: list[int] = []  # the nodes of the row that was added last
        self.rows: list[tuple[Row, list[float], list[int]]] = []  # with its weights, and its nodes

    def add(self, row: Row, weights: list[float]) -> None:
        """Of all rows before it, a sorted row shares most with the last one."""
        tokens, first = row.inputs, len(self.ids)
        shared = _common_prefix([self.ids[node] for node in self.path], tokens)
        new = tokens[shared:]
        self.ids += new
        self.positions += range(shared, len(tokens))
        self.ends += [0] * len(new)
        self.path = [*self.path[:shared], *range(first, len(self.ids))]
        for node in self.path:
            self.ends[node] = len(self.ids)
        self.rows.append((row, weights, self.path))

    @property
    def branches(self) -> bool:
        """False: each node follows the one before it, as in a single row."""
        return min(self.ends) < len(self.ids)


@dataclass
class Pack:
    """Trees side by side, and what is to be trained in them."""

    ids: torch.Tensor  # [B, T] a tree in each line, padded at the right
    positions: torch.Tensor  # [B, T]
    ends: torch.Tensor | None  # [B, T] as in Tree; None: no tree branches, so attention is causal
    source: torch.Tensor  # [N] which of the B * T hidden states predicts a trained token; one may serve several rows
    targets: torch.Tensor  # [N] the trained tokens
    advantages: torch.Tensor  # [N] in float64, as the next two: the loss rounds to its precision
    weights: torch.Tensor  # [N] with the token normaliser they sum to 1 over all packs of a batch
    behavior_logps: torch.Tensor  # [N]
    episodes: torch.Tensor  # [N] which episode a token is of
    old_logps: torch.Tensor | None = None  # [N] of the first epoch; None during it
    ref_logps: torch.Tensor | None = None  # [N]


def make_packs(rows: Sequence[Row], config: GRPOConfig, device: torch.device | str = "cpu",
               rank: int = 0, world: int = 1) -> list[Pack]:
    """Fold rows into trees, and lay trees of about one size side by side.

    Trees side by side have at most `pack_tokens` tokens. A tree alone may have more: whoever cuts
    it computes its prefix twice. A sequence that has one ratio for all its tokens is never cut.
    All processes of a run lay out the same packs; each makes tensors only for its own.
    """
    sequences = defaultdict(list)
    for number, (row, weights) in enumerate(zip(rows, token_weights(rows, config))):
        sequences[row.episode if config.sequence_ratio else number].append((row, weights))
    ordered = sorted(sequences.values(), key=lambda s: s[0][0].inputs)  # neighbours begin alike
    trees = _fold(ordered)
    packs: list[list[Tree]] = []
    for tree in sorted(trees, key=lambda t: len(t.ids)):
        if packs and _fits(tree, packs[-1], config.pack_tokens):
            packs[-1].append(tree)
        else:
            packs.append([tree])
    return [_pack(trees, device) for trees in packs[rank::world]]


def _cost(tokens: int) -> float:
    return tokens * (1 + tokens / DENSE)


def _fold(sequences: list[list[tuple[Row, list[float]]]]) -> list[Tree]:
    """Trees of neighbouring sequences, cut where all of them together cost least: the best cut before each is found in turn.

    This also bounds their size. Attention compares each token of a tree with all others, so a
    large tree costs more than a second copy of the prefix. No tree has more tokens than three
    times its longest sequence, plus DENSE; an attention mask has the square of that.
    """
    tokens = np.cumsum([0] + [len(_tree([s]).ids) for s in sequences])
    shared = np.cumsum([0, 0] + [_common_prefix(a[0][0].inputs, b[0][0].inputs) for a, b in pairwise(sequences)])
    least, begin = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=int)
    for end in range(1, len(tokens)):
        sizes = tokens[end] - tokens[:end] - (shared[end] - shared[1 : end + 1])  # of the tree that begins at 0, 1, ...
        costs = least[:end] + _cost(sizes)
        begin[end], least[end] = costs.argmin(), costs.min()
    trees, end = [], len(sequences)
    while end:
        trees.append(_tree(sequences[begin[end] : end]))
        end = begin[end]
    return trees


def _tree(sequences: list[list[tuple[Row, list[float]]]]) -> Tree:
    tree = Tree()
    for row, weights in sorted(chain(*sequences), key=lambda r: r[0].inputs):
        tree.add(row, weights)
    return tree


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _fits(tree: Tree, pack: list[Tree], pack_tokens: int) -> bool:
    """Is padding the others to its length cheaper than a pass of its own?"""
    width, before = len(tree.ids), len(pack[-1].ids)
    return (len(pack) + 1) * width <= pack_tokens and len(pack) * (_cost(width) - _cost(before)) <= PASS


def _pack(trees: list[Tree], device: torch.device | str) -> Pack:
    width = max(len(tree.ids) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    # Padding goes on counting: a position that does not would look like the start of another row.
    positions = torch.arange(width).repeat(len(trees), 1)
    ends = torch.full_like(ids, width)
    source, targets, episodes, advantages, weights, logps = [], [], [], [], [], []
    for line, tree in enumerate(trees):
        size = len(tree.ids)
        ids[line, :size] = torch.tensor(tree.ids)
        positions[line, :size] = torch.tensor(tree.positions)
        ends[line, :size] = torch.tensor(tree.ends)
        for row, row_weights, nodes in tree.rows:
            source += [line * width + nodes[position - 1] for position in row.trained]
            targets += [row.ids[position] for position in row.trained]
            episodes += [row.episode] * len(row.trained)
            advantages += row.advantages
            weights += row_weights
            logps += row.logps

    def column(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Pack(
        ids=ids.to(device), positions=positions.to(device),
        ends=ends.to(device) if any(tree.branches for tree in trees) else None,
        source=column(source, torch.long), targets=column(targets, torch.long),
        advantages=column(advantages, torch.float64), weights=column(weights, torch.float64),
        behavior_logps=column(logps, torch.float64), episodes=column(episodes, torch.long))


# ----------------------------------------------------------------------------------------------------------------------
# The update


def hidden_states(model, pack: Pack) -> torch.Tensor:
    """The last hidden state [N, D] before each trained token. The gradients of all rows that share a token meet in it."""
    mask = attention_mask(pack, next(model.parameters()).dtype)
    states = model.base_model(input_ids=pack.ids, position_ids=pack.positions,
                              attention_mask=mask, use_cache=False)
    # Not states[source], although that is what it is: its backward pass adds up in another order each time.
    return torch.nn.functional.embedding(pack.source, states.last_hidden_state.flatten(0, 1))


def attention_mask(pack: Pack, dtype: torch.dtype) -> torch.Tensor | None:
    """[B, 1, T, T]: 0 where a token attends to another, else -inf. None: to all that precede it.

    All layers share this mask. From a boolean one, attention makes such a mask in each layer, and
    keeps it for the backward pass.
    """
    if pack.ends is None:
        return None
    lines, width = pack.ids.shape
    key = torch.arange(width, device=pack.ids.device)  # [T]
    query = key[:, None]  # [T, 1]
    attends = (key <= query) & (query < pack.ends[:, None, None, :])  # [B, 1, T, T]
    # A GPU wants lines that begin at multiples of 8 numbers, or copies the mask in each layer.
    aligned = -(-width // 8) * 8
    mask = torch.full((lines, 1, width, aligned), -math.inf, dtype=dtype, device=key.device)
    return mask[..., :width].masked_fill_(attends, 0.0)


def pack_loss(hidden: torch.Tensor, head: torch.Tensor, pack: Pack, config: GRPOConfig, temperature: float = 1.0):
    """(loss, Stats) of one pack, from its hidden states [N, D] and the head [V, D]: its share of the batch's loss."""
    return linear_policy_loss(
        hidden, head, pack.targets, pack.advantages, pack.weights,
        old_logps=pack.old_logps, behavior_logps=pack.behavior_logps if config.tis_cap else None, ref_logps=pack.ref_logps,
        eps_low=config.eps_low, eps_high=config.eps_high, dual_clip=config.dual_clip, tis_cap=config.tis_cap,
        kl_coef=config.kl_coef, entropy_coef=config.entropy_coef, kind=config.kind,
        sequence_ids=pack.episodes if config.sequence_ratio else None, temperature=temperature)  # fmt: skip


def add_gradients(model, packs: list[Pack], config: GRPOConfig, temperature: float = 1.0) -> list:
    """Add the gradients of all packs to the model's, in the order of the packs. Returns (loss, Stats) of each.

    The operations of a large model share the cores. Those of a small one are too short for that:
    with one thread for each (`torch.set_num_threads(1)`), whole packs are computed side by side.
    Then the sums, and so the bits, are the same on any number of cores, and no operation waits
    for a thread that has lost its core to another program.
    """
    if torch.get_num_threads() > 1 or any(hasattr(p, "master") for p in model.parameters()):
        return [add_gradient(model, pack, config, temperature) for pack in packs]
    with ThreadPoolExecutor(cores()) as threads:
        largest_first = [threads.submit(pack_gradient, model, p, config, temperature) for p in reversed(packs)]
    results = []
    for future in reversed(largest_first):
        loss, stats, gradients = future.result()
        add_to_gradients(model, gradients)
        results.append((loss, stats))
    return results


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_gradient(model, pack: Pack, config: GRPOConfig, temperature: float = 1.0):
    """Add the gradient of a pack's loss to the model's, and nothing else. Returns (loss, Stats)."""
    head = model.get_output_embeddings().weight
    loss, stats = pack_loss(hidden_states(model, pack), head, pack, config, temperature)
    loss.backward()
    return loss.item(), stats


def pack_gradient(model, pack: Pack, config: GRPOConfig, temperature: float):
    """(loss, Stats, gradients) of a pack: a gradient, or None, for each parameter. Changes nothing, so threads may share a model."""
    head = model.get_output_embeddings().weight
    loss, stats = pack_loss(hidden_states(model, pack), head, pack, config, temperature)
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.item(), stats, torch.autograd.grad(loss, trained, allow_unused=True)


@torch.no_grad()
def add_to_gradients(model, gradients: Sequence[torch.Tensor | None]) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, gradient in zip(trained, gradients):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


@torch.no_grad()
def pack_logps(model, pack: Pack, temperature: float = 1.0) -> torch.Tensor:
    """[N] the log-probs a model gives to the trained tokens."""
    head = model.get_output_embeddings().weight
    return linear_logps(hidden_states(model, pack), head, pack.targets, temperature=temperature)[0]


def update(model, optimizer, rows: Sequence[Row], config: GRPOConfig, temperature: float = 1.0, reference=None) -> dict:
    """Improve the model on a batch of rows, once per epoch. Returns what happened.

    Ratios are to the policy before the first epoch, whose log-probs are this function's own first ones: the engine's may
    come from another precision. A gradient that is not finite is not applied: it would stay in Adam's averages for ever.
    `skipped` counts these; the rest of the report is of the last epoch. `largest_pack`: tokens, padding included. Of several
    processes each is given all rows: so every normaliser is that of the whole batch, and who rolled an episode out does not
    matter here.
    """
    device = next(model.parameters()).device
    packs = make_packs(rows, config, device, *ranks())  # this process may have none
    report = {"loss": 0.0, "entropy": math.nan, "ratio_max": 1.0, "clipped": 0.0, "kl": math.nan,
              "largest_pack": 0, "grad_norm": 0.0, "skipped": 0}
    if reference is not None and config.kl_coef:
        for pack in packs:
            pack.ref_logps = pack_logps(reference, pack, temperature)
    for _ in range(config.epochs if rows else 0):
        forget_gradients(model)
        results = add_gradients(model, packs, config, temperature)
        for pack, (_, stats) in zip(packs, results):
            pack.old_logps = stats.logps if pack.old_logps is None else pack.old_logps
        sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(masters(model), config.max_grad_norm).item()
        if math.isfinite(norm):
            with sharded(model):
                optimizer.step()
            follow_masters(model)
        skipped = report["skipped"] + int(not math.isfinite(norm))
        report = {**_report(packs, results), "grad_norm": norm, "skipped": skipped}
    forget_gradients(model)
    return report


def _report(packs: list[Pack], results: list) -> dict[str, float]:
    """What all processes together have to say of an epoch."""
    names = ("logps", "entropy", "ratio", "clipped")
    own = [torch.empty(5, 0)]
    for pack, (_, stats) in zip(packs, results):
        columns = [getattr(stats, name).float() for name in names]
        own.append(torch.stack([*columns, pack.behavior_logps.float()]).cpu())  # [5, N]
    loss = sum(loss for loss, _ in results)
    largest = max((pack.ids.numel() for pack in packs), default=0)
    losses, sizes, columns = zip(*gather((loss, largest, torch.cat(own, dim=1))))
    logps, entropy, ratio, clipped, behavior_logps = torch.cat(columns, dim=1)
    gap = logps - behavior_logps  # log(policy now / policy that sampled)
    return {"loss": sum(losses), "entropy": entropy.nanmean().item(), "ratio_max": ratio.nan_to_num(1.0).max().item(),
            "clipped": clipped.nanmean().item(), "kl": (gap.exp() - gap - 1).nanmean().item(),
            "largest_pack": max(sizes)}


# ----------------------------------------------------------------------------------------------------------------------
# Precision and memory


def compute_in(model, dtype: torch.dtype) -> None:
    """From now on the model computes in a 16-bit `dtype`, and float32 copies of its weights are what is trained: its masters.

    For a model that is on its device and in float32; a wider `dtype` changes nothing. A deepcopy of the model has no masters.
    In bfloat16 the number after 1 is 1.008: steps of an optimizer would be rounded away, and so would sums of gradients. So
    each pack's gradient is added to its master's, the optimizer moves masters, and the weights are these, rounded.
    """
    for p in model.parameters() if dtype.itemsize < 4 else ():  # parameters alone: rotary frequencies stay as they are
        if p.requires_grad:
            p.master = torch.nn.Parameter(p.detach().clone())
            p.register_post_accumulate_grad_hook(_to_master)
        p.data = p.data.to(dtype)


@torch.no_grad()
def _to_master(p: torch.nn.Parameter) -> None:
    p.master.grad = p.grad.float() if p.master.grad is None else p.master.grad.add_(p.grad)
    p.grad = None


def masters(model) -> list[torch.nn.Parameter]:
    """What is trained: the weights themselves, unless `compute_in` made others."""
    return [getattr(p, "master", p) for p in model.parameters()]


@torch.no_grad()
def follow_masters(model) -> None:
    for p in model.parameters():
        if hasattr(p, "master"):
            p.copy_(p.master)


def forget_gradients(model) -> None:
    for p in masters(model):
        p.grad = None


def recompute_layers(model) -> None:
    """Keep only each layer's input for the backward pass, which computes the rest again: less memory, a third more products.

    transformers' own checkpointing works only in its training mode, which has dropout, too. Raises ValueError for a model whose
    layers are not where they usually are.
    """
    if not hasattr(model.base_model, "layers"):
        raise ValueError(f"{type(model).__name__} has no `layers`, so they cannot be computed again")
    for layer in model.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


class ProcessLost(RuntimeError):
    """Another process of the run is gone."""


def ranks() -> tuple[int, int]:
    """(which of the run's processes this is, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """What each process brings, in their order, for all of them. Here they wait for one another.

    >>> gather("the only one")
    ['the only one']
    """
    values = [value] * ranks()[1]
    if dist.is_initialized():
        _together(dist.all_gather_object, values, value)
    return values


def sum_gradients(model) -> None:
    """Leave the sum of all processes' gradients in each, once per update.

    Not torch's DDP: that takes the mean, and as many backward passes from each process, where packs are dealt as they come.
    """
    for p in masters(model) if dist.is_initialized() else ():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            _together(dist.all_reduce, p.grad)


def _together(collective: Callable, *args) -> None:
    try:
        collective(*args)
    except RuntimeError as e:
        raise ProcessLost(f"no answer from another process of this run ({str(e).splitlines()[0]})") from e


def spread(model, shard: bool) -> None:
    """Give all processes the weights of the first. `shard`: with FSDP2, for models that would not fit otherwise.

    What is sharded is what only the optimizer needs, its averages: two numbers of each weight, of which a process then keeps
    its part. Weights and gradients are whole while tokens are sampled and packs computed: processes decode at their own pace
    and have different numbers of packs, so nothing may wait for another process in there.
    """
    for p in masters(model) if dist.is_initialized() else ():
        _together(dist.broadcast, p.data, 0)
    follow_masters(model)
    if shard and dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh(next(model.parameters()).device.type, (ranks()[1],)))
        model.unshard()


@contextmanager
def sharded(model) -> Iterator[None]:
    """In here a sharded model has this process's parts of weights and gradients; outside it has the whole. All must enter."""
    if not isinstance(model, FSDPModule):
        yield
        return
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.reshard()
    for p in model.parameters():
        p.grad = own_part(gradients.pop(0), p)  # and the whole one is freed
    yield
    model.zero_grad(set_to_none=True)
    model.unshard()


def own_part(whole: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """This process's part of a tensor that belongs to a weight: the same rows, if the weight is sharded."""
    if not isinstance(weight, DTensor) or whole is None or whole.shape != weight.shape:
        return whole
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def assemble(state):
    """A state dict in which what is sharded is whole again, in the first process alone. All must call it."""

    @cache  # a weight that stands there twice stays one tensor
    def whole(tensor: DTensor) -> torch.Tensor | None:
        tensor = tensor.detach().full_tensor()
        return tensor.cpu() if ranks()[0] == 0 else None  # one at a time, or the device would overflow

    return tree_map_only(DTensor, whole, state)


# ----------------------------------------------------------------------------------------------------------------------
# python grpo.py


@torch.no_grad()
def _attempts(model, questions: list[int], answers: torch.Tensor) -> list[Episode]:
    """Sample two tokens behind each prompt [question]; the reward is the share of them that is right."""
    ids, logps = torch.tensor(questions)[:, None], []  # [B, 1], then [B, 3]
    for _ in range(2):
        scores = model(input_ids=ids).logits[:, -1].log_softmax(-1)  # [B, V]
        token = torch.multinomial(scores.exp(), 1)
        ids, logps = torch.cat([ids, token], 1), [*logps, scores.gather(1, token)]
    rewards = (ids[:, 1:] == answers[ids[:, 0]]).double().mean(1).tolist()
    segments = [SimpleNamespace(ids=i, sampled=[False, True, True], logps=[0.0, *p], turn=[-1, 0, 0])
                for i, p in zip(ids.tolist(), torch.cat(logps, 1).tolist())]
    return [SimpleNamespace(segments=[s], reward=r, group=s.ids[0], finish="answered", states=["asked"], turns=1)
            for s, r in zip(segments, rewards)]


def _demo(steps: int = 100, questions: int = 8, group_size: int = 16, vocab: int = 16) -> float:
    """A bandit: each question has an answer of two tokens, found by trial. Returns the success at the end."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    answers = torch.tensor([((5 * q + 3) % vocab, (7 * q + 1) % vocab) for q in range(questions)])
    config = GRPOConfig(entropy_coef=0.03, epochs=1)  # collapse too early, and what was never tried is never found
    for step in range(1, steps + 1):
        episodes = _attempts(model, list(range(questions)) * group_size, answers)
        rows, _, groups = make_rows(episodes, config)
        report = update(model, optimizer, rows, config)
        success = float(np.mean([e.reward == 1.0 for e in episodes]))
        if step % 10 == 0 or step == 1:
            print(f"  step {step:3}   success {success:4.0%}   reward {np.mean([e.reward for e in episodes]):.2f}   entropy "
                  f"{report['entropy']:.2f}   groups without signal {groups['no_signal']:4.0%}   gradient "
                  f"{report['grad_norm']:.2f}")
    return success


def _bench(name: str, groups: int = 4, size: int = 8, prompt: int = 300, sampled: int = 64) -> None:
    """Where the seconds of an update go, on random tokens: groups that share a prompt, every group with signal."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
    model = AutoModelForCausalLM.from_pretrained(name) if name else LlamaForCausalLM(small)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rng, rows = np.random.default_rng(0), []
    draw = lambda tokens: rng.integers(model.config.vocab_size, size=tokens).tolist()
    for group in range(groups):
        context = draw(prompt)
        rows += [Row(context + draw(sampled), list(range(prompt, prompt + sampled)), [0.5 - i % 2] * sampled, [-1.0] * sampled,
                     group * size + i) for i in range(size)]
    packs, seconds = make_packs(rows, GRPOConfig(), model.device), defaultdict(float)

    def timed(part: str, function: Callable, *args):
        began = time.perf_counter()
        out = function(*args)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[part] += time.perf_counter() - began
        return out

    for _ in range(2):  # the first pass of all is slow
        seconds.clear()
        for pack in packs:
            hidden = timed("forward", hidden_states, model, pack)
            loss, _ = timed("head and loss", pack_loss, hidden, model.get_output_embeddings().weight, pack, GRPOConfig())
            timed("backward", loss.backward)
    total, computed = sum(seconds.values()), sum(p.ids.numel() for p in packs)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {torch.get_num_threads()} threads; {groups} groups of "
          f"{size} rows, {prompt} + {sampled} tokens each: {total:.2f} s, {groups * size * sampled / total:,.0f} trained tokens/s")
    print("  time      " + ", ".join(f"{part} {s / total:.0%}" for part, s in seconds.items()))
    print(f"  packs     {computed:,} tokens computed in {len(packs)} packs; each row alone {sum(len(r.ids) for r in rows):,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A bandit, learned; or where the time of an update goes.")
    parser.add_argument("--bench", action="store_true", help="measure instead of learning")
    parser.add_argument("--model", default="", help="with --bench: folder or hub id of a causal language model; empty: a small one")
    options = parser.parse_args()
    if options.bench:
        _bench(options.model)
    else:
        print("8 questions, 16 tokens, answers of 2 tokens: guessing is right once in 256 times")
        _demo()
