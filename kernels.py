"""Hidden states -> policy-gradient loss, without holding the logits of the whole batch.

A language model ends in one matrix product: hidden states [N, D] times the vocabulary head [V, D]
give logits [N, V]. With a vocabulary of 150,000, those logits and their gradient can need more
memory than the rest of training. But the loss wants one number per token: the log-prob of the token
that was sampled. This file has four parts:

    1  The loss, as a function of log-probs. `plain_policy_loss` is the idea, in three lines: you
       may stop there. `policy_loss` adds the options, and `plain_linear_loss` the head. It holds
       all logits.
    2  `fused_policy_loss`: from the logits of a few tokens to their loss and its gradient, by hand.
    3  `linear_policy_loss`: all tokens, a chunk at a time (`_tokens_per_chunk`). For each chunk:
           hidden states -> logits                            product 1
           logits -> losses, and the gradient of the logits   part 2
           gradient of the logits -> that of hidden states    product 2
           gradient of the logits -> that of the head         product 3
    4  Part 2 again, as one Triton kernel for GPUs.

The trick: the advantage and the old log-prob of a token are known before its logits are. So the
gradient of the logits is known as soon as the logits are. Autograd does not know that: it holds all
logits until the backward pass. Here a chunk of them is used at once and thrown away, and the
backward pass has nothing left to compute.

Sizes: N tokens, C of them in a chunk, width D, vocabulary V. `dlogits`, `dhidden` and `dhead` are
the gradients of the loss with respect to logits, hidden and head, each of the same shape.
Left out: logit soft-capping, a bias in the head, tensor parallelism, a second derivative.

grpo.py calls this file with the trained tokens of a batch. For each token, `hidden` has one row:
the output of the last layer at the position before that token. The head turns this row into the
logits of the token. To use this file elsewhere, copy it alone: it needs torch, and Triton on a GPU.
`python kernels.py` compares the plain and the fused loss. tests/bench_kernels.py measures.
"""

import math
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, or torch built for CPUs only: the torch version does the work
    triton = None

# exp(89) overflows float32 to inf, and 0 * inf in a backward pass is NaN. So log-ratios end at 60.
LOG_LIMIT = 60.0


# --------------------------------------------------------------------------------------------------
# 1. The idea: the loss, as a function of log-probs
#
# The advantage A of a token says how much better than expected its episode went. The loss of
# REINFORCE is -A * log p, where p is the probability of the token. To minimise it raises p if A is
# positive, and lowers p if A is negative.
#
# But a batch serves several epochs. After the first, the policy is no longer the one that sampled
# the tokens. So the gradient of each token is multiplied by the ratio p / p_old. The loss with this
# gradient is -A * ratio, since d ratio = ratio * d log p. (An approximation: the ratios of earlier
# tokens are left out.)
#
# The correction is good only while the policy is near the old one. So PPO clips: a token whose
# ratio has moved far enough in the direction of its advantage gets no more gradient.


def plain_policy_loss(logps, old_logps, advantages, eps_low=0.2, eps_high=0.28):
    """PPO's loss of each token (1707.06347). All inputs, and the result: [N].

    The last token has a ratio of 2.72 and a positive advantage: its loss is clipped.

    >>> logps = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    >>> old_logps, advantages = torch.tensor([-1.0, -2.0, -2.0]), torch.tensor([1.0, -1.0, 1.0])
    >>> loss = plain_policy_loss(logps, old_logps, advantages)
    >>> loss.sum().backward(); loss.detach(), logps.grad
    (tensor([-1.0000,  2.7183, -1.2800]), tensor([-1.0000,  2.7183,  0.0000]))
    """
    ratio = (logps - old_logps).exp()
    clipped_ratio = ratio.clamp(1 - eps_low, 1 + eps_high)
    # The clipped ratio gives the smaller gain if the ratio has moved too far in the direction of A.
    # It is a constant, so the token then gets no gradient.
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


# That is the loss. Next, its options. Each changes one line of it, or adds one.


@dataclass(frozen=True)
class Options:
    """The choices of `policy_loss`, and where each comes from (arXiv)."""

    kind: str = "clip"  # clip: PPO, 1707.06347. cispo: 2506.13585. reinforce: without a ratio
    eps_low: float = 0.2  # the ratio is clipped below 1 - eps_low and above 1 + eps_high
    eps_high: float = 0.28  # larger than eps_low is "clip-higher": DAPO, 2503.14476
    dual_clip: float | None = None  # c > 1: if A < 0, clip's loss is at most -c A. 1912.09729
    tis_cap: float | None = None  # truncated importance sampling: IMPALA, 1802.01561
    kl_coef: float = 0.0  # times the KL to a reference model: k3 of joschu.net/blog/kl-approx.html
    entropy_coef: float = 0.0  # times the entropy, which the loss then rewards: A3C, 1602.01783

    def __post_init__(self):
        if self.kind not in ("clip", "cispo", "reinforce"):
            raise ValueError(f"kind must be one of clip, cispo, reinforce, got {self.kind!r}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, got {self.dual_clip}")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"tis_cap must be positive, got {self.tis_cap}")


