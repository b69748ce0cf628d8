"""Hidden states -> policy-gradient loss, without holding the logits of the whole batch.

A language model ends in one matrix product: hidden states [N, D] times the vocabulary head [V, D]
give logits [N, V]. With a vocabulary of 150,000, those logits and their gradient need more memory
than the rest of training. The loss wants one number per row: the log-prob of the sampled token.

Read `policy_loss` first: the loss of the papers, as a function of log-probs. `plain_linear_loss`
adds the head in the plainest way, and holds all logits. Below the ruler, `linear_policy_loss`
computes the same, but a few hundred rows at a time:

    logits of a chunk of rows                         product 1
    -> log-probs, ratios, loss, gradient of logits    one Triton kernel (`fused_policy_loss`)
    -> gradient of the hidden states                  product 2
    -> gradient of the head                           product 3

The trick: the advantage and the old log-prob of a token are known before the loss is. So the
gradient of a chunk's logits is known as soon as the logits are. The chunk is used at once and
thrown away, and the backward pass has nothing left to compute.

Left out: logit soft-capping, a bias in the head, tensor parallelism, a second derivative.

grpo.py calls this file: rows are the trained tokens of a batch, `hidden` the last hidden states
before them. To use it elsewhere, copy it as it is: it needs torch only, and Triton on a GPU.
`python kernels.py` compares the plain and the fused loss. tests/bench_kernels.py measures them.
"""

import math
import os
import time
from dataclasses import dataclass, fields

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, or torch built for CPUs only: the torch version does the work
    triton = None

KINDS = ("clip", "cispo", "reinforce")
# exp(88) overflows float32, and 0 * inf in a backward pass is NaN. So ratios stop at e^60.
LOG_LIMIT = 60.0


# --------------------------------------------------------------------------------------------------
# The idea: the loss, as a function of log-probs


def policy_loss(logps, entropy, advantages, *, old_logps=None, behavior_logps=None, ref_logps=None,
                eps_low=0.2, eps_high=0.28, dual_clip=None, tis_cap=None, kl_coef=0.0,
                entropy_coef=0.0, kind="clip", sequence_ids=None):
    """The loss of each token [N], its ratio [N], and whether it was clipped [N]. All inputs: [N].

    ratio = exp(logps - old_logps)

      clip       -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)       PPO, 1707.06347
                 eps_high above eps_low: clip-higher                           DAPO, 2503.14476
                 dual_clip c: for A < 0 at most -c A                           1912.09729
      cispo      -stop_gradient(clip(ratio)) A logps                           2506.13585
      reinforce  -A logps                                                      without ratio
    + kl_coef (exp(ref - logps) - (ref - logps) - 1)        k3, joschu.net/blog/kl-approx.html
    - entropy_coef entropy

    Without `old_logps` the ratio is exactly 1: this is the first update of a batch. With
    `sequence_ids` all tokens of a sequence share one ratio (GSPO). `tis_cap` multiplies the policy
    term by min(exp(old - behavior), tis_cap): a correction for tokens that another engine, or
    another precision, has sampled. `clipped` marks tokens that lost their gradient to clipping
    (clip), or whose ratio was cut (cispo).

    >>> logps, advantages = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0])
    >>> old_logps = torch.tensor([-1.0, -2.0, -2.0])
    >>> loss, ratio, clipped = policy_loss(logps, None, advantages, old_logps=old_logps)
    >>> [[round(x, 2) for x in row.tolist()] for row in (loss, ratio, clipped)]
    [[-1.0, -1.28, 2.72], [1.0, 2.72, 2.72], [0.0, 1.0, 0.0]]
    """
    # Detached: the ratio is then 1, and its gradient is that of logps.
    old_logps = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old_logps
    if sequence_ids is not None:
        log_ratio = _sequence_mean(log_ratio, sequence_ids)
    ratio = log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    within = ratio.clamp(1 - eps_low, 1 + eps_high)

    if kind == "clip":
        # The smaller of the two: a step that goes too far gains nothing more.
        gain = torch.minimum(ratio * advantages, within * advantages)
        too_high = (advantages > 0) & (ratio > 1 + eps_high)
        too_low = (advantages < 0) & (ratio < 1 - eps_low)
        clipped = too_high | too_low
        if dual_clip is not None:
            floored = (advantages < 0) & (ratio > dual_clip)
            gain = torch.where(floored, dual_clip * advantages, gain)
            clipped = clipped | floored
    elif kind == "cispo":
        gain, clipped = within.detach() * advantages * logps, within != ratio
    else:
        gain, clipped = advantages * logps, torch.zeros_like(ratio)

    if tis_cap is not None:
        gain = gain * (old_logps - behavior_logps).exp().clamp(max=tis_cap).detach()
    loss = -gain
    if kl_coef:
        delta = (ref_logps - logps).clamp(-LOG_LIMIT, LOG_LIMIT)
        loss = loss + kl_coef * (delta.exp() - delta - 1)
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    return loss, ratio.detach(), clipped.to(ratio.dtype)


