"""GRPO for agents: from the rewards of episodes to better weights.

The policy is the language model. An episode is a sequence of tokens that it sampled and tokens
that it read, and one reward at the end. Reinforcement learning makes the sampled tokens of good
episodes likelier, and those of bad ones less likely:

    gradient = sum over sampled tokens of  weight * advantage * grad log p(token)

Good compared with what? GRPO (group relative policy optimization) plays the same task several
times: a group. The advantage of an episode is its reward minus the mean reward of its group. No
value network is needed. An advantage of 0 gives no gradient, so tokens with it are left out. The
other sampled tokens are the trained ones. By default all of these have the same weight: 1 / (their
number in the batch).

    episodes -> `advantages`    one number for each episode
             -> `make_rows`     the tokens to train, with an advantage each
    rows     -> `plain_loss`    the ratio of each token times its advantage, clipped
    loss     -> `plain_update`  gradient, optimizer step; the same batch again for some epochs

The ratio of a token is its probability now, divided by its probability when it was sampled. It
starts at 1. If the advantage is positive, training raises the ratio. Above 1.28 the token adds no
more gradient. If the advantage is negative, training lowers the ratio. Below 0.8 the token adds no
more gradient. This clipping keeps the policy near the one that sampled. It comes from PPO (proximal
policy optimization), the algorithm that GRPO simplifies.

Two lines of ==== divide the file into three parts:

    1  The algorithm: `advantages`, `plain_loss`, `plain_update`. To get the idea, stop there.
    2  The options (`GRPOConfig`), and how episodes become rows (`make_rows`, `token_weights`).
    3  `update` does what `plain_update` does, but faster and in less memory. A prefix that several
       rows share is computed once, and kernels.py never holds all logits. At the end stands
       `learn_bandit`, a whole training loop of twenty lines. (A bandit is a task of one decision.)

The first GRPO paper differs in four ways. It divides the advantage by the group's standard
deviation, gives all episodes the same weight, clips symmetrically and adds a KL term to the loss: a
penalty for the distance to the model before RL. Dr. GRPO drops the division, and DAPO gives all
tokens the same weight and clips wider upwards. Both drop the KL term. Each choice is an option of
`GRPOConfig`. Imitation is the same update with advantage 1 and `kind="reinforce"`.

Left out: a replay buffer, a value network (a critic) that predicts rewards, LoRA. The episodes are
those of agent.py. `python grpo.py` learns the bandit. To use this file elsewhere, copy it with
kernels.py.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from kernels import Options, linear_logps, linear_policy_loss

if TYPE_CHECKING:
    from agent import Episode


def advantages(rewards: Sequence[float], groups: Sequence, divide_by_std: bool = False,
               leave_one_out: bool = False) -> list[float]:
    """The advantage of each episode: its reward minus the mean reward of its group.

    The mean includes the episode itself, as in GRPO (DeepSeekMath, arXiv 2402.03300). With
    `leave_one_out` it does not (RLOO, 2402.14740). With `divide_by_std` the result is divided by
    the group's standard deviation, but by no less than 0.001.

    A group of one, or of equal rewards, gives 0. Rewards that differ by less than 1e-6 count as
    equal. Adam divides a gradient by its own size, so even a gradient of 1e-9 would make a full
    step.

    >>> advantages([1.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 7])
    [0.5, -0.5, -0.5, 0.5, 0.0]
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    rewards, out = np.array(rewards, dtype=np.float64), np.zeros(len(rewards))
    for indices in members.values():
        reward = rewards[indices]  # [G]
        if reward.max() - reward.min() < 1e-6:
            continue  # it stays 0
        advantage = reward - reward.mean()
        if leave_one_out:  # R - mean of the others = (R - mean of all) * G / (G - 1)
            advantage *= len(reward) / (len(reward) - 1)
        if divide_by_std:
            advantage /= max(reward.std(), 1e-3)
        out[indices] = advantage
    return out.tolist()