def policy_loss(logps, entropy, advantages, *, old_logps=None, behavior_logps=None, ref_logps=None,
                sequence_ids=None, **options):
    """The loss of each token [N], its ratio [N], and whether it was clipped [N]. All inputs: [N].

    logps           log-prob of the sampled token under the policy in training
    entropy         of the policy's distribution over that token. Only `entropy_coef` needs it
    advantages      A
    old_logps       log p_old, the denominator of the ratio, as the first epoch computed it. None:
                    this is the first epoch, so the ratio is 1
    behavior_logps  the same policy, measured by the rollout engine instead of the trainer: the two
                    round differently. Only `tis_cap` needs it
    ref_logps       log-prob under the reference model. Only `kl_coef` needs it
    sequence_ids    the number of each token's sequence. All tokens of a sequence share one ratio,
                    the geometric mean of their ratios (GSPO, 2507.18071, with far narrower limits
                    than the defaults here)
    options         those of `Options`

    `clipped` marks tokens that lost their gradient to clipping (clip), or whose ratio was cut
    (cispo).

    >>> logps, advantages = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0])
    >>> old_logps = torch.tensor([-1.0, -2.0, -2.0])
    >>> policy_loss(logps, None, advantages, old_logps=old_logps)
    (tensor([-1.0000,  2.7183, -1.2800]), tensor([1.0000, 2.7183, 2.7183]), tensor([0., 0., 1.]))
    """
    options = Options(**options)
    # exp(logps - logps.detach()) has value 1 and derivative d logps: a policy-gradient step.
    old_logps = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old_logps
    if sequence_ids is not None:
        # After exp, this is the geometric mean of the ratios of the sequence.
        log_ratio = _sequence_mean(log_ratio, sequence_ids)
    ratio = log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    low, high = 1 - options.eps_low, 1 + options.eps_high
    clipped_ratio = ratio.clamp(low, high)

    # The gain is what we maximise. The loss is -gain, and terms for KL and entropy.
    if options.kind == "clip":
        gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
        too_high = (advantages > 0) & (ratio > high)
        too_low = (advantages < 0) & (ratio < low)
        clipped = too_high | too_low
        if options.dual_clip is not None:
            # If A < 0, a large ratio still makes a large loss. This limits it.
            capped = (advantages < 0) & (ratio > options.dual_clip)
            gain = torch.where(capped, options.dual_clip * advantages, gain)
            clipped = clipped | capped
    elif options.kind == "cispo":
        # The clipped ratio is a constant factor. So every token keeps a gradient.
        gain = clipped_ratio.detach() * advantages * logps
        clipped = clipped_ratio != ratio
    else:
        gain, clipped = advantages * logps, torch.zeros_like(ratio)

    if options.tis_cap is not None:
        # `ratio` is policy / old policy. This factor is old policy / policy of the rollout.
        gain = gain * (old_logps - behavior_logps).exp().clamp(max=options.tis_cap).detach()
    loss = -gain
    if options.kl_coef:
        # This estimates KL(policy || reference). For a token that the policy samples, the mean of
        # -delta is this KL, and the mean of exp(delta) - 1 is 0. So adding the second keeps the
        # mean, and makes every term at least 0. Its gradient is on average that of
        # KL(reference || policy). Near the reference, both are the same to first order.
        delta = (ref_logps - logps).clamp(-LOG_LIMIT, LOG_LIMIT)
        loss = loss + options.kl_coef * (delta.exp() - delta - 1)
    if options.entropy_coef:
        loss = loss - options.entropy_coef * entropy
    return loss, ratio.detach(), clipped.to(ratio.dtype)


def _sequence_mean(values, sequence_ids):
    """The mean over each sequence, given to all of its tokens. [N] -> [N]."""
    ids, index = sequence_ids.unique(return_inverse=True)  # [S], and [N] from 0 to S - 1
    sums = values.new_zeros(len(ids)).index_add(0, index, values)  # [S]
    return (sums / index.bincount())[index]


def plain_linear_loss(hidden, head, targets, advantages, weights, *, temperature=1.0, **options):
    """`linear_policy_loss` in the plainest way: all logits at once, and autograd does the rest.

    >>> hidden, targets, ones = torch.zeros(1, 2), torch.tensor([3]), torch.ones(1)
    >>> plain_linear_loss(hidden, torch.ones(4, 2), targets, ones, ones, kind="reinforce")
    tensor(1.3863)
    """
    log_probs = (hidden @ head.T / temperature).log_softmax(-1)  # [N, V]
    logps = log_probs.gather(1, targets[:, None])[:, 0]  # [N]
    entropy = -(log_probs.exp() * log_probs).sum(-1)  # [N]
    losses, _, _ = policy_loss(logps, entropy, advantages, **options)  # [N]
    return (weights * losses).sum()


