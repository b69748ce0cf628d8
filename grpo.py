"""GRPO for agents: from the rewards of episodes to better weights.

The policy is the language model. An episode is a sequence of tokens that it sampled and tokens
that it read, and one reward at the end. Reinforcement learning makes the sampled tokens of good
episodes likelier, and those of bad ones less likely:

    gradient ~ sum over episodes and their sampled tokens of  advantage * grad log p(token)

How good is good? GRPO plays the same task several times: a group. The advantage of an episode is
its reward minus the mean reward of its group (`advantages`). No second network is needed.

    episodes -> `make_rows`    tokens to train, with an advantage each
    rows     -> `plain_loss`   PPO's clipped loss: a token that has moved far enough gains no more
    loss     -> `plain_update` gradient, optimizer step; the same batch again for some epochs

That is all of GRPO. Below the ruler, `update` computes the same faster and in less memory: tokens
that rows have in common are computed once, and kernels.py never holds all logits.

Unlike the first GRPO paper: the advantage is not divided by the group's standard deviation, every
token of a batch weighs the same, clipping is wider upwards, and there is no KL term. Many recent
recipes do so (DAPO, Dr. GRPO); each is an option of `GRPOConfig`. Imitation is the same update with
advantage 1 and `kind="reinforce"`.

Left out: a replay buffer, a critic, LoRA. Takes episodes from rollout.py (any objects with
`segments`, `reward`, `group`, `finish`, `states`, `turns`), and changes a model's weights.
`python grpo.py` learns a small bandit. To use this file elsewhere, copy it with kernels.py.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from kernels import linear_logps, linear_policy_loss

if TYPE_CHECKING:
    from agent import Episode


def option(default, text: str):
    """A field of a dataclass of options, with the text that --help shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class GRPOConfig:
    """The options of the update, in the order in which they take effect."""

    divide_by_std: bool = option(False, "divide advantages by their group's deviation (GRPO)")
    leave_one_out: bool = option(False, "baseline: the mean of the other attempts only (RLOO)")
    negative_weight: float = option(1.0, "factor of advantages below 0")
    turn_credit: float = option(0.0, "weight of turn-level credit among equal states (GiGPO)")
    normaliser: Literal["token", "episode", "constant"] = option(
        "token", "token: all tokens weigh the same (DAPO); episode: all episodes (GRPO); "
        "constant: normaliser_tokens for each episode (Dr. GRPO)")
    normaliser_tokens: int = option(256, "tokens of an episode, with normaliser=constant")
    kind: Literal["clip", "cispo", "reinforce"] = option("clip", "policy loss; clip is PPO's")
    sequence_ratio: bool = option(False, "one ratio for all of an episode's tokens (GSPO)")
    eps_low: float = option(0.2, "ratios below 1 - eps_low are clipped")
    eps_high: float = option(0.28, "ratios above 1 + eps_high are clipped")
    dual_clip: float | None = option(None, "for advantages below 0: no gradient above this ratio")
    tis_cap: float | None = option(None, "caps p_old / p_sampler: the engine may round otherwise")
    kl_coef: float = option(0.0, "weight of the KL term to the model before RL")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    epochs: int = option(3, "updates per batch of episodes")
    pack_tokens: int = option(2048, "tokens in one pass; only rows that share a prefix exceed it")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")


# --------------------------------------------------------------------------------------------------
# Advantages