@dataclass
class Row:
    """One segment of an episode: tokens that were in the context together (see agent.Segment)."""

    ids: list[int]
    trained: list[int]  # positions in `ids` of the tokens to train, ascending. Never position 0
    advantages: list[float]  # one for each of these
    behavior_logps: list[float]  # the log-prob each had when it was sampled in the rollout
    episode: int  # the number of its episode

    @property
    def inputs(self) -> list[int]:
        """The tokens that the fast version sends through the model.

        The token at position p is predicted from positions 0 to p - 1. So the last trained token
        and all tokens behind it are left out.
        """
        return self.ids[: self.trained[-1]]


def plain_loss(model, rows: Sequence[Row], config: GRPOConfig, temperature: float = 1.0):
    """PPO's clipped loss of all rows, as plainly as possible. `pack_loss` is the fast version.

    Rows are padded to one length, and every token gets logits for the whole vocabulary. The ratio
    compares the model with the log-probs recorded in the rollout. Only `kind="clip"`: the KL term,
    the entropy bonus and the other options of the loss are in `kernels.policy_loss`.
    """
    length = max(len(row.ids) for row in rows)
    padded = [row.ids + [0] * (length - len(row.ids)) for row in rows]
    ids = torch.tensor(padded, device=model.device)  # [R, T]

    # Padding stands at the right, so no token of a row attends to it.
    logits = model(input_ids=ids).logits / temperature  # [R, T, V]
    log_probs = logits.log_softmax(-1)  # [R, T, V]

    loss = 0.0
    for i, (row, weight) in enumerate(zip(rows, token_weights(rows, config))):
        positions = torch.tensor(row.trained)  # [N]
        tokens = ids[i, positions]  # [N]
        logps = log_probs[i, positions - 1, tokens]  # [N], the token before predicts each

        like = {"dtype": logps.dtype, "device": logps.device}
        # log p_old: here what the rollout recorded. `update` takes what its first epoch computes:
        # equal up to rounding, but then the first ratio is exactly 1.
        old_logps = torch.tensor(row.behavior_logps, **like)  # [N]
        advantage = torch.tensor(row.advantages, **like)  # [N]
        ratio = (logps - old_logps).exp()
        clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        # The minimum takes the clipped ratio, a constant, in two cases:
        # advantage > 0 and ratio > 1 + eps_high, or advantage < 0 and ratio < 1 - eps_low.
        # Then the gradient of the gain is 0. Else it is advantage * ratio * grad log p.
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = loss - weight * gain.sum()
    return loss