# ==================================================================================================
# The fast version: the same loss, a chunk of tokens at a time. A test compares the two.
# ==================================================================================================
# 2. From the logits of a few tokens to their loss and the gradient of their logits
#
# Take one token. Write z_j for logit_j / temperature, and t for the token that was sampled.
#
#     p_j = exp(z_j) / total        total = sum_k exp(z_k)        log p_j = z_j - log(total)
#
# The derivative of log(total) with respect to z_j is p_j. That gives the two derivatives we need:
#
#     d log p_t / d z_j = [j = t] - p_j                  one-hot minus softmax; [j = t] is 1 or 0
#     d entropy / d z_j = -p_j (log p_j + entropy)       entropy = -sum_k p_k log p_k
#
# The token's loss is weight * policy_loss. It sees the logits only through log p_t and the entropy.
# So two numbers per token are all that it contributes to the gradient:
#
#     slope = d loss / d log p_t        entropy_slope = d loss / d entropy = -entropy_coef * weight
#
# The chain rule puts them together, and d z_j / d logit_j = 1 / temperature:
#
#     temperature * d loss / d logit_j
#         = slope ([j = t] - p_j) - entropy_slope p_j (log p_j + entropy)
#         = -p_j (slope + entropy_slope (log p_j + entropy)) + slope [j = t]
#
# Two things could go wrong in floating point:
#
# - exp(z) overflows for a large z. But p stays the same when a constant is subtracted from all z.
#   We subtract the largest z: then no exponent is above 0, and total is at least 1.
# - The policy can be almost sure of its token. If p_t is 1 - 1e-9, float32 rounds it to 1. Then
#   1 - p_t becomes 0, but the gradient at the target needs it. So we also sum exp(z) over all
#   tokens except t, and call that `others`. Then 1 - p_t = others / total, without a subtraction.
#   log p_t has the same problem if t has the largest z. Then z_t = 0 and total = 1 + others, so
#   log p_t = -log(1 + others). log1p(others) computes this without forming the sum.


class Tokens(NamedTuple):
    """What is known of each token, [N] each. None: not given. See `policy_loss`."""

    targets: torch.Tensor  # the sampled token, an index into the vocabulary
    weights: torch.Tensor | None = None  # factor of its loss
    advantages: torch.Tensor | None = None  # None: only log-probs and entropies are wanted
    old_logps: torch.Tensor | None = None
    behavior_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None

    def at(self, index) -> "Tokens":
        """Some of the tokens."""
        return Tokens(*(None if values is None else values[index] for values in self))