def advantages(rewards: Sequence[float], groups: Sequence, divide_by_std: bool = False,
               leave_one_out: bool = False) -> list[float]:
    """The advantage of each episode: its reward minus the mean of its group.

    DeepSeekMath (arXiv 2402.03300); leave_one_out: RLOO (2402.14740). A group of one gives 0, and
    so does a group of equal rewards. Adam takes a full step along any gradient, however small. So
    differences that are only rounding must not count, and the deviation has a floor.

    >>> advantages([1.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 7])
    [0.5, -0.5, -0.5, 0.5, 0.0]
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    out = [0.0] * len(rewards)
    for group in members.values():
        reward = np.array([rewards[i] for i in group], dtype=np.float64)
        if reward.max() - reward.min() < 1e-6:
            continue
        advantage = reward - reward.mean()
        if leave_one_out:  # R - mean of the others = (R - mean of all) * G / (G - 1)
            advantage *= len(reward) / (len(reward) - 1)
        if divide_by_std:
            advantage /= max(reward.std(), 1e-3)
        for i, value in zip(group, advantage.tolist()):
            out[i] = value
    return out


def turn_advantages(episodes: Sequence[Episode], divide_by_std: bool = False,
                    leave_one_out: bool = False) -> list[list[float]]:
    """The advantage of each turn: the episode's reward, minus the mean over its state's visitors.

    GiGPO (arXiv 2505.10978): turns are compared with turns in the same state of the same task. A
    state that an episode visits twice counts once, so the baseline is over episodes.

    >>> from types import SimpleNamespace as E
    >>> first = E(group=0, reward=1.0, states=["start", "door"])
    >>> turn_advantages([first, E(group=0, reward=0.0, states=["start"])])
    [[0.5, 0.0], [-0.5]]
    """
    visits = {}
    for i, episode in enumerate(episodes):
        for state in episode.states:
            visits[i, state] = (episode.group, state)
    rewards = [episodes[i].reward for i, _ in visits]
    values = advantages(rewards, list(visits.values()), divide_by_std, leave_one_out)
    of_visit = dict(zip(visits, values))
    return [[of_visit[i, state] for state in episode.states] for i, episode in enumerate(episodes)]


# --------------------------------------------------------------------------------------------------
# Rows: the tokens to train


@dataclass
class Row:
    """One segment of an episode, as the update sees it."""

    ids: list[int]
    trained: list[int]  # positions of the tokens to train, ascending, never 0
    advantages: list[float]  # one for each of these
    logps: list[float]  # the log-prob each was sampled with
    episode: int  # which episode: the sequence of a sequence ratio

    @property
    def inputs(self) -> list[int]:
        """What the model reads. The last trained token predicts nothing that is trained."""
        return self.ids[: self.trained[-1]]


def make_rows(episodes: Sequence[Episode],
              config: GRPOConfig) -> tuple[list[Row], list[float], dict[str, float]]:
    """Rows of the episodes with signal; the advantage of every episode; the share of silent groups.

    An episode whose environment failed leaves its group, and so does one without a finite reward.
    Without KL and entropy, episodes of advantage 0 have no rows. With them every sampled token has
    signal: otherwise both terms would fade as more and more groups succeed.
    """
    everywhere = bool(config.kl_coef or config.entropy_coef)
    sound = [i for i, e in enumerate(episodes) if e.finish != "error" and math.isfinite(e.reward)]
    played = [episodes[i] for i in sound]
    values = advantages([e.reward for e in played], [e.group for e in played],
                        config.divide_by_std, config.leave_one_out)
    turns = [[0.0] * e.turns for e in played]
    if config.turn_credit:
        turns = turn_advantages(played, config.divide_by_std, config.leave_one_out)
    rows, advantage_of = [], [0.0] * len(episodes)
    for number, episode in enumerate(played):
        advantage_of[sound[number]] = values[number]
        of_turn = [values[number] + config.turn_credit * credit for credit in turns[number]]
        of_turn = [a if a > 0 else config.negative_weight * a for a in of_turn]
        rows += episode_rows(episode, number, of_turn, everywhere)
    groups = {e.group for e in episodes}
    silent = groups - {e.group for e, value in zip(played, values) if value}
    return rows, advantage_of, {"no_signal": len(silent) / len(groups) if groups else 1.0}


def episode_rows(episode: Episode, number: int, of_turn: Sequence[float],
                 everywhere: bool = False) -> list[Row]:
    """One row for each segment with a token to train. `of_turn`: the advantage of each turn.

    Tokens to train are the sampled ones whose advantage is not 0; with `everywhere`, all sampled.
    """
    rows = []
    for segment in episode.segments:
        sampled = [p for p, is_sampled in enumerate(segment.sampled) if is_sampled]
        trained = [p for p in sampled if everywhere or of_turn[segment.turn[p]]]
        if trained:
            advantage = [of_turn[segment.turn[p]] for p in trained]
            logps = [segment.logps[p] for p in trained]
            rows.append(Row(segment.ids, trained, advantage, logps, number))
    return rows


def token_weights(rows: Sequence[Row], config: GRPOConfig) -> list[list[float]]:
    """The weight of each trained token in the loss, fixed before the batch is cut into pieces.

    Only trained tokens count: a group of equal rewards must not dilute the others.

    >>> long, short = Row([1, 2, 3], [1, 2], [], [], 0), Row([1, 2], [1], [], [], 1)
    >>> rows = [long, short]
    >>> token_weights(rows, GRPOConfig(normaliser="token"))[1]
    [0.3333333333333333]
    >>> token_weights(rows, GRPOConfig(normaliser="episode"))
    [[0.25, 0.25], [0.5]]
    """
    tokens = defaultdict(int)
    for row in rows:
        tokens[row.episode] += len(row.trained)
    weights = []
    for row in rows:
        if config.normaliser == "token":
            count = sum(tokens.values())
        elif config.normaliser == "episode":
            count = tokens[row.episode] * len(tokens)
        else:
            count = config.normaliser_tokens * len(tokens)
        weights.append([1 / count] * len(row.trained))
    return weights


# --------------------------------------------------------------------------------------------------
# The plain loss and the plain update


def plain_loss(model, rows: Sequence[Row], config: GRPOConfig, temperature: float = 1.0):
    """PPO's clipped loss of all rows, in the plainest way. `update` computes the same, but faster.

    Rows are padded to one length, and every token gets logits for the whole vocabulary. The ratio
    is to the policy that sampled. Without KL, entropy, and the other options of the loss.
    """
    device = next(model.parameters()).device
    length = max(len(row.ids) for row in rows)
    padded = [row.ids + [0] * (length - len(row.ids)) for row in rows]
    ids = torch.tensor(padded, device=device)  # [R, T]

    # Padding stands at the right, so no token of a row attends to it.
    logits = model(input_ids=ids).logits / temperature  # [R, T, V]
    log_probs = logits.log_softmax(-1)  # [R, T, V]

    loss = 0.0
    for number, (row, weights) in enumerate(zip(rows, token_weights(rows, config))):
        position = torch.tensor(row.trained, device=device)  # [N]
        token = ids[number, position]  # [N]
        logps = log_probs[number, position - 1, token]  # [N], the token before it predicts it

        values = torch.tensor([row.logps, row.advantages, weights], dtype=torch.float64)  # [3, N]
        old_logps, advantage, weight = values.to(logps)
        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        # The smaller of the two: a step that goes too far gains nothing more.
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = loss - (weight * gain).sum()
    return loss


def plain_update(model, optimizer, rows: Sequence[Row], config: GRPOConfig,
                 temperature: float = 1.0) -> None:
    """Improve the model on a batch of rows, once per epoch.

    In the first epoch every ratio is 1: the model is still the one that sampled. Later epochs use
    the same samples again, and clipping keeps the model near the one that sampled them.
    """
    for _ in range(config.epochs):
        optimizer.zero_grad()
        loss = plain_loss(model, rows, config, temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()


# ==================================================================================================
# The fast version: the same gradient, with shared prefixes computed once. A test compares the two.
# ==================================================================================================

# A token of a tree attends to all others of it. At this many tokens that costs as much as the rest
# of a layer (measured with the small model).
DENSE = 1000
PASS = 100  # tokens that cost as much as starting one more pass
LARGEST = 3  # a tree has at most this many times the tokens of its longest row


@dataclass
class Token:
    """A token to train, in a tree."""

    node: int  # the node that predicts it
    target: int
    advantage: float
    weight: float
    logp: float  # it was sampled with
    episode: int


class Tree:
    """A prefix tree of rows: rows that begin with the same tokens share the nodes of these.

    Rows are added in sorted order. So nodes are numbered depth first, and the nodes below a node
    come right behind it. `ends` says where they end: node i lies below node j, or is j, if
    j <= i < ends[j]. This is all that attention needs to know.

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
        self.tokens: list[Token] = []  # to train

    def add(self, row: Row, weights: list[float]) -> None:
        inputs, first, shared = row.inputs, len(self.ids), self.shared(row)
        new = inputs[shared:]
        self.ids += new
        self.positions += range(shared, len(inputs))
        self.ends += [0] * len(new)
        self.path = [*self.path[:shared], *range(first, len(self.ids))]
        for node in self.path:
            self.ends[node] = len(self.ids)
        columns = zip(row.trained, row.advantages, weights, row.logps, strict=True)
        for position, advantage, weight, logp in columns:
            node, target = self.path[position - 1], row.ids[position]
            self.tokens.append(Token(node, target, advantage, weight, logp, row.episode))

    def shared(self, row: Row) -> int:
        """How many nodes a row can use again. In sorted order, the last row shares most with it."""
        last = [self.ids[node] for node in self.path]
        return _common_prefix(last, row.inputs)

    @property
    def branches(self) -> bool:
        """False: each node follows the one before it, as in a single row."""
        return min(self.ends) < len(self.ids)


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass
class Pack:
    """Trees side by side, computed in one pass, and the tokens to train in them."""

    ids: torch.Tensor  # [B, T], a tree in each line, padded at the right
    positions: torch.Tensor  # [B, T]
    ends: torch.Tensor | None  # [B, T] as in Tree. None: no tree branches, attention is causal
    source: torch.Tensor  # [N], which of the B * T hidden states predicts a trained token
    targets: torch.Tensor  # [N], the trained tokens
    advantages: torch.Tensor  # [N] in float64, as the next two. The loss rounds to its precision
    weights: torch.Tensor  # [N]
    behavior_logps: torch.Tensor  # [N]
    episodes: torch.Tensor  # [N], which episode a token is of
    old_logps: torch.Tensor | None = None  # [N], those of the first epoch. None during it
    ref_logps: torch.Tensor | None = None  # [N]