def plain_update(model, optimizer, rows: Sequence[Row], config: GRPOConfig,
                 temperature: float = 1.0) -> None:
    """Train the model on a batch of rows, with one optimizer step in each epoch (by default: one).

    In the first epoch the model is still the one that sampled. So every ratio is 1, up to rounding.
    The gradient of a ratio of 1 is grad log p, so the first step follows the policy gradient. Later
    epochs use the same samples again. There, a token adds no gradient once its ratio has left the
    clip range in the direction of its advantage. (Other tokens may still move it: all share the
    weights.) `clip_grad_norm_` is another kind of clipping: it limits the size of a step.
    """
    if not rows:  # no group had both better and worse episodes
        return
    for _ in range(config.epochs):
        optimizer.zero_grad()
        loss = plain_loss(model, rows, config, temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()


# ==================================================================================================
# That is GRPO. Next: its options, and how episodes become rows.
# ==================================================================================================


def option(default, text: str):
    """A field of a dataclass of options, with the text that --help shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class GRPOConfig:
    """The options: first those of the advantages, then of the loss, then of the optimizer.

    The defaults are plain GRPO: one epoch, and DAPO's choices (see the top of this file). The
    options of the loss are explained in kernels.py.
    """

    divide_by_std: bool = option(False, "divide advantages by their group's deviation (GRPO)")
    leave_one_out: bool = option(False, "baseline: the mean of the other attempts only (RLOO)")
    negative_weight: float = option(1.0, "factor of advantages below 0")
    turn_credit: float = option(0.0, "weight of a second advantage, by turn and state (GiGPO)")
    normaliser: Literal["token", "episode", "constant"] = option(
        "token", "token: all tokens weigh the same (DAPO); episode: all episodes (GRPO); "
        "constant: normaliser_tokens for each episode (Dr. GRPO)")
    normaliser_tokens: int = option(256, "tokens of an episode, with normaliser=constant")
    kind: Literal["clip", "cispo", "reinforce"] = option("clip", "policy loss; clip is PPO's")
    sequence_ratio: bool = option(False, "one ratio for all of an episode's tokens (GSPO)")
    eps_low: float = option(0.2, "ratios below 1 - eps_low are clipped")
    eps_high: float = option(0.28, "ratios above 1 + eps_high are clipped")
    dual_clip: float | None = option(None, "advantage below 0: no gradient above this ratio")
    tis_cap: float | None = option(None, "weigh tokens by min(p_old / p_rollout, this): truncated "
                                         "importance sampling, for rollouts that round otherwise")
    kl_coef: float = option(0.0, "weight of the KL term to the model before RL")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    epochs: int = option(1, "optimizer steps per batch of episodes")
    pack_tokens: int = option(512, "tokens in one pass; choose more on a GPU")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")


def turn_advantages(episodes: Sequence[Episode], **options) -> list[list[float]]:
    """The advantage of each turn: the reward of its episode, minus the mean reward of all episodes
    of the group that were in the state in which the turn began.

    After GiGPO (arXiv 2505.10978), which also discounts rewards. An episode that was in a state
    twice counts once in this mean. `options`: those of `advantages`.

    >>> from types import SimpleNamespace as E
    >>> first = E(group=0, reward=1.0, states=["start", "door"])
    >>> turn_advantages([first, E(group=0, reward=0.0, states=["start"])])
    [[0.5, 0.0], [-0.5]]
    """
    group_of = {}  # (episode, state): its group for `advantages`
    for i, episode in enumerate(episodes):
        for state in episode.states:
            group_of[i, state] = (episode.group, state)
    rewards = [episodes[i].reward for i, _ in group_of]
    values = dict(zip(group_of, advantages(rewards, list(group_of.values()), **options)))
    return [[values[i, state] for state in episode.states] for i, episode in enumerate(episodes)]


def make_rows(episodes: Sequence[Episode],
              config: GRPOConfig) -> tuple[list[Row], list[float], dict[str, float]]:
    """Returns (rows to train, the advantage of each episode, report).

    An episode that ended with an error of its environment is ignored, also in the mean of its
    group. So is one whose reward is not finite. A group whose advantages are all 0 has no signal.
    Tokens of advantage 0 are not trained, unless there is a KL or entropy term: these two are for
    every sampled token.

    The report counts what is not trained. `no_signal`: share of the groups. `error_tokens`: sampled
    tokens of ignored episodes. `no_signal_tokens`: the other sampled tokens that are in no row.
    """
    train_all = bool(config.kl_coef or config.entropy_coef)
    options = {"divide_by_std": config.divide_by_std, "leave_one_out": config.leave_one_out}
    usable = [i for i, e in enumerate(episodes) if e.finish != "error" and math.isfinite(e.reward)]
    played = [episodes[i] for i in usable]
    values = advantages([e.reward for e in played], [e.group for e in played], **options)
    per_turn = [[0.0] * e.turns for e in played]
    if config.turn_credit:
        per_turn = turn_advantages(played, **options)
    rows, for_log, no_signal_tokens = [], [0.0] * len(episodes), 0
    for number, value, of_turns in zip(usable, values, per_turn):
        sums = [value + config.turn_credit * of_turn for of_turn in of_turns]
        weighted = [a if a > 0 else config.negative_weight * a for a in sums]
        rows += episode_rows(episodes[number], number, weighted, train_all)
        for turn in sampled_turns(episodes[number]):
            no_signal_tokens += weighted[turn] == 0 and not train_all
        for_log[number] = value
    ignored = [e for i, e in enumerate(episodes) if i not in usable]
    groups = {e.group for e in episodes}
    with_signal = {e.group for e, value in zip(played, values) if value}
    return rows, for_log, {
        "no_signal": 1 - len(with_signal) / len(groups) if groups else 1.0,
        "no_signal_tokens": no_signal_tokens,
        "error_tokens": sum(len(sampled_turns(e)) for e in ignored)}


def sampled_turns(episode: Episode) -> list[int]:
    """The turn of each sampled token of an episode."""
    return [turn for segment in episode.segments
            for turn, sampled in zip(segment.turn, segment.sampled) if sampled]


def episode_rows(episode: Episode, number: int, per_turn: Sequence[float],
                 train_all: bool = False) -> list[Row]:
    """One row for each segment that has a token to train.

    `per_turn`: the advantage of each turn. It holds for all tokens that were sampled in the turn.
    Those of advantage 0 are not trained, unless `train_all`.
    """
    rows = []
    for segment in episode.segments:
        sampled = [p for p, is_sampled in enumerate(segment.sampled) if is_sampled]
        trained = [p for p in sampled if train_all or per_turn[segment.turn[p]] != 0]
        if trained:
            advantage = [per_turn[segment.turn[p]] for p in trained]
            logps = [segment.logps[p] for p in trained]
            rows.append(Row(segment.ids, trained, advantage, logps, number))
    return rows


def token_weights(rows: Sequence[Row], config: GRPOConfig) -> list[float]:
    """For each row, the weight of each of its trained tokens in the loss.

    token     1 / (trained tokens in the batch)                            tokens weigh the same
    episode   1 / (trained tokens of its episode * episodes in the batch)  episodes weigh the same
    constant  1 / (normaliser_tokens * episodes in the batch)

    The batch is the whole one, even if it is computed in several passes. Episodes without a trained
    token do not count: a group of equal rewards must not dilute the others.

    >>> rows = [Row([1, 2, 3], [1, 2], [], [], episode=0), Row([1, 2], [1], [], [], episode=1)]
    >>> [round(weight, 2) for weight in token_weights(rows, GRPOConfig(normaliser="token"))]
    [0.33, 0.33]
    >>> token_weights(rows, GRPOConfig(normaliser="episode"))
    [0.25, 0.5]
    """
    tokens = defaultdict(int)  # of each episode
    for row in rows:
        tokens[row.episode] += len(row.trained)
    if config.normaliser == "token":
        return [1 / sum(tokens.values())] * len(rows)
    if config.normaliser == "episode":
        return [1 / (tokens[row.episode] * len(tokens)) for row in rows]
    return [1 / (config.normaliser_tokens * len(tokens))] * len(rows)


# ==================================================================================================
# The fast version: the same gradient, with shared prefixes computed once. A test compares the two.
# ==================================================================================================

# A large tree has at most this many times the tokens of its longest row: see Tree.has_room.
MAX_TREE_TO_ROW = 3


class Tree:
    """A prefix tree of rows: rows that begin with the same tokens share the nodes of these.

    Each row goes down the path of the row before it as far as both are equal, and then adds nodes
    of its own. So nodes are numbered depth first, and the nodes below a node come right behind it.
    `ends` says where they end: node i lies below node j, or is j, if j <= i < ends[j]. This is all
    that attention needs to know. Rows that share nothing may be in one tree, too (it is a forest
    then): they do not see one another.

    Below, the last token of both rows is their trained one. It is only a target, so it has no node.

    >>> tree = Tree()
    >>> for ids in ([5, 6, 7, 1], [5, 6, 8, 9, 1]):
    ...     tree.add(Row(ids, [len(ids) - 1], [1.0], [0.0], episode=0), weight=1.0)
    >>> tree.ids, tree.positions, tree.ends
    ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3], [5, 5, 3, 5, 5])
    """

    def __init__(self):
        self.ids: list[int] = []  # a token for each node
        self.positions: list[int] = []  # in the rows that share it
        self.ends: list[int] = []  # one past the last node below it
        self.path: list[int] = []  # the nodes of the row that was added last
        self.rows: list[tuple[Row, float, list[int]]] = []  # with its weight and its nodes

    def add(self, row: Row, weight: float) -> None:
        shared, begin = self.shared(row), len(self.ids)
        new = row.inputs[shared:]
        self.ids += new
        self.positions += range(shared, shared + len(new))
        self.ends += [0] * len(new)
        self.path = [*self.path[:shared], *range(begin, len(self.ids))]
        for node in self.path:
            self.ends[node] = len(self.ids)
        self.rows.append((row, weight, self.path))

    def shared(self, row: Row) -> int:
        """How many nodes of the last row this row can use, too. Sorted rows share the most."""
        for depth, (node, token) in enumerate(zip(self.path, row.inputs)):
            if self.ids[node] != token:
                return depth
        return min(len(self.path), len(row.inputs))

    def has_room(self, row: Row, pack_tokens: int) -> bool:
        """May this row be added to the tree?

        - Yes, if the tree then has at most `pack_tokens` nodes.
        - Beyond that, yes if the tree already holds at least half of the row: computing the shared
          half twice would cost more. But attention costs the square of the nodes. So this rule ends
          at three times (MAX_TREE_TO_ROW) the tokens of the longest row: then a new tree is begun,
          and it computes the prefix once more.
        """
        length, shared = len(row.inputs), self.shared(row)
        size = len(self.ids) + length - shared
        largest = MAX_TREE_TO_ROW * max(length, max(self.positions) + 1)
        return size <= pack_tokens or (2 * shared >= length and size <= largest)


@dataclass
class Pack:
    """The tensors of a tree, computed in one pass, and of its N tokens to train."""

    ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T]
    ends: torch.Tensor  # [T] as in Tree
    source: torch.Tensor  # [N], the node whose hidden state predicts the token
    targets: torch.Tensor  # [N], the token
    episodes: torch.Tensor  # [N], which episode it is of
    advantages: torch.Tensor  # [N] in float64, as the next two. The loss rounds to its precision
    weights: torch.Tensor  # [N]
    behavior_logps: torch.Tensor  # [N], recorded in the rollout
    # [N], the denominator of the ratio. The first epoch fills it. While it is None, the ratio is 1
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None  # [N], of the reference model, for the KL term


def make_packs(rows: Sequence[Row], config: GRPOConfig, device: torch.device | str = "cpu",
               rank: int = 0, world: int = 1) -> list[Pack]:
    """The packs of one process. All processes lay out the same trees; each takes its share."""
    # The largest first: a large one at the end would leave the other cores without work.
    trees = sorted(make_trees(rows, config), key=lambda tree: len(tree.ids), reverse=True)
    return [make_pack(tree, device) for tree in trees[rank::world]]


def make_trees(rows: Sequence[Row], config: GRPOConfig) -> list[Tree]:
    """Each tree takes rows while it has room. In sorted order, neighbours begin alike.

    With a sequence ratio, all rows of an episode stay in one tree.
    """
    ordered = sorted(zip(rows, token_weights(rows, config)), key=lambda pair: pair[0].inputs)
    if config.sequence_ratio:
        ordered.sort(key=lambda pair: pair[0].episode)  # a stable sort: in order within each
    trees, episode = [], None
    for row, weight in ordered:
        together = config.sequence_ratio and row.episode == episode
        if not trees or not (together or trees[-1].has_room(row, config.pack_tokens)):
            trees.append(Tree())
        trees[-1].add(row, weight)
        episode = row.episode
    return trees


def make_pack(tree: Tree, device: torch.device | str) -> Pack:
    indices, values = [], []
    for row, weight, nodes in tree.rows:
        for p, advantage, logp in zip(row.trained, row.advantages, row.behavior_logps, strict=True):
            indices.append((nodes[p - 1], row.ids[p], row.episode))
            values.append((advantage, weight, logp))
    # In the order of Pack's fields: source, targets, episodes; advantages, weights, behavior_logps.
    indices = torch.tensor(indices, device=device).T.contiguous()  # [3, N]
    values = torch.tensor(values, dtype=torch.float64, device=device).T.contiguous()  # [3, N]
    ids, positions, ends = torch.tensor([tree.ids, tree.positions, tree.ends], device=device)
    return Pack(ids[None], positions[None], ends, *indices, *values)


def hidden_states(model, pack: Pack) -> torch.Tensor:
    """The last hidden state [N, D] before each trained token."""
    out = model.base_model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False,
                           attention_mask=attention_mask(pack, model.dtype))
    # Not states[source]: the backward pass of that adds up in another order each time.
    return torch.nn.functional.embedding(pack.source, out.last_hidden_state[0])  # from [T, D]


def attention_mask(pack: Pack, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, T, T]: 0 where the row's token (query) sees the column's (key), else -inf.

    One mask of floats for all layers. From one of booleans, each layer would make its own floats
    and keep them for the backward pass.
    """
    key = torch.arange(len(pack.ends), device=pack.ends.device)  # [T]
    query = key[:, None]  # [T, 1]
    # A node sees itself and the nodes on the way to it from the root: see Tree.
    attends = (key <= query) & (query < pack.ends[None, :])  # [T, T]
    # Attention on a GPU wants rows that begin at multiples of 8 numbers. Else it copies the mask.
    aligned = math.ceil(len(key) / 8) * 8
    mask = torch.full((1, 1, len(key), aligned), -math.inf, dtype=dtype, device=key.device)
    return mask[..., : len(key)].masked_fill_(attends, 0.0)