def _sequence_mean(values, sequence_ids):
    """The mean over each sequence, given to all of its tokens (GSPO, 2507.18071). [N] -> [N]."""
    _, index = sequence_ids.unique(return_inverse=True)  # [N], from 0 to S - 1
    count = int(index.max()) + 1 if len(index) else 0
    sums = values.new_zeros(count).index_add(0, index, values)  # [S]
    return (sums / index.bincount())[index]


def plain_linear_loss(hidden, weight, targets, advantages, weights, *, temperature=1.0, **options):
    """`linear_policy_loss` in the plainest way: all logits at once, and autograd does the rest.

    >>> hidden, targets, ones = torch.zeros(1, 2), torch.tensor([3]), torch.ones(1)
    >>> plain_linear_loss(hidden, torch.ones(4, 2), targets, ones, ones, kind="reinforce")
    tensor(1.3863)
    """
    log_probs = (hidden @ weight.T / temperature).log_softmax(-1)  # [N, V]
    logps = log_probs.gather(1, targets[:, None])[:, 0]  # [N]
    entropy = -(log_probs.exp() * log_probs).sum(-1)  # [N]
    losses, _, _ = policy_loss(logps, entropy, advantages, **options)  # [N]
    return (weights * losses).sum()


# ==================================================================================================
# The fast version: the same loss, a chunk of rows at a time. A test compares the two.
# ==================================================================================================


@dataclass
class Stats:
    """What the loss saw of each row, [N], without gradient. NaN: the row was dropped."""

    logps: torch.Tensor  # log-prob of the target, at `temperature`
    entropy: torch.Tensor  # of the whole distribution, in nats
    ratio: torch.Tensor  # exp(logps - old_logps); with sequence_ids, that of the sequence
    clipped: torch.Tensor  # 1.0 where clipping took the gradient away or cut the ratio, else 0.0


@dataclass
class Rows:
    """What is known of each row, [N] each. None: not given.

    A row here is one trained token, not a segment as in grpo.py.
    """

    targets: torch.Tensor
    weights: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    behavior_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    slopes: torch.Tensor | None = None  # d loss / d logps, where it is known beforehand (GSPO)

    def at(self, index) -> "Rows":
        """Some of the rows."""
        values = [getattr(self, field.name) for field in fields(self)]
        return Rows(*(None if value is None else value[index] for value in values))


@dataclass(frozen=True)
class Options:
    """The options of `policy_loss`."""

    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    tis_cap: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    kind: str = "clip"