def make_packs(rows: Sequence[Row], config: GRPOConfig, device: torch.device | str = "cpu",
               rank: int = 0, world: int = 1) -> list[Pack]:
    """Fold rows into trees, and lay trees of about one size side by side.

    Trees side by side have at most `pack_tokens` tokens. A single tree may have more: to cut it
    would mean to compute its prefix twice. All processes of a run lay out the same packs, and each
    makes tensors only for its own.
    """
    packs: list[list[Tree]] = []
    for tree in sorted(_trees(rows, config), key=lambda tree: len(tree.ids)):
        if packs and _fits(tree, packs[-1], config.pack_tokens):
            packs[-1].append(tree)
        else:
            packs.append([tree])
    return [_pack(trees, device) for trees in packs[rank::world]]


def _trees(rows: Sequence[Row], config: GRPOConfig) -> list[Tree]:
    """Trees of neighbouring rows, for as long as sharing saves more than attention costs.

    With a sequence ratio, all rows of an episode stay in one tree.
    """
    sequences = defaultdict(list)
    for number, (row, weights) in enumerate(zip(rows, token_weights(rows, config))):
        sequences[row.episode if config.sequence_ratio else number].append((row, weights))
    trees, members, size, longest = [], [], 0, 0
    # Neighbours in sorted order begin with the same tokens.
    for sequence in sorted(sequences.values(), key=_first_inputs):
        own = sum(len(row.inputs) for row, _ in sequence)
        shared = _common_prefix(members[-1][0].inputs, _first_inputs(sequence)) if members else 0
        joined, longest = size + own - shared, max(longest, own)
        too_large = joined > LARGEST * longest or _cost(joined) > _cost(size) + _cost(own)
        if members and too_large:
            trees.append(_tree(members))
            members, joined, longest = [], own, own
        members += sequence
        size = joined
    return [*trees, _tree(members)] if members else trees