def pack_loss(model, pack: Pack, config: GRPOConfig, temperature: float = 1.0):
    """(loss, Stats) of one pack: its share of the batch's loss."""
    head = model.get_output_embeddings().weight  # [V, D]
    options = {option.name: getattr(config, option.name) for option in fields(Options)}
    return linear_policy_loss(
        hidden_states(model, pack), head, pack.targets, pack.advantages, pack.weights,
        old_logps=pack.old_logps, ref_logps=pack.ref_logps,
        behavior_logps=pack.behavior_logps if config.tis_cap else None,
        sequence_ids=pack.episodes if config.sequence_ratio else None,
        temperature=temperature, **options)


@torch.no_grad()
def pack_logps(model, pack: Pack, temperature: float = 1.0) -> torch.Tensor:
    """[N], the log-probs a model gives to the trained tokens."""
    return linear_logps(hidden_states(model, pack), model.get_output_embeddings().weight,
                        pack.targets, temperature=temperature)[0]


def add_gradients(model, packs: list[Pack], config: GRPOConfig, temperature: float = 1.0) -> list:
    """Add the gradients of all packs to the model's. Returns (loss, Stats) of each pack.

    A large model: one pack after the other. torch splits each operation among the cores.
    A small model on a CPU: one pack on each core, because its operations are too short to be split.
    The caller chooses this with `torch.set_num_threads(1)`.
    Gradients are added in the order of the packs, so the bits do not depend on the number of cores.
    """
    results = []
    if torch.get_num_threads() > 1 or model.device.type != "cpu":
        for pack in packs:
            loss, stats = pack_loss(model, pack, config, temperature)
            loss.backward()
            results.append((loss.item(), stats))
        return results
    job = partial(pack_gradient, model, config=config, temperature=temperature)
    with ThreadPoolExecutor(cores()) as threads:
        for loss, stats, gradients in threads.map(job, packs):
            for p, gradient in gradients.items():
                add_to_gradient(p, gradient)
            results.append((loss, stats))
    return results


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pack_gradient(model, pack: Pack, config: GRPOConfig, temperature: float):
    """(loss, Stats, {parameter: gradient}). Changes nothing, so threads may share a model."""
    loss, stats = pack_loss(model, pack, config, temperature)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = zip(trained, torch.autograd.grad(loss, trained, allow_unused=True))
    return loss.item(), stats, {p: gradient for p, gradient in gradients if gradient is not None}