def fused_policy_loss(logits, dlogits, tokens, options, temperature):
    """The logits of some tokens [C, V] -> weights * loss, logps, entropy, ratio, clipped: [5, C].

    There are three ways to call it:
        without `tokens.advantages`     log-probs and entropies; the rest of the result is NaN
        with them, and `dlogits` None   all five
        with them and `dlogits` [C, V]  all five, and the gradient of the logits goes to `dlogits`
    `dlogits` may be the same memory as `logits`, which may be overwritten in any case.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton without a GPU, for the tests
    if triton and logits.dtype == torch.float32 and (logits.is_cuda or interpreted):
        return _fused_triton(logits, dlogits, tokens, options, temperature)
    # On a CPU, a few tokens at a time, so that logits and intermediate results fit its cache. On a
    # GPU without Triton, all tokens at once.
    count = max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    results = []
    for begin in range(0, len(logits), count):
        part = slice(begin, begin + count)
        gradient = None if dlogits is None else dlogits[part]
        results.append(_fused_torch(logits[part], gradient, tokens.at(part), options, temperature))
    return torch.cat(results, dim=1)


def _fused_torch(logits, dlogits, tokens, options, temperature):
    """`fused_policy_loss` in torch: the comment above, line by line, for C tokens at once.

    To save memory, a line may overwrite its input. Then it gives the result a new name, and the
    line above says what it computes.
    """
    targets = tokens.targets[:, None]  # [C, 1]
    # z = (logits - largest) / temperature. This order: the difference of close logits has no error.
    z = logits.sub_(logits.max(1, keepdim=True).values).div_(temperature)  # [C, V], at most 0
    z_target = z.gather(1, targets)[:, 0]  # [C]
    e = z.exp()  # [C, V]
    sum_ez = torch.linalg.vecdot(e, z)  # [C]
    # e_others = e, but 0 at the target
    e_others = e.scatter_(1, targets, 0.0)  # [C, V]
    others, e_target = e_others.sum(1), z_target.exp()  # [C] each
    total = others + e_target  # [C]
    log_total = torch.where(z_target == 0, others.log1p(), total.log())  # [C]
    # entropy = -sum p log p = -sum p (z - log_total) = log_total - sum p z, where p = e / total.
    logps, entropy = z_target - log_total, log_total - sum_ez / total  # [C] each

    losses = ratio = clipped = torch.full_like(logps, math.nan)
    if tokens.advantages is not None:
        losses, ratio, clipped, slopes = _losses_and_slopes(logps, entropy, tokens, options)
    if dlogits is not None:
        entropy_slopes = -options.entropy_coef * tokens.weights  # [C]
        factor = slopes[:, None]  # [C, 1]
        if options.entropy_coef:
            # factor = entropy_slope (log p + entropy) + slope, where log p = z - log_total
            log_p_plus_entropy = z.add_((entropy - log_total)[:, None])  # [C, V]
            factor = log_p_plus_entropy.mul_(entropy_slopes[:, None]).add_(factor)  # [C, V]
        # scaled = -p / temperature, but 0 at the target
        scaled = e_others.mul_((-1 / (total * temperature))[:, None])  # [C, V]
        # dlogits = scaled * factor. At the target:
        #     (slope (1 - p_t) - entropy_slope p_t (log p_t + entropy)) / temperature
        torch.mul(scaled, factor, out=dlogits)
        at_target = (slopes * others - entropy_slopes * e_target * (logps + entropy)) / total  # [C]
        dlogits.scatter_(1, targets, (at_target / temperature)[:, None].to(dlogits.dtype))
    return torch.stack([losses, logps, entropy, ratio, clipped])


def _losses_and_slopes(logps, entropy, tokens, options):
    """weights * policy_loss, ratio, clipped, and the slopes d loss / d logps. [C] each.

    This is `policy_loss` itself, under autograd: on C numbers that costs little.
    """
    with torch.enable_grad():
        logps = logps.detach().requires_grad_()
        losses, ratio, clipped = policy_loss(
            logps, entropy, tokens.advantages, old_logps=tokens.old_logps,
            behavior_logps=tokens.behavior_logps, ref_logps=tokens.ref_logps,
            sequence_ids=tokens.sequence_ids, **vars(options))
        losses = tokens.weights * losses
        slopes, = torch.autograd.grad(losses.sum(), logps)
    return losses.detach(), ratio, clipped, slopes


# --------------------------------------------------------------------------------------------------
# 3. All tokens, a chunk at a time
#
# Liger Kernel (2410.10989) computes its cross-entropy like this: the gradients come with the loss.


@dataclass
class Stats:
    """What the loss saw of each token, [N], without gradient. NaN: the token was dropped."""

    logps: torch.Tensor  # log-prob of the target, at `temperature`
    entropy: torch.Tensor  # of the whole distribution, in nats
    ratio: torch.Tensor  # exp(logps - old_logps); with sequence_ids, that of the sequence
    clipped: torch.Tensor  # 1.0 where clipping took the gradient away or cut the ratio, else 0.0


def linear_policy_loss(hidden, head, targets, advantages, weights, *, old_logps=None,
                       behavior_logps=None, ref_logps=None, sequence_ids=None, temperature=1.0,
                       chunk=None, **options):
    """sum_i weights_i * policy_loss_i, of the tokens `targets` [N] under
    softmax(hidden [N, D] @ head [V, D].T / temperature). Returns (loss, Stats).

    The loss is a scalar. It can be differentiated once, with respect to hidden and head.
    `weights` [N] is mask and normaliser in one: 0 for tokens that the policy did not sample, else
    for example 1 / (tokens of the whole batch). `options` are those of `Options`. `temperature`
    must be the one that was sampled at, or the first ratio is not 1.

    A token that cannot change the loss is dropped before any product. It may hold anything (a
    target of -100, NaN). Its gradient is 0, and its statistics are NaN. Dropped are:
    - tokens of weight 0;
    - tokens of advantage 0, if there is no KL term and no entropy bonus. With `sequence_ids` they
      stay if another token of their sequence has an advantage other than 0.
    With `sequence_ids` all tokens of a sequence must be in the same call. Its ratio is the
    geometric mean over its tokens of weight other than 0.

    The logits of `chunk` tokens are held at a time. Products add up in float32 at least (float64
    for float64 inputs), whatever the inputs or autocast say: probabilities from bfloat16 logits can
    be wrong by several percent. Raises ValueError for input that makes no sense.

    >>> hidden = torch.eye(2, requires_grad=True)
    >>> targets, advantages = torch.tensor([0, -100]), torch.tensor([1.0, 1.0])
    >>> weights = torch.tensor([1.0, 0.0])   # the second token is masked
    >>> loss, stats = linear_policy_loss(hidden, torch.eye(2), targets, advantages, weights)
    >>> loss.backward(); loss.item(), stats.logps, hidden.grad   # token 0 is pushed up
    (-1.0, tensor([-0.3133,     nan]), tensor([[-0.2689,  0.2689],
            [ 0.0000,  0.0000]]))
    """
    options, chunks = Options(**options), ChunkedHead(hidden, head, temperature, chunk)
    numbers = [None if values is None else values.detach().to(chunks.wide)
               for values in (weights, advantages, old_logps, behavior_logps, ref_logps)]
    tokens = Tokens(targets, *numbers, sequence_ids)
    _check_lengths(tokens, len(hidden))
    if options.kl_coef and ref_logps is None:
        raise ValueError("kl_coef needs ref_logps, the log-probs of the reference model")
    if options.tis_cap is not None and behavior_logps is None:
        raise ValueError("tis_cap needs behavior_logps, the log-probs recorded in the rollout")

    keep = _tokens_with_signal(tokens, options)  # [K]
    if sequence_ids is None:
        chunks.run(keep, tokens, options)
    else:
        _run_sequences(chunks, keep, tokens, options)
    losses, *stats = chunks.per_token
    loss = _KnownGradients.apply(hidden, head, losses[keep].sum(), [chunks.dhidden, chunks.dhead])
    return loss, Stats(*stats)


@torch.no_grad()
def linear_logps(hidden, head, targets, *, temperature=1.0, chunk=None):
    """Log-probs of `targets` [N] under softmax(hidden [N, D] @ head [V, D].T / temperature).

    Returns ([N], [N]): the log-probs, and the entropies of the distributions. Without gradient:
    for old and reference log-probs, and for evaluation. The logits of `chunk` tokens are held at a
    time. Raises ValueError for shapes that do not fit.

    >>> linear_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3]))   # log 4 = 1.3863
    (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    chunks, tokens = ChunkedHead(hidden, head, temperature, chunk), Tokens(targets)
    _check_lengths(tokens, len(hidden))
    chunks.run(torch.arange(len(hidden), device=hidden.device), tokens, Options())
    _, logps, entropy, _, _ = chunks.per_token
    return logps, entropy


class ChunkedHead:
    """The three products for all tokens, a chunk at a time. Holds what comes out of them."""

    def __init__(self, hidden, head, temperature, chunk):
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError("hidden must be [N, D] and head [V, D], got "
                             f"{list(hidden.shape)} and {list(head.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        # bfloat16 on CUDA: multiply in 16 bits, add in 32. All else: everything in `wide`. That
        # holds for float16, too: a gradient of 1e-8 underflows in it, but not in bfloat16.
        inputs = torch.promote_types(hidden.dtype, head.dtype)
        self.wide = torch.promote_types(inputs, torch.float32)
        self.dtype, self.mixed = self.wide, {}  # of what is multiplied; options for torch.mm
        if inputs == torch.bfloat16 and head.is_cuda:
            self.dtype, self.mixed = torch.bfloat16, {"out_dtype": self.wide}
        self.hidden, self.head = hidden.detach(), head.detach().to(self.dtype)  # [N, D], [V, D]
        self.temperature, self.chunk = temperature, chunk

        # What comes out: weights * loss, then what Stats holds. NaN: not visited. [5, N]
        self.per_token = hidden.new_full((5, len(hidden)), math.nan, dtype=self.wide)
        # The gradients [N, D] and [V, D]. None: not wanted.
        trained = torch.is_grad_enabled()
        need_dhidden, need_dhead = trained and hidden.requires_grad, trained and head.requires_grad
        self.dhidden = hidden.new_zeros(hidden.shape, dtype=self.wide) if need_dhidden else None
        self.dhead = head.new_zeros(head.shape, dtype=self.wide) if need_dhead else None

    @torch.compiler.disable
    def run(self, index, tokens, options):
        """Visit the tokens `index` [K]. Without `tokens.advantages`: for their log-probs only."""
        dhidden, dhead = (None, None) if tokens.advantages is None else (self.dhidden, self.dhead)
        wants_gradient = dhidden is not None or dhead is not None
        chunk = self.chunk or _tokens_per_chunk(len(index), len(self.head), self.hidden.is_cuda)
        # All chunks use the same memory. One tensor may be both `logits` and `dlogits`, because
        # fused_policy_loss reads each number before it overwrites it. 16 bits need another tensor.
        logits, dlogits = self._buffer(min(chunk, len(index)), self.wide), None  # [C, V]
        if wants_gradient:
            dlogits = logits if self.dtype == self.wide else self._buffer(len(logits), self.dtype)
        # autocast would round the logits to 16 bits behind our back
        with torch.autocast(self.hidden.device.type, enabled=False):
            for begin in range(0, len(index), chunk):
                part = index[begin : begin + chunk]  # [C]
                logits = logits[: len(part)]  # the last chunk is smaller
                dlogits = dlogits[: len(part)] if wants_gradient else None
                x = self.hidden[part].to(self.dtype)  # [C, D]
                torch.mm(x, self.head.T, **self.mixed, out=logits)  # product 1
                self.per_token[:, part] = fused_policy_loss(logits, dlogits, tokens.at(part),
                                                            options, self.temperature)
                # From logits = x @ head.T follow dx = dlogits @ head and dhead = dlogits.T @ x.
                if dhidden is not None:
                    dhidden[part] = torch.mm(dlogits, self.head, **self.mixed)  # product 2
                if dhead is not None:  # added to the earlier chunks' in place
                    torch.addmm(dhead, dlogits.T, x, **self.mixed, out=dhead)  # product 3

    def _buffer(self, count, dtype):
        """[count, V]. Products are faster if each row begins at a multiple of 64 numbers."""
        width = math.ceil(len(self.head) / 64) * 64
        return self.hidden.new_empty(count, width, dtype=dtype)[:, : len(self.head)]


def _tokens_per_chunk(count, vocabulary, cuda):
    """Tokens whose logits are held at a time; all chunks are about equal.

    On a CPU: few enough for its caches, but with fewer than 128 the head's gradient would be
    rewritten too often. On a GPU (an estimate, not measured yet): products large enough to fill it,
    in logits of 1 GB at most.
    """
    for_cache = min(256, max(128, 2**24 // vocabulary))
    on_cpu = max(for_cache, 2**20 // vocabulary)  # of a small vocabulary, more fit the cache
    most = min(4096, 2**28 // vocabulary) if cuda else on_cpu
    chunks = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / chunks))


def _tokens_with_signal(tokens, options):
    """Indices [K] of the tokens that can move the loss: see `linear_policy_loss`."""
    keep = tokens.weights != 0  # [N]
    if not options.kl_coef and not options.entropy_coef:
        has_signal = keep & (tokens.advantages != 0)
        if tokens.sequence_ids is not None:
            has_signal = torch.isin(tokens.sequence_ids, tokens.sequence_ids[has_signal])
        keep = keep & has_signal
    return keep.nonzero()[:, 0]


def _run_sequences(chunks, keep, tokens, options):
    """Run twice: first for the log-probs, then for the gradients.

    The ratio of a sequence needs all of its log-probs, and the tokens of a sequence may be in
    several chunks. So no slope is known before all log-probs are. This costs one more product.

    Known after the first run: the slope of each token. Wanted: the gradients that follow from it.
    A REINFORCE token has the loss -weight * advantage * log p, with the slope -weight * advantage.
    With advantage = -slope / weight, this is just the slope we want. So run REINFORCE.
    """
    chunks.run(keep, Tokens(tokens.targets), options)
    _, logps, entropy, _, _ = chunks.per_token[:, keep]  # [K] each
    losses, ratio, clipped, slopes = _losses_and_slopes(logps, entropy, tokens.at(keep), options)
    if chunks.dhidden is not None or chunks.dhead is not None:
        advantages = torch.zeros_like(tokens.weights)  # [N]
        advantages[keep] = -slopes / tokens.weights[keep]
        reinforce = Options(kind="reinforce", entropy_coef=options.entropy_coef)
        chunks.run(keep, Tokens(tokens.targets, tokens.weights, advantages), reinforce)
    chunks.per_token[:, keep] = torch.stack([losses, logps, entropy, ratio, clipped])


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known. The backward pass hands them to autograd.

    `grad_output` is the derivative of what follows with respect to this loss: 1, or a loss scale.
    The gradients are scaled in place, to save memory. So the backward pass can run only once.
    """

    @staticmethod
    def forward(ctx, hidden, head, loss, gradients):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were given away: compute it again to "
                               "differentiate it a second time")
        gradients, ctx.gradients = ctx.gradients, None
        # Autograd then rounds them to the dtypes of hidden and head. The order matters: only the
        # loss scale makes a small float16 gradient representable.
        dhidden, dhead = (None if x is None else x.mul_(grad_output) for x in gradients)
        return dhidden, dhead, None, None


def _check_lengths(tokens, count):
    for name, values in tokens._asdict().items():
        if values is not None and values.shape != (count,):
            raise ValueError(f"{name} must be [N] = [{count}], one value per row of hidden, "
                             f"got {list(values.shape)}")


# --------------------------------------------------------------------------------------------------
# 4. `fused_policy_loss` as a Triton kernel: the names are those of `_fused_torch`
#
# The GPU runs a kernel many times side by side; each run is a program. Here one program does one
# token, and `tl.program_id(0)` says which. A tensor argument arrives as an address: the place of
# its first number in memory. Such names are in capitals. LOGITS + n is the address of the number n
# places later. `tl.load` reads numbers and `tl.store` writes them. `tl.arange(0, BLOCK)` is the
# vector 0, 1, ..., BLOCK - 1. So tl.load(LOGITS + tl.arange(0, BLOCK)) reads BLOCK logits. The mask
# skips columns beyond the vocabulary.
#
# KIND, VOCABULARY and BLOCK are constants (tl.constexpr). Triton compiles a kernel for each set of
# constants, and for each set of arguments that are None. So an `if` on them costs nothing.
#
# Most of the time goes into reading and writing memory. So the kernel reads the logits of a token
# only twice. The first pass computes the sums. The second computes the gradient, which needs
# `total` and `slope`. Both are known only after the last block, and a program does not have enough
# fast memory (registers) to keep all blocks until then.


def _fused_triton(logits, dlogits, tokens, options, temperature):
    """`fused_policy_loss` on a GPU."""
    count, vocabulary = logits.shape
    results = logits.new_full((5, count), math.nan)
    _fused_kernel[(count,)](
        logits, dlogits, logits.stride(0), 0 if dlogits is None else dlogits.stride(0), *results,
        tokens.targets, tokens.weights, tokens.advantages, tokens.old_logps, tokens.behavior_logps,
        tokens.ref_logps if options.kl_coef else None, 1 / temperature, 1 - options.eps_low,
        1 + options.eps_high, options.dual_clip, options.tis_cap, options.kl_coef,
        options.entropy_coef, LOG_LIMIT, KIND=options.kind, VOCABULARY=vocabulary,
        BLOCK=min(2048, triton.next_power_of_2(vocabulary)))
    return results


if triton:
    @triton.jit
    def _fused_kernel(LOGITS, DLOGITS, logits_stride, dlogits_stride, LOSSES, LOGPS, ENTROPIES,
                      RATIOS, CLIPPED, TARGETS, WEIGHTS, ADVANTAGES, OLD_LOGPS, BEHAVIOR_LOGPS,
                      REF_LOGPS, scale, low, high, dual_clip, tis_cap, kl_coef, entropy_coef, limit,
                      KIND: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
        """One token: sums over its logits, its loss and slope, the gradient of its logits.

        scale: 1 / temperature. low, high: the limits of the ratio. limit: LOG_LIMIT.
        """
        token = tl.program_id(0).to(tl.int64)  # in 32 bits, token * stride could overflow
        LOGITS += token * logits_stride
        target = tl.load(TARGETS + token)
        largest, z_target, others, sum_ez = _sums(LOGITS, target, scale, VOCABULARY, BLOCK)
        e_target = tl.exp(z_target)
        total = others + e_target
        log_total = tl.where(z_target == 0, _log1p(others), tl.log(total))
        logp, entropy = z_target - log_total, log_total - sum_ez / total
        tl.store(LOGPS + token, logp)
        tl.store(ENTROPIES + token, entropy)

        if ADVANTAGES is not None:
            # `policy_loss` and its slope by hand: autograd does not reach into a kernel.
            weight, advantage = tl.load(WEIGHTS + token), tl.load(ADVANTAGES + token)
            old = logp if OLD_LOGPS is None else tl.load(OLD_LOGPS + token)
            if tis_cap is not None:  # multiplies the gain, as the advantage does
                advantage *= tl.minimum(tl.exp(old - tl.load(BEHAVIOR_LOGPS + token)), tis_cap)
            gain, gain_slope, ratio, clipped = _gain(logp, old, advantage, low, high, dual_clip,
                                                     limit, KIND)
            loss, slope = -gain - entropy_coef * entropy, -gain_slope
            if REF_LOGPS is not None:
                kl, kl_slope = _k3(tl.load(REF_LOGPS + token) - logp, limit)
                loss, slope = loss + kl_coef * kl, slope + kl_coef * kl_slope
            tl.store(LOSSES + token, weight * loss)
            tl.store(RATIOS + token, ratio)
            tl.store(CLIPPED + token, clipped)

            if DLOGITS is not None:
                slope, entropy_slope = weight * slope, -entropy_coef * weight
                at_target = slope * others - entropy_slope * e_target * (logp + entropy)
                _store_gradient(LOGITS, DLOGITS + token * dlogits_stride, target, at_target / total,
                                slope, entropy_slope, entropy, largest, log_total, scale,
                                VOCABULARY, BLOCK)

    @triton.jit
    def _sums(LOGITS, target, scale, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
        """The first pass over a token's logits: the largest, z_target, others, sum_ez.

        z is relative to the largest logit, which is known only at the end. To find it first would
        take one more pass. So the sums are relative to the largest so far (1805.02867). When a
        larger one comes, all earlier z shift by the same number, and all earlier e by a factor:
            sum e -> exp(shift) * sum e       sum e z -> exp(shift) * (sum e z + shift * sum e)
        """
        target_logit = tl.load(LOGITS + target)
        largest, others, sum_ez = target_logit, 0.0, 0.0  # both sums without the target, for now
        for begin in range(0, VOCABULARY, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            logit = tl.load(LOGITS + column, mask=column < VOCABULARY, other=float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logit, 0))
            shift = (largest - new_largest) * scale  # at most 0
            sum_ez = tl.exp(shift) * (sum_ez + shift * others)
            others = tl.exp(shift) * others
            z = (logit - new_largest) * scale
            e = tl.where(column == target, 0.0, tl.exp(z))
            others += tl.sum(e, 0)
            sum_ez += tl.sum(tl.where(e > 0, e * z, 0.0), 0)  # not 0 * -inf, which is NaN
            largest = new_largest
        z_target = (target_logit - largest) * scale
        return largest, z_target, others, sum_ez + tl.exp(z_target) * z_target

    @triton.jit
    def _store_gradient(LOGITS, DLOGITS, target, at_target, slope, entropy_slope, entropy, largest,
                        log_total, scale, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
        """The second pass over a token's logits: their gradient, by the formula of part 2."""
        for begin in range(0, VOCABULARY, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            logit = tl.load(LOGITS + column, mask=column < VOCABULARY, other=0.0)
            log_p = (logit - largest) * scale - log_total
            gradient = -tl.exp(log_p) * (slope + entropy_slope * (log_p + entropy))
            gradient = tl.where(column == target, at_target, gradient) * scale
            tl.store(DLOGITS + column, gradient.to(DLOGITS.dtype.element_ty),
                     mask=column < VOCABULARY)

    @triton.jit
    def _gain(logp, old, advantage, low, high, dual_clip, limit, KIND: tl.constexpr):
        """The gain of `policy_loss`, its slope d gain / d logp, the ratio, and clipped."""
        log_ratio = logp - old
        ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -limit), limit))
        clipped_ratio = tl.minimum(tl.maximum(ratio, low), high)
        if KIND == "clip":
            clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
            gain = tl.minimum(ratio * advantage, clipped_ratio * advantage)
            if dual_clip is not None:
                capped = (advantage < 0) & (ratio > dual_clip)
                gain = tl.where(capped, dual_clip * advantage, gain)
                clipped = clipped | capped
            # d ratio / d logp = ratio. Where the gain is constant, its slope is 0.
            slope = tl.where(clipped | (tl.abs(log_ratio) > limit), 0.0, ratio * advantage)
        elif KIND == "cispo":
            clipped = clipped_ratio != ratio
            gain, slope = clipped_ratio * advantage * logp, clipped_ratio * advantage
        else:  # reinforce
            clipped = ratio < 0  # never
            gain, slope = advantage * logp, advantage
        return gain, slope, ratio, clipped.to(tl.float32)

    @triton.jit
    def _k3(delta, limit):
        """The KL term of `policy_loss`, and its slope d KL / d logp. delta: ref_logps - logps."""
        bound = tl.minimum(tl.maximum(delta, -limit), limit)
        slope = tl.where(tl.abs(delta) > limit, 0.0, 1 - tl.exp(bound))
        return tl.exp(bound) - bound - 1, slope

    @triton.jit
    def _log1p(x):
        """log(1 + x) for x >= 0. Triton has none of its own.

        y = 1 + x is rounded, so y - 1 is not quite x. Near 1 the logarithm is almost proportional
        to y - 1. So the factor x / (y - 1) corrects log(y) (Kahan).
        """
        y = 1.0 + x
        return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


# --------------------------------------------------------------------------------------------------
# python kernels.py


def _demo(count=1024, width=64, vocabulary=16000):
    """The plain and the fused loss of random tokens, in float64: time, memory, difference."""
    torch.manual_seed(0)
    hidden = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Parameter(torch.randn(vocabulary, width, dtype=torch.float64) / width**0.5)
    targets, advantages = torch.randint(vocabulary, (count,)), torch.randn(count)
    batch = hidden, head, targets, advantages, torch.full((count,), 1 / count)
    old_logps = linear_logps(hidden, head, targets)[0] + 0.3 * torch.randn(count)
    print(f"{count} tokens, width {width}, vocabulary {vocabulary}, float64, forward and backward:")

    began = time.perf_counter()
    plain = plain_linear_loss(*batch, old_logps=old_logps)
    plain_gradients = torch.autograd.grad(plain, (hidden, head))
    middle = time.perf_counter()
    fused, stats = linear_policy_loss(*batch, old_logps=old_logps)
    fused_gradients = torch.autograd.grad(fused, (hidden, head))
    ended = time.perf_counter()

    chunk = _tokens_per_chunk(count, vocabulary, cuda=False)
    for name, seconds, held in ("plain", middle - began, count), ("fused", ended - middle, chunk):
        print(f"  {name}: {seconds:.2f} s, logits of {held} tokens at a time: "
              f"{8e-6 * held * vocabulary:.0f} MB for each copy of them")
    error = max((a - b).abs().max() for a, b in zip(plain_gradients, fused_gradients))
    print(f"  {stats.clipped.mean():.0%} of the tokens are clipped. The losses differ by "
          f"{abs(plain - fused):.0e}, the gradients by at most {error:.0e}")


if __name__ == "__main__":
    _demo()