@torch.no_grad()
def linear_logps(hidden, weight, targets, *, temperature=1.0, chunk=None):
    """Log-probs of `targets` [N] under softmax(hidden [N, D] @ weight [V, D].T / temperature).

    Returns ([N], [N]): the log-probs, and the entropies of the distributions. Without gradient:
    for old and reference log-probs, and for evaluation. `chunk` rows of logits are held at a time.
    Raises ValueError for shapes that do not fit.

    >>> linear_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3]))   # log 4 = 1.3863
    (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    _check_shapes(hidden, weight, {"targets": targets})
    _check_numbers(temperature, chunk)
    every_row = torch.arange(len(hidden), device=hidden.device)
    head = Head(hidden, weight, temperature, chunk)
    _, logps, entropy, _, _ = head.run(every_row, Rows(targets), Options()).per_row
    return logps, entropy


def linear_policy_loss(hidden, weight, targets, advantages, weights, *, old_logps=None,
                       behavior_logps=None, ref_logps=None, sequence_ids=None, temperature=1.0,
                       chunk=None, **options):
    """sum_i weights_i * policy_loss_i, of the tokens `targets` [N] under
    softmax(hidden [N, D] @ weight [V, D].T / temperature). Returns (loss, Stats).

    The loss is a scalar. It can be differentiated once, with respect to hidden and weight.
    `weights` [N] is mask and normaliser in one: 0 for tokens that the policy did not sample, else
    for example 1 / (tokens of the whole batch). `options` are those of `policy_loss`. `temperature`
    must be the one that was sampled at, or the first ratio is not 1.

    Rows that cannot matter are dropped before any product. They may hold anything (a target of
    -100, NaN), and their gradient is exactly 0. These are rows of weight 0; and, without KL and
    entropy, rows of advantage 0. With `sequence_ids` all rows of a sequence must be in the same
    call; its ratio is the mean over its rows of weight other than 0. The statistics of dropped
    rows are NaN.

    `chunk` rows of logits are held at a time. Products add up in float32 at least (float64 for
    float64 inputs), whatever the inputs or autocast say: log-probs from 16-bit logits are wrong by
    several percent. Raises ValueError for input that makes no sense.

    >>> hidden = torch.eye(2, requires_grad=True)
    >>> targets, advantages = torch.tensor([0, -100]), torch.tensor([1.0, 1.0])
    >>> weights = torch.tensor([1.0, 0.0])   # the second row is masked
    >>> loss, stats = linear_policy_loss(hidden, torch.eye(2), targets, advantages, weights)
    >>> loss.backward(); loss.item(), stats.logps, hidden.grad   # token 0 is pushed up
    (-1.0, tensor([-0.3133,     nan]), tensor([[-0.2689,  0.2689],
            [ 0.0000,  0.0000]]))
    """
    numbers = {"weights": weights, "advantages": advantages, "old_logps": old_logps,
               "behavior_logps": behavior_logps, "ref_logps": ref_logps}
    numbers = {name: x for name, x in numbers.items() if x is not None}
    sequences = {} if sequence_ids is None else {"sequence_ids": sequence_ids}
    _check_shapes(hidden, weight, {"targets": targets, **numbers, **sequences})
    _check_numbers(temperature, chunk)
    head, options = Head(hidden, weight, temperature, chunk), Options(**options)
    rows = Rows(targets, **{name: x.detach().to(head.wide) for name, x in numbers.items()})
    _check_options(rows, options)

    keep = _rows_with_signal(rows, options, sequence_ids)  # [K]
    if sequence_ids is None:
        result = head.run(keep, rows, options, gradients=True)
    else:
        result = _run_sequences(head, keep, rows, options, sequence_ids)
    losses, *stats = result.per_row
    loss = losses[keep].sum()
    if result.dx is not None or result.dw is not None:
        loss = _KnownGradients.apply(hidden, weight, loss, [result.dx, result.dw])
    return loss, Stats(*stats)


def _run_sequences(head, keep, rows, options, sequence_ids):
    """The ratio of a sequence needs all of its log-probs. So they come first, the gradients after.

    This costs one more product.
    """
    result = head.run(keep, Rows(rows.targets), options)
    _, logps, entropy, _, _ = result.per_row[:, keep]  # [K] each
    losses, ratio, clipped, slopes = _losses_and_slopes(logps, entropy, rows.at(keep), options,
                                                        sequence_ids[keep])
    if head.need_dx or head.need_dw:
        slopes = torch.zeros_like(rows.weights).index_copy(0, keep, slopes)  # [N]
        known = Rows(rows.targets, rows.weights, slopes=slopes)
        result = head.run(keep, known, options, gradients=True)
    result.per_row[:, keep] = torch.stack([losses, logps, entropy, ratio, clipped])
    return result


@dataclass
class Result:
    """Of one run over the rows."""

    per_row: torch.Tensor  # [5, N]: weights * loss, then what Stats holds. NaN: not visited
    dx: torch.Tensor | None  # [N, D], gradient of the hidden states. None: not wanted
    dw: torch.Tensor | None  # [V, D], gradient of the head


class Head:
    """The vocabulary head: rows of hidden states in; losses, statistics and gradients out."""

    def __init__(self, hidden, weight, temperature, chunk):
        # Log-probs, losses and gradients are added up in float32 at least.
        inputs = torch.promote_types(hidden.dtype, weight.dtype)
        self.wide = torch.promote_types(inputs, torch.float32)
        # float16 is widened, too: a gradient of 1e-8 underflows in it, but not in bfloat16.
        is_narrow = hidden.dtype == weight.dtype == torch.bfloat16 and _adds_up_wide(weight)
        self.dtype = torch.bfloat16 if is_narrow else self.wide  # of what is multiplied
        self.hidden, self.weight = hidden.detach(), weight.detach().to(self.dtype)
        self.temperature, self.chunk = temperature, chunk
        self.need_dx = hidden.requires_grad and torch.is_grad_enabled()
        self.need_dw = weight.requires_grad and torch.is_grad_enabled()

    @torch.compiler.disable
    @torch.no_grad()
    def run(self, index, rows, options, gradients=False) -> Result:
        """The rows `index` [K], a chunk at a time. `rows` without advantages: log-probs only."""
        need_dx, need_dw = gradients and self.need_dx, gradients and self.need_dw
        result = Result(per_row=self._zeros(5, len(self.hidden)).fill_(math.nan),
                        dx=self._zeros(*self.hidden.shape) if need_dx else None,
                        dw=self._zeros(*self.weight.shape) if need_dw else None)
        chunk = self.chunk or _rows_per_chunk(len(index), len(self.weight), self.hidden.is_cuda)
        logits = self._buffer(min(chunk, len(index)), self.wide)
        dlogits = None
        if need_dx or need_dw:
            # A gradient of 16 bits needs memory of its own; one of 32 bits overwrites the logits.
            dlogits = logits if self.dtype == self.wide else self._buffer(len(logits), self.dtype)
        # autocast would round the logits to 16 bits behind our back
        with torch.autocast(self.hidden.device.type, enabled=False):
            for begin in range(0, len(index), chunk):
                part = index[begin : begin + chunk]  # [C]
                self._run_chunk(part, rows.at(part), options, logits, dlogits, result)
        return result

    def _run_chunk(self, part, rows, options, logits, dlogits, result):
        """Product 1, the fused kernel, products 2 and 3. Writes to result and to both buffers."""
        x, logits = self.hidden[part].to(self.dtype), logits[: len(part)]  # [C, D], [C, V]
        dlogits = None if dlogits is None else dlogits[: len(part)]  # [C, V]
        _product(x, self.weight.T, logits)
        result.per_row[:, part] = fused_policy_loss(logits, dlogits, rows, options,
                                                    self.temperature)
        if result.dx is not None:
            result.dx[part] = _product(dlogits, self.weight, self._zeros(*x.shape))
        if result.dw is not None:
            _product(dlogits.T, x, result.dw, add=True)

    def _zeros(self, *shape):
        return torch.zeros(shape, dtype=self.wide, device=self.hidden.device)

    def _buffer(self, count, dtype):
        """[count, V]. Rows that begin at multiples of 64 numbers are multiplied faster."""
        vocabulary = len(self.weight)
        width = vocabulary + -vocabulary % 64
        return torch.empty(count, width, dtype=dtype, device=self.hidden.device)[:, :vocabulary]


def _rows_per_chunk(count, vocabulary, cuda):
    """Rows of logits that are held at a time; all chunks are about equal.

    On a CPU: few enough for its caches, but with fewer than 128 the head's gradient would be
    rewritten too often. On a GPU (an estimate, not measured yet): products large enough to fill it,
    in logits of 1 GB at most.
    """
    on_cpu = max(2**20 // vocabulary, min(256, max(128, 2**24 // vocabulary)))
    most = min(4096, 2**28 // vocabulary) if cuda else on_cpu
    chunks = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / chunks))


def _adds_up_wide(x):
    """Can this device multiply 16-bit matrices into a 32-bit one? Torch can on GPUs only."""
    return x.is_cuda


def _product(a, b, out, add=False):
    """out = a @ b, or out += a @ b, added up in the precision of `out`. Returns out."""
    mixed = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    if add:
        return torch.addmm(out, a, b, **mixed, out=out)
    return torch.mm(a, b, **mixed, out=out)


def _rows_with_signal(rows, options, sequence_ids):
    """Indices [K] of the rows that can move the loss."""
    sampled = rows.weights != 0
    if options.kl_coef or options.entropy_coef:  # signal where the advantage is 0
        return sampled.nonzero()[:, 0]
    live = sampled & (rows.advantages != 0)
    if sequence_ids is not None:
        # A token of advantage 0 still belongs to its sequence's mean ratio.
        live = sampled & torch.isin(sequence_ids, sequence_ids[live])
    return live.nonzero()[:, 0]


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known. The backward pass scales them in place, so only once."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, gradients):
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were given away: compute it again to "
                               "differentiate it a second time")
        gradients, ctx.gradients = ctx.gradients, None
        # First scale, then round: only the loss scale makes a small float16 gradient representable.
        dx, dw = (None if gradient is None else gradient.mul_(grad_output).to(dtype)
                  for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dx, dw, None, None


def _check_shapes(hidden, weight, per_row):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError("hidden must be [N, D] and weight [V, D], got "
                         f"{list(hidden.shape)} and {list(weight.shape)}")
    for name, value in per_row.items():
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be [N] = [{len(hidden)}], one value per row of hidden, "
                             f"got {list(value.shape)}")


def _check_numbers(temperature, chunk):
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def _check_options(rows, options):
    if options.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {options.kind!r}")
    if options.kl_coef and rows.ref_logps is None:
        raise ValueError("kl_coef needs ref_logps, the log-probs of the reference model")
    cap = options.tis_cap
    if cap is not None and not (cap > 0 and rows.behavior_logps is not None):
        raise ValueError("tis_cap must be positive and needs behavior_logps")
    if options.dual_clip is not None and not options.dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, got {options.dual_clip}")


# --------------------------------------------------------------------------------------------------
# From a chunk's logits to its loss and their gradient: in torch, and as one Triton kernel
#
# With z = (logit - largest logit of the row) / temperature, t the target, and e_j = exp(z_j),
#     total = sum of e      log p_j = z_j - log(total)      entropy = log(total) - sum e z / total
#     slope = d loss / d logp                  bonus = d loss / d entropy = -entropy_coef * weight
# the gradient of the logits, times the temperature, is
#     d loss / d z_j = -p_j (slope + bonus (log p_j + entropy)) + (slope if j is the target)
# At the target, slope (1 - p_t) remains. Here 1 - p_t is computed as the sum of all other
# probabilities. The difference would lose its digits where the policy is sure of its token.


def fused_policy_loss(logits, dlogits, rows, options, temperature):
    """The logits of some rows [C, V] -> weights * loss, logps, entropy, ratio, clipped: [5, C].

    Writes the gradient of the logits to `dlogits` [C, V], which may be `logits`. None: not wanted.
    In either case the logits are lost. Without `rows.advantages` there is no loss and no ratio
    (NaN); the gradient then follows from `rows.slopes`.
    """
    if _on_triton(logits):
        return _fused_triton(logits, dlogits, rows, options, temperature)
    results = logits.new_empty(5, len(logits))
    # A few rows at a time stay in the cache of a CPU. On other devices: all at once.
    count = max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for begin in range(0, len(logits), count):
        part = slice(begin, begin + count)
        gradient = None if dlogits is None else dlogits[part]
        results[:, part] = _fused_torch(logits[part], gradient, rows.at(part), options, temperature)
    return results


def _fused_torch(logits, dlogits, rows, options, temperature):
    """`fused_policy_loss` for a few rows."""
    targets = rows.targets[:, None]  # [C, 1]
    z = logits.sub_(logits.max(1, keepdim=True).values).div_(temperature)  # [C, V]
    z_target = z.gather(1, targets)[:, 0]  # [C], 0 if the target is the likeliest token
    e = z.exp()  # [C, V]
    weighted = torch.linalg.vecdot(e, z)  # [C], the sum of e z
    e.scatter_(1, targets, 0.0)
    others = e.sum(1)  # [C], of all tokens but the target
    total = others + z_target.exp()
    # log1p keeps the digits of p near 1.
    log_total = torch.where(z_target == 0, others.log1p(), total.log())
    logps, entropy = z_target - log_total, log_total - weighted / total

    losses, ratio, clipped, slopes = *torch.full_like(logps.expand(3, -1), math.nan), rows.slopes
    if rows.advantages is not None:
        losses, ratio, clipped, slopes = _losses_and_slopes(logps, entropy, rows, options)
    if dlogits is not None:
        bonus = -options.entropy_coef * rows.weights
        at_target = (slopes * others - bonus * z_target.exp() * (logps + entropy)) / total
        factor = slopes[:, None]  # [C, 1]
        if options.entropy_coef:  # slope + bonus (log p + entropy), [C, V]
            factor = z.add_((entropy - log_total)[:, None]).mul_(bonus[:, None]).add_(factor)
        # First -p / temperature: a slope can be e^60, and 0 * inf would be NaN.
        e.mul_((-1 / (total * temperature))[:, None])
        torch.mul(e, factor, out=dlogits)
        dlogits.scatter_(1, targets, (at_target / temperature)[:, None].to(dlogits.dtype))
    return torch.stack([losses, logps, entropy, ratio, clipped])


def _losses_and_slopes(logps, entropy, rows, options, sequence_ids=None):
    """weights * policy_loss, ratio, clipped, and the slopes d loss / d logps, all [C]."""
    with torch.enable_grad():
        logps = logps.detach().requires_grad_()
        losses, ratio, clipped = policy_loss(
            logps, entropy, rows.advantages, old_logps=rows.old_logps, ref_logps=rows.ref_logps,
            behavior_logps=rows.behavior_logps, sequence_ids=sequence_ids, **vars(options))
        losses = rows.weights * losses
        slopes, = torch.autograd.grad(losses.sum(), logps)
    return losses.detach(), ratio, clipped, slopes


def _on_triton(x):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and x.dtype == torch.float32 and (x.is_cuda or interpreted)


def _fused_triton(logits, dlogits, rows, options, temperature):
    count, vocabulary = logits.shape
    results = logits.new_full((5, count), math.nan)
    # What is None is not compiled into the kernel.
    _fused_kernel[(count,)](
        logits, dlogits, results, logits.stride(0), 0 if dlogits is None else dlogits.stride(0),
        count, rows.targets, rows.weights, rows.advantages, rows.old_logps,
        None if options.tis_cap is None else rows.behavior_logps,
        rows.ref_logps if options.kl_coef else None, rows.slopes, 1 / temperature,
        1 - options.eps_low, 1 + options.eps_high, options.dual_clip, options.tis_cap,
        options.kl_coef, options.entropy_coef, LOG_LIMIT, KIND=options.kind,
        VOCABULARY=vocabulary, BLOCK=min(2048, triton.next_power_of_2(vocabulary)))
    return results


if triton:
    @triton.jit
    def _fused_kernel(LOGITS, DLOGITS, RESULTS, logits_stride, dlogits_stride, count, TARGETS,
                      WEIGHTS, ADVANTAGES, OLD_LOGPS, BEHAVIOR_LOGPS, REF_LOGPS, SLOPES,
                      inverse_temperature, low, high, dual_clip, tis_cap, kl_coef, entropy_coef,
                      limit, KIND: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
        """One row of logits: read it twice, and keep everything between in registers."""
        row = tl.program_id(0).to(tl.int64)  # row * stride is beyond 2^31 for large chunks
        LOGITS += row * logits_stride
        RESULTS += row  # of [5, count]
        target = tl.load(TARGETS + row)
        largest, z_target, others, weighted = _row_sums(LOGITS, target, inverse_temperature,
                                                        VOCABULARY, BLOCK)
        e_target = tl.exp(z_target)
        total = others + e_target
        log_total = tl.where(z_target == 0, _log1p(others), tl.log(total))
        logp, entropy = z_target - log_total, log_total - weighted / total
        tl.store(RESULTS + count, logp)
        tl.store(RESULTS + 2 * count, entropy)

        if ADVANTAGES is not None:
            weight, advantage = tl.load(WEIGHTS + row), tl.load(ADVANTAGES + row)
            old = logp if OLD_LOGPS is None else tl.load(OLD_LOGPS + row)
            if BEHAVIOR_LOGPS is not None:  # a factor of the gain, as the advantage is
                advantage *= tl.minimum(tl.exp(old - tl.load(BEHAVIOR_LOGPS + row)), tis_cap)
            gain, gain_slope, ratio, clipped = _gain(logp, old, advantage, low, high, dual_clip,
                                                     limit, KIND)
            loss, slope = -gain - entropy_coef * entropy, -gain_slope
            if REF_LOGPS is not None:
                kl, kl_slope = _k3(tl.load(REF_LOGPS + row) - logp, limit)
                loss, slope = loss + kl_coef * kl, slope + kl_coef * kl_slope
            slope *= weight
            tl.store(RESULTS, weight * loss)
            tl.store(RESULTS + 3 * count, ratio)
            tl.store(RESULTS + 4 * count, clipped)
        elif SLOPES is not None:
            slope = tl.load(SLOPES + row)

        if DLOGITS is not None:
            bonus = -entropy_coef * tl.load(WEIGHTS + row)
            at_target = (slope * others - bonus * e_target * (logp + entropy)) / total
            _store_gradient(LOGITS, DLOGITS + row * dlogits_stride, target, at_target, slope,
                            bonus, entropy, largest, log_total, inverse_temperature,
                            VOCABULARY, BLOCK)

    @triton.jit
    def _row_sums(LOGITS, target, inverse_temperature, VOCABULARY: tl.constexpr,
                  BLOCK: tl.constexpr):
        """The largest logit, z of the target, the sum of e without the target's, the sum of e z.

        One pass: when a larger logit comes, the sums so far are rescaled to it.
        """
        target_logit = tl.load(LOGITS + target)
        largest, others, weighted = target_logit, 0.0, 0.0
        for begin in range(0, VOCABULARY, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < VOCABULARY
            logit = tl.load(LOGITS + column, mask=inside, other=float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logit, 0))
            step = (largest - new_largest) * inverse_temperature  # at most 0
            weighted = tl.exp(step) * (weighted + step * others)
            others = tl.exp(step) * others
            z = (logit - new_largest) * inverse_temperature
            e = tl.where(column == target, 0.0, tl.exp(z))
            others += tl.sum(e, 0)
            weighted += tl.sum(tl.where(e > 0, e * z, 0.0), 0)
            largest = new_largest
        z_target = (target_logit - largest) * inverse_temperature
        return largest, z_target, others, weighted + tl.exp(z_target) * z_target

    @triton.jit
    def _store_gradient(LOGITS, DLOGITS, target, at_target, slope, bonus, entropy, largest,
                        log_total, inverse_temperature, VOCABULARY: tl.constexpr,
                        BLOCK: tl.constexpr):
        """The second pass over a row: the gradient of its logits."""
        for begin in range(0, VOCABULARY, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            logit = tl.load(LOGITS + column, mask=column < VOCABULARY, other=0.0)
            log_p = (logit - largest) * inverse_temperature - log_total
            gradient = -tl.exp(log_p) * (slope + bonus * (log_p + entropy))
            gradient = tl.where(column == target, at_target, gradient) * inverse_temperature
            tl.store(DLOGITS + column, gradient.to(DLOGITS.dtype.element_ty),
                     mask=column < VOCABULARY)

    @triton.jit
    def _gain(logp, old, advantage, low, high, dual_clip, limit, KIND: tl.constexpr):
        """The gain (minus the policy term of `policy_loss`), its slope, the ratio, and clipped."""
        step = logp - old
        ratio = tl.exp(tl.minimum(tl.maximum(step, -limit), limit))
        within = tl.minimum(tl.maximum(ratio, low), high)
        if KIND == "clip":
            too_high = (advantage > 0) & (ratio > high)
            too_low = (advantage < 0) & (ratio < low)
            clipped = too_high | too_low
            gain = tl.minimum(ratio * advantage, within * advantage)
            if dual_clip is not None:
                floored = (advantage < 0) & (ratio > dual_clip)
                gain = tl.where(floored, dual_clip * advantage, gain)
                clipped = clipped | floored
            slope = tl.where(clipped | (tl.abs(step) > limit), 0.0, ratio * advantage)
        elif KIND == "cispo":
            clipped = within != ratio
            gain, slope = within * advantage * logp, within * advantage
        else:  # reinforce
            clipped = ratio < 0
            gain, slope = advantage * logp, advantage
        return gain, slope, ratio, clipped.to(tl.float32)

    @triton.jit
    def _k3(delta, limit):
        """The KL term of `policy_loss`, and its slope. delta: ref_logps - logps."""
        bound = tl.minimum(tl.maximum(delta, -limit), limit)
        slope = tl.where(tl.abs(delta) > limit, 0.0, 1 - tl.exp(bound))
        return tl.exp(bound) - bound - 1, slope

    @triton.jit
    def _log1p(x):
        """log(1 + x) for x >= 0, exact for a small x, of which 1 + x keeps few digits (Kahan)."""
        y = 1.0 + x
        return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


# --------------------------------------------------------------------------------------------------
# python kernels.py


def _random_batch(tokens, width, vocabulary, dtype):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, dtype=dtype) / width**0.5)
    targets = torch.randint(vocabulary, (tokens,))
    return hidden, weight, targets, torch.randn(tokens), torch.full((tokens,), 1 / tokens)


def _demo(tokens=2048, width=256, vocabulary=32000):
    """The plain and the fused loss on random data: the difference, then the time of each."""
    torch.manual_seed(0)
    batch = _random_batch(64, 16, 1000, torch.float64)
    old_logps = linear_logps(*batch[:3])[0] + 0.3 * torch.randn(64)
    plain = plain_linear_loss(*batch, old_logps=old_logps)
    fused, stats = linear_policy_loss(*batch, old_logps=old_logps, chunk=10)
    plain_gradients, fused_gradients = (torch.autograd.grad(x, batch[:2]) for x in (plain, fused))
    error = max((a - b).abs().max().item() for a, b in zip(plain_gradients, fused_gradients))
    print(f"64 tokens in float64, {stats.clipped.nanmean():.0%} of them clipped: the loss differs "
          f"by {abs(plain - fused).item():.0e}, the gradients by at most {error:.0e}")

    batch = _random_batch(tokens, width, vocabulary, torch.float32)
    chunk = _rows_per_chunk(tokens, vocabulary, cuda=False)
    print(f"{tokens} tokens, width {width}, vocabulary {vocabulary}, forward and backward:")
    for name, rows, loss_of in (("plain", tokens, plain_linear_loss),
                                ("fused", chunk, lambda *batch: linear_policy_loss(*batch)[0])):
        began = time.perf_counter()
        torch.autograd.grad(loss_of(*batch), batch[:2])
        print(f"  {name}: {time.perf_counter() - began:.2f} s, logits of {rows} tokens at a time: "
              f"{4e-6 * rows * vocabulary:.0f} MB for each copy of them")


if __name__ == "__main__":
    _demo()