def update(model, optimizer, rows: Sequence[Row], config: GRPOConfig, temperature: float = 1.0,
           reference=None) -> dict[str, float]:
    """Train the model on a batch of rows for some epochs. Returns a report of the last epoch.

    One difference from `plain_update`: the ratio is not to the log-probs recorded in the rollout,
    but to those that the first epoch computes here. A rollout may compute in another precision, and
    this way the first ratio is exactly 1.

    `reference`: the model of the KL term. A gradient that is not finite is not applied, because it
    would stay in Adam's averages. With several processes, all get the same rows, and each computes
    its own packs. In the report:

    largest_pack    tokens of the largest pass
    kl_to_sampler   estimate of KL(policy that sampled || policy now), whether or not the loss has
                    a KL term. That one (`kl_coef`) is to `reference`
    skipped         epochs whose gradient was not finite
    trained_tokens  those that the packs of all processes hold. If all epochs were skipped, it is 0,
                    and `skipped_tokens` counts them
    """
    if not rows:
        return _report([], [], trained=False) | {"grad_norm": 0.0, "skipped": 0}
    packs = make_packs(rows, config, model.device, *ranks())
    if reference is not None and config.kl_coef:
        for pack in packs:
            pack.ref_logps = pack_logps(reference, pack, temperature)
    skipped = 0
    for _ in range(config.epochs):
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
        else:
            skipped += 1
    forget_gradients(model)
    counts = {"grad_norm": norm, "skipped": skipped}
    return _report(packs, results, trained=skipped < config.epochs) | counts