def _first_inputs(sequence: list[tuple[Row, list[float]]]) -> list[int]:
    return sequence[0][0].inputs


def _cost(tokens: int) -> float:
    """Of computing a tree, in tokens of a short one."""
    return tokens * (1 + tokens / DENSE)


def _tree(members: list[tuple[Row, list[float]]]) -> Tree:
    tree = Tree()
    for row, weights in sorted(members, key=lambda member: member[0].inputs):
        tree.add(row, weights)
    return tree


def _fits(tree: Tree, pack: list[Tree], pack_tokens: int) -> bool:
    """Is padding the other trees to the size of this one cheaper than a pass of its own?"""
    width, before = len(tree.ids), len(pack[-1].ids)
    padding = len(pack) * (_cost(width) - _cost(before))
    return (len(pack) + 1) * width <= pack_tokens and padding <= PASS


def _pack(trees: list[Tree], device: torch.device | str) -> Pack:
    width = max(len(tree.ids) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    # Padding goes on counting: positions that do not would look like the start of another row.
    positions = torch.arange(width).repeat(len(trees), 1)
    ends = torch.full_like(ids, width)
    tokens, source = [], []
    for line, tree in enumerate(trees):
        own = slice(len(tree.ids))
        ids[line, own] = torch.tensor(tree.ids)
        positions[line, own] = torch.tensor(tree.positions)
        ends[line, own] = torch.tensor(tree.ends)
        tokens += tree.tokens
        source += [line * width + token.node for token in tree.tokens]

    def column(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Pack(
        ids=ids.to(device), positions=positions.to(device),
        ends=ends.to(device) if any(tree.branches for tree in trees) else None,
        source=column(source, torch.long),
        targets=column([token.target for token in tokens], torch.long),
        advantages=column([token.advantage for token in tokens], torch.float64),
        weights=column([token.weight for token in tokens], torch.float64),
        behavior_logps=column([token.logp for token in tokens], torch.float64),
        episodes=column([token.episode for token in tokens], torch.long))


# --------------------------------------------------------------------------------------------------
# The update


def hidden_states(model, pack: Pack) -> torch.Tensor:
    """The last hidden state [N, D] before each trained token."""
    mask = attention_mask(pack, next(model.parameters()).dtype)
    states = model.base_model(input_ids=pack.ids, position_ids=pack.positions,
                              attention_mask=mask, use_cache=False)
    # Not states[source]: the backward pass of that adds up in another order each time.
    return torch.nn.functional.embedding(pack.source, states.last_hidden_state.flatten(0, 1))


def attention_mask(pack: Pack, dtype: torch.dtype) -> torch.Tensor | None:
    """[B, 1, T, T]: 0 where a token attends to another, else -inf. None: to all that precede it.

    All layers share this mask. From a boolean one, attention would make such a mask in each layer
    and keep it for the backward pass.
    """
    if pack.ends is None:
        return None
    lines, width = pack.ids.shape
    key = torch.arange(width, device=pack.ids.device)  # [T]
    query = key[:, None]  # [T, 1]
    attends = (key <= query) & (query < pack.ends[:, None, None, :])  # [B, 1, T, T]
    # A GPU wants lines that begin at multiples of 8 numbers, or copies the mask in each layer.
    aligned = math.ceil(width / 8) * 8
    mask = torch.full((lines, 1, width, aligned), -math.inf, dtype=dtype, device=key.device)
    return mask[..., :width].masked_fill_(attends, 0.0)


def pack_loss(model, pack: Pack, config: GRPOConfig, temperature: float = 1.0):
    """(loss, Stats) of one pack: its share of the batch's loss."""
    head = model.get_output_embeddings().weight  # [V, D]
    return linear_policy_loss(
        hidden_states(model, pack), head, pack.targets, pack.advantages, pack.weights,
        old_logps=pack.old_logps, ref_logps=pack.ref_logps,
        behavior_logps=pack.behavior_logps if config.tis_cap else None,
        sequence_ids=pack.episodes if config.sequence_ratio else None,
        temperature=temperature, kind=config.kind, eps_low=config.eps_low,
        eps_high=config.eps_high, dual_clip=config.dual_clip, tis_cap=config.tis_cap,
        kl_coef=config.kl_coef, entropy_coef=config.entropy_coef)


@torch.no_grad()
def pack_logps(model, pack: Pack, temperature: float = 1.0) -> torch.Tensor:
    """[N], the log-probs a model gives to the trained tokens."""
    head = model.get_output_embeddings().weight
    states = hidden_states(model, pack)
    return linear_logps(states, head, pack.targets, temperature=temperature)[0]


def add_gradients(model, packs: list[Pack], config: GRPOConfig, temperature: float = 1.0) -> list:
    """Add the gradients of all packs to the model's, in the order of the packs.

    Returns (loss, Stats) of each. A large model computes one pack after the other, and its
    operations share the cores. The operations of a small model are too short for that. With one
    thread for each (`torch.set_num_threads(1)`), a CPU computes whole packs side by side instead.
    The sums, and so their bits, are the same on any number of cores.
    """
    has_masters = any(hasattr(p, "master") for p in model.parameters())
    # On a GPU, side by side would only mean the gradients of all packs in memory at once.
    on_cpu = next(model.parameters()).device.type == "cpu"
    if torch.get_num_threads() > 1 or has_masters or not on_cpu:
        return [add_gradient(model, pack, config, temperature) for pack in packs]
    job = partial(pack_gradient, model, config=config, temperature=temperature)
    with ThreadPoolExecutor(cores()) as threads:
        # The largest first: a large one at the end would leave the other cores without work.
        largest_first = [threads.submit(job, pack) for pack in reversed(packs)]
    results = []
    for future in reversed(largest_first):
        loss, stats, gradients = future.result()
        add_to_gradients(model, gradients)
        results.append((loss, stats))
    return results


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_gradient(model, pack: Pack, config: GRPOConfig, temperature: float = 1.0):
    """Add the gradient of a pack's loss to the model's. Returns (loss, Stats)."""
    loss, stats = pack_loss(model, pack, config, temperature)
    loss.backward()
    return loss.item(), stats


def pack_gradient(model, pack: Pack, config: GRPOConfig, temperature: float):
    """(loss, Stats, a gradient for each parameter). Changes nothing: threads may share a model."""
    loss, stats = pack_loss(model, pack, config, temperature)
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.item(), stats, torch.autograd.grad(loss, trained, allow_unused=True)


@torch.no_grad()
def add_to_gradients(model, gradients: Sequence[torch.Tensor | None]) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, gradient in zip(trained, gradients):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def update(model, optimizer, rows: Sequence[Row], config: GRPOConfig, temperature: float = 1.0,
           reference=None) -> dict:
    """Improve the model on a batch of rows, once per epoch. Returns a report of the last epoch.

    Ratios are to the policy before the first epoch, whose log-probs are those that this function
    computes first: the engine may compute in another precision. `reference`: the model of the KL
    term. A gradient that is not finite is not applied, for it would stay in Adam's averages;
    `skipped` counts these. `largest_pack`: tokens of the largest pass, padding included.
    Of several processes each is given all rows, and computes its share of the packs.
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
            if pack.old_logps is None:
                pack.old_logps = stats.logps
        sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(masters(model), config.max_grad_norm).item()
        if math.isfinite(norm):
            optimizer.step()
            follow_masters(model)
        skipped = report["skipped"] + int(not math.isfinite(norm))
        report = {**_report(packs, results), "grad_norm": norm, "skipped": skipped}
    forget_gradients(model)
    return report


def _report(packs: list[Pack], results: list) -> dict[str, float]:
    """What an epoch was like, over the packs of all processes."""
    own = {"loss": 0.0, "largest_pack": 0, "tokens": [torch.empty(5, 0)]}
    for pack, (loss, stats) in zip(packs, results):
        columns = [stats.logps, stats.entropy, stats.ratio, stats.clipped, pack.behavior_logps]
        own["tokens"].append(torch.stack([c.float() for c in columns]).cpu())  # [5, N]
        own["loss"] += loss
        own["largest_pack"] = max(own["largest_pack"], pack.ids.numel())
    parts = gather(own)
    tokens = torch.cat([column for part in parts for column in part["tokens"]], dim=1)
    logps, entropy, ratio, clipped, behavior_logps = tokens
    gap = logps - behavior_logps  # log(policy now / policy that sampled)
    return {"loss": sum(part["loss"] for part in parts), "entropy": entropy.nanmean().item(),
            "ratio_max": ratio.nan_to_num(1.0).max().item(), "clipped": clipped.nanmean().item(),
            "kl": (gap.exp() - gap - 1).nanmean().item(),
            "largest_pack": max(part["largest_pack"] for part in parts)}


# --------------------------------------------------------------------------------------------------
# Precision and memory


def compute_in(model, dtype: torch.dtype) -> None:
    """From now on the model computes in a 16-bit `dtype`, and trains float32 copies of its weights.

    These copies are its masters. In bfloat16 the number after 1 is 1.008: small steps of the
    optimizer would be rounded away, and so would sums of gradients. So each pack's gradient is
    added to its master's, the optimizer changes the masters, and the weights follow, rounded.
    The model must be on its device and in float32. A wider `dtype` changes nothing. A deepcopy
    of the model has no masters.
    """
    if dtype.itemsize >= 4:
        return
    for p in model.parameters():  # parameters only: rotary frequencies stay in float32
        if p.requires_grad:
            p.master = torch.nn.Parameter(p.detach().clone())
            p.register_post_accumulate_grad_hook(_to_master)
        p.data = p.data.to(dtype)


@torch.no_grad()
def _to_master(p: torch.nn.Parameter) -> None:
    p.master.grad = p.grad.float() if p.master.grad is None else p.master.grad.add_(p.grad)
    p.grad = None


def masters(model) -> list[torch.nn.Parameter]:
    """What the optimizer trains: the weights themselves, unless `compute_in` made masters."""
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
    """Keep only each layer's input for the backward pass, which computes the rest again.

    Less memory for a third more products. transformers' own checkpointing works only in training
    mode, which has dropout, too. Raises ValueError for a model without `layers`.
    """
    if not hasattr(model.base_model, "layers"):
        raise ValueError(f"{type(model).__name__} has no `layers`: they cannot be computed again")
    for layer in model.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                preserve_rng_state=False)


# --------------------------------------------------------------------------------------------------
# Several processes: all hold the same batch, each computes its share of the packs


class ProcessLost(RuntimeError):
    """Another process of the run is gone."""


def ranks() -> tuple[int, int]:
    """(which of the run's processes this is, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """What each process brings, in their order, for all of them. They wait for one another here.

    >>> gather("the only one")
    ['the only one']
    """
    values = [value] * ranks()[1]
    if dist.is_initialized():
        _together(dist.all_gather_object, values, value)
    return values


def sum_gradients(model) -> None:
    """Give each process the sum of all processes' gradients, once per update.

    Not torch's DDP: it takes the mean, and wants as many backward passes from each process.
    """
    if not dist.is_initialized():
        return
    for p in masters(model):
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            _together(dist.all_reduce, p.grad)


def share_weights(model) -> None:
    """Give all processes the weights of the first."""
    if not dist.is_initialized():
        return
    for p in masters(model):
        _together(dist.broadcast, p.data, 0)
    follow_masters(model)


def _together(collective: Callable, *args) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessLost(f"no answer from another process of this run ({reason})") from error


# --------------------------------------------------------------------------------------------------
# python grpo.py


@torch.no_grad()
def _attempts(model, questions: list[int], answers: torch.Tensor) -> list[Episode]:
    """Sample two tokens behind each question. The reward is the share of them that is right."""
    ids, logps = torch.tensor(questions)[:, None], []  # [B, 1], then [B, 3]
    for _ in range(2):
        log_probs = model(input_ids=ids).logits[:, -1].log_softmax(-1)  # [B, V]
        token = torch.multinomial(log_probs.exp(), 1)  # [B, 1]
        logps.append(log_probs.gather(1, token))
        ids = torch.cat([ids, token], 1)
    rewards = (ids[:, 1:] == answers[ids[:, 0]]).double().mean(1).tolist()
    episodes = []
    for tokens, own_logps, reward in zip(ids.tolist(), torch.cat(logps, 1).tolist(), rewards):
        segment = SimpleNamespace(ids=tokens, sampled=[False, True, True], turn=[-1, 0, 0],
                                  logps=[0.0, *own_logps])
        episodes.append(SimpleNamespace(segments=[segment], reward=reward, group=tokens[0],
                                        finish="answered", states=["asked"], turns=1))
    return episodes


def _demo(steps: int = 150, questions: int = 8, group_size: int = 16,
          vocabulary: int = 16) -> float:
    """A bandit: the answer to each question is two tokens, found by trial. Returns the success."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    right = [((5 * q + 3) % vocabulary, (7 * q + 1) % vocabulary) for q in range(questions)]
    config = GRPOConfig(epochs=1)
    for step in range(1, steps + 1):
        episodes = _attempts(model, list(range(questions)) * group_size, torch.tensor(right))
        rows, _, report = make_rows(episodes, config)
        if rows:
            plain_update(model, optimizer, rows, config)
        success = float(np.mean([e.reward == 1.0 for e in episodes]))
        if step % 10 == 0 or step == 1:
            reward = np.mean([e.reward for e in episodes])
            print(f"  step {step:3}   success {success:4.0%}   mean reward {reward:.2f}   "
                  f"groups without signal {report['no_signal']:4.0%}")
    return success


if __name__ == "__main__":
    print("8 questions, 16 tokens, answers of 2 tokens: a guess is right once in 256 times")
    _demo()