def _report(packs: list[Pack], results: list, trained: bool) -> dict[str, float]:
    """What an epoch was like, over the packs of all processes."""
    own = [torch.empty(5, 0)]  # there may be no packs
    for pack, (_, stats) in zip(packs, results):
        columns = [stats.logps, stats.entropy, stats.ratio, stats.clipped, pack.behavior_logps]
        own.append(torch.stack([column.float() for column in columns]).cpu())  # [5, N]
    tokens = torch.cat(gather(torch.cat(own, dim=1)), dim=1)  # [5, N], of all processes
    logps, entropy, ratio, clipped, behavior_logps = tokens
    gap = logps - behavior_logps  # log(policy now / policy that sampled)
    return {"loss": sum(gather(sum(loss for loss, _ in results))),
            "entropy": entropy.nanmean().item(), "clipped": clipped.nanmean().nan_to_num().item(),
            "ratio_max": max(ratio.nan_to_num(1.0).tolist(), default=1.0),
            "kl_to_sampler": (gap.exp() - gap - 1).nanmean().item(),
            "largest_pack": max(gather(max((pack.ids.numel() for pack in packs), default=0))),
            "trained_tokens": len(logps) if trained else 0,
            "skipped_tokens": 0 if trained else len(logps)}


def check_ledger(sampled: int, abandoned: int, report: dict[str, float]) -> None:
    """Raise RuntimeError unless every sampled token of a step is accounted for.

    Other trainers have lost sampled tokens without a word. Here each is trained, or counted by
    the reason why it is not. `sampled`: tokens that the rollouts sampled, `abandoned`: those of
    them that no episode holds. `report`: those of `make_rows` and `update` together.

    >>> check_ledger(9, 1, {"trained_tokens": 5, "no_signal_tokens": 2, "error_tokens": 0,
    ...                     "skipped_tokens": 0})
    Traceback (most recent call last):
    RuntimeError: of 9 sampled tokens, 8 are accounted for: \
{'trained': 5, 'no_signal': 2, 'error': 0, 'skipped': 0, 'abandoned': 1}
    """
    names = ("trained", "no_signal", "error", "skipped")
    counts = {name: report[f"{name}_tokens"] for name in names} | {"abandoned": abandoned}
    if sum(counts.values()) != sampled:
        raise RuntimeError(f"of {sampled} sampled tokens, {sum(counts.values())} are accounted "
                           f"for: {counts}")


# --------------------------------------------------------------------------------------------------
# Precision and memory


def compute_in(model, dtype: torch.dtype) -> None:
    """After this call the model computes in a 16-bit `dtype`, and trains float32 copies of its
    weights: its masters.

    In bfloat16 the number after 1 is 1.008: small steps of the
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
            p.register_post_accumulate_grad_hook(_move_to_master)
        p.data = p.data.to(dtype)


@torch.no_grad()
def add_to_gradient(p: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Add to the gradient of p's master, or of p if it has none."""
    p = getattr(p, "master", p)
    gradient = gradient.to(p.dtype)
    p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def _move_to_master(p: torch.nn.Parameter) -> None:
    gradient, p.grad = p.grad, None
    add_to_gradient(p, gradient)


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

    Less memory for about a third more computation. transformers' own checkpointing works only in
    training mode, which has dropout, too. Raises ValueError for a model without `layers`.
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
    _together(dist.all_gather_object, values, value)
    return values


def sum_gradients(model) -> None:
    """Give each process the sum of all processes' gradients, once per optimizer step.

    Not torch's DDP: it takes the mean, and needs the same number of backward passes in all.
    """
    for p in masters(model):
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            _together(dist.all_reduce, p.grad)


def share_weights(model) -> None:
    """Give all processes the weights of the first."""
    for p in masters(model):
        _together(dist.broadcast, p.data, 0)
    follow_masters(model)


def _together(collective: Callable, *args) -> None:
    """Call it in all processes. With one process there is nothing to do."""
    if not dist.is_initialized():
        return
    try:
        collective(*args)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessLost(f"no answer from another process of this run ({reason})") from error


# --------------------------------------------------------------------------------------------------
# python grpo.py


def learn_bandit(improve: Callable, steps: int = 50, attempts: int = 16) -> float:
    """A bandit: an episode is one token. Each of 8 questions has one right answer among 32.

    `improve`: plain_update or update. Returns the success of the last batch, sampled before the
    last update.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64,
                                         num_hidden_layers=1, num_attention_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    questions = torch.arange(8).repeat(attempts)  # [B], the groups
    for step in range(1, steps + 1):
        with torch.no_grad():
            logits = model(input_ids=questions[:, None]).logits[:, 0]  # [B, V]
        policy = torch.distributions.Categorical(logits=logits)
        answers = policy.sample()  # [B]
        rewards = (answers == (5 * questions + 3) % 32).float()  # [B]
        values = advantages(rewards.tolist(), questions.tolist())
        pairs = torch.stack([questions, answers], 1).tolist()  # [B, 2], the episodes
        logps = policy.log_prob(answers).tolist()
        rows = [Row(pairs[i], [1], [a], [logps[i]], episode=i) for i, a in enumerate(values) if a]
        improve(model, optimizer, rows, GRPOConfig(epochs=2))  # the second: ratios other than 1
        success = rewards.mean().item()
        if step % 10 == 0 or step == 1:
            print(f"  step {step:3}   success {success:4.0%}")
    return success


if __name__ == "__main__":
    for improve in (plain_update, update):
        print(f"{improve.__name__}: 8 questions, 32 possible answers, 16 attempts at each")
        learn_bandit(improve)
