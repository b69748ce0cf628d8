"""Hidden states -> policy-gradient loss, without ever holding the logits of the whole batch.

A language model ends in one matrix product: hidden states [N, D] against the vocabulary [V, D] give logits [N, V]. With V of
150,000, those logits, their softmax and their gradient outweigh the rest of training memory, yet the loss wants one number per
row: the log-prob of the sampled token. Two ideas make that cheap:

    gradient on the way   Given advantages and old log-probs, dL/dlogp of a token is known as soon as its logp is. So a chunk's
                          exponentials become its share of both gradients at once, and are thrown away: three matrix products,
                          none repeated in a backward pass.
    the target as offset  A softmax is usually taken relative to the largest logit, which is known only after a look at all of
                          them. Relative to the target's logit, one row dot known beforehand, e_j = exp(z_j - z_target) is right
                          the first time it is written: logp = -log(1 + sum of the others), one pass over each slab of logits.

Read first `policy_loss`, the loss of the papers as a function of log-probs; change it there (and in `_policy_rows`, the same on a
GPU). `linear_policy_loss` is what the trainer calls. The products are torch's; the element-wise work between them is three Triton
kernels where Triton runs, and a few lines of torch, with the same names, elsewhere.

Left out: logit soft-capping and a bias in the head, tensor parallelism, double backward.

Inputs come from the batch of grpo.py: rows are the trained tokens, `hidden` the last hidden states there. The loss goes back to
grpo.py to be differentiated, `Stats` to its metrics. Lift the file as it is: it needs torch only.

    python kernels.py     # checks against float64 autograd, then times and weighs the loss on this machine  [--shape N,D,V --json FILE]
"""

import os
from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, or torch built for CPUs only: the torch versions do the work
    triton = None

KINDS = ("clip", "cispo", "reinforce")
# exp(88) overflows float32, and 0 * inf in a backward pass is NaN: beyond e^60 a ratio saturates (value e^60, gradient 0).
LOG_LIMIT = 60.0
BLOCK = 2048  # columns that a Triton program reads at a time


# ---- The idea: the loss, as a function of log-probs ----------------------------------------------------------------------------

def policy_loss(logps, entropy, advantages, *, old_logps=None, behavior_logps=None, ref_logps=None, eps_low=0.2, eps_high=0.28,
                dual_clip=None, tis_cap=None, kl_coef=0.0, entropy_coef=0.0, kind="clip", sequence_ids=None):
    """Per-token loss [N] to minimise, with the ratio [N] and which rows were clipped [N]; everything is per token, [N].

    ratio = exp(logps - old_logps), one per token, or one per sequence when `sequence_ids` says which sequence a token is of.
      clip       -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)      PPO, 1707.06347; clip-higher: DAPO, 2503.14476
                 dual_clip c: for A < 0 no more than -c A                     Ye et al., 1912.09729
      cispo      -sg[clip(ratio, 1 - eps_low, 1 + eps_high)] A logps          MiniMax-M1, 2506.13585 (sg: no gradient through it)
      reinforce  -A logps                                                     the ratio plays no part
    + kl_coef (exp(ref - logps) - (ref - logps) - 1)                          the k3 estimator, joschu.net/blog/kl-approx.html
    - entropy_coef entropy
    `old_logps=None` stands for the current ones, detached: ratio exactly 1, the first update of a batch. `tis_cap` multiplies the
    policy term by min(exp(old - behavior), tis_cap), detached: it corrects for tokens sampled by another engine or in another
    precision (behavior) than the one that trains (old). `clipped` marks rows whose policy term has no gradient because of
    clipping (clip) or whose ratio was cut (cispo). A ratio beyond e^60 saturates.

    >>> logps, advantages = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0])
    >>> loss, ratio, clipped = policy_loss(logps, None, advantages, old_logps=torch.tensor([-1.0, -2.0, -2.0]))
    >>> [[round(x, 2) for x in row.tolist()] for row in (loss, ratio, clipped)]   # the second has been pushed up far enough
    [[-1.0, -1.28, 2.72], [1.0, 2.72, 2.72], [0.0, 1.0, 0.0]]
    """
    old_logps = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old_logps if sequence_ids is None else _sequence_mean(logps - old_logps, sequence_ids)
    ratio = log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    within = ratio.clamp(1 - eps_low, 1 + eps_high)

    if kind == "clip":
        objective = torch.minimum(ratio * advantages, within * advantages)
        clipped = ((advantages > 0) & (ratio > 1 + eps_high)) | ((advantages < 0) & (ratio < 1 - eps_low))
        if dual_clip is not None:
            floored = (advantages < 0) & (ratio > dual_clip)
            objective, clipped = torch.where(floored, dual_clip * advantages, objective), clipped | floored
    elif kind == "cispo":
        objective, clipped = within.detach() * advantages * logps, within != ratio
    else:
        objective, clipped = advantages * logps, torch.zeros_like(ratio)

    if tis_cap is not None:
        objective = objective * (old_logps - behavior_logps).exp().clamp(max=tis_cap).detach()
    loss = -objective
    if kl_coef:
        delta = (ref_logps - logps).clamp(-LOG_LIMIT, LOG_LIMIT)
        loss = loss + kl_coef * (delta.exp() - delta - 1)
    if entropy_coef:
        loss = loss - entropy_coef * entropy
    return loss, ratio.detach(), clipped.to(ratio.dtype)


def _sequence_mean(values, sequence_ids):
    """GSPO (2507.18071): exp of this mean is the length-normalised ratio of a sequence, shared by its tokens. [N] -> [N]."""
    _, index = sequence_ids.unique(return_inverse=True)  # [N], 0..S-1
    sums = values.new_zeros(int(index.max()) + 1 if len(index) else 0).index_add(0, index, values)  # [S]
    return (sums / index.bincount())[index]


# ---- The two functions the trainer calls ---------------------------------------------------------------------------------------

@dataclass
class Stats:
    """What the loss saw, per row, [N] each, no gradient. NaN: the row was dropped, nothing was computed for it (use nanmean)."""

    logps: torch.Tensor  # log-prob of the target, at `temperature`
    entropy: torch.Tensor  # of the whole distribution, in nats
    ratio: torch.Tensor  # exp(logps - old_logps); with sequence_ids, the one of the sequence
    clipped: torch.Tensor  # 1.0 where clipping took the gradient away (clip) or cut the ratio (cispo), else 0.0


@torch.no_grad()
def linear_logps(hidden, weight, targets, *, temperature=1.0, chunk=None, slab=None):
    """Log-probs of `targets` [N] under softmax(hidden [N, D] @ weight [V, D].T / temperature), and the entropies: ([N], [N]).

    No gradient, one product: for old and reference log-probs and for evaluation. `chunk` rows times `slab` logits are held at a
    time. A log-prob under about -60 saturates there. Raises ValueError for mismatching shapes.

    >>> linear_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3]))   # four equally likely tokens: log 4 = 1.3863
    (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    _check(hidden, weight, temperature, chunk, slab, {"targets": targets})
    logps, entropy = _nan(hidden, weight), _nan(hidden, weight)
    _walk(hidden, weight, targets, torch.arange(len(hidden), device=hidden.device), temperature, chunk, slab, logps, entropy)
    return logps, entropy


def linear_policy_loss(hidden, weight, targets, advantages, weights, *, old_logps=None, behavior_logps=None, ref_logps=None,
                       eps_low=0.2, eps_high=0.28, dual_clip=None, tis_cap=None, kl_coef=0.0, entropy_coef=0.0, kind="clip",
                       sequence_ids=None, temperature=1.0, chunk=None, slab=None, all_stats=False):
    """sum_i weights_i * policy_loss_i of the tokens `targets` [N] under softmax(hidden [N, D] @ weight [V, D].T / temperature).

    Returns (loss, Stats); the loss is a scalar that can be differentiated once, w.r.t. hidden and weight. `weights` [N] carries
    mask and normaliser in one: 0 for tokens the policy did not sample, elsewhere 1/(tokens of the global batch) or whatever the
    algorithm asks for. The options are those of `policy_loss`. Logits are divided by `temperature`, which must be the one sampled
    at, or the first ratio is not 1. With `sequence_ids` all rows of a sequence must be in the same call; its ratio is the mean
    over its rows of weight other than 0.

    Rows that cannot matter are dropped before any product, so they may hold anything (a target of -100, NaN) and get exactly zero
    gradient: weight 0; also advantage 0, when KL and entropy bonus are off (with `sequence_ids`: of the whole sequence). Their
    statistics are NaN; `all_stats` computes those of advantage 0 all the same, for one product more. `chunk` rows of
    exponentials, and `slab` columns of their logits, are held at a time. Products accumulate in float32 at least (float64 for
    float64 inputs), whatever the inputs or autocast say: log-probs from 16-bit logits are off by several percent. A target less
    likely than e^-60 saturates: log-prob and gradient stay finite. Raises ValueError for input that makes no sense.

    >>> hidden = torch.eye(2, requires_grad=True)
    >>> targets, advantages, weights = torch.tensor([0, -100]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
    >>> loss, stats = linear_policy_loss(hidden, torch.eye(2), targets, advantages, weights)
    >>> loss.backward(); loss.item(), stats.logps, hidden.grad   # push token 0 up; the masked row is never looked at
    (-1.0, tensor([-0.3133,     nan]), tensor([[-0.2689,  0.2689],
            [ 0.0000,  0.0000]]))
    """
    options = {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": dual_clip, "tis_cap": tis_cap, "kl_coef": kl_coef,
               "entropy_coef": entropy_coef, "kind": kind}
    per_row = {"advantages": advantages, "weights": weights, "old_logps": old_logps, "behavior_logps": behavior_logps,
               "ref_logps": ref_logps, "sequence_ids": sequence_ids}
    per_row = {name: value.detach() for name, value in per_row.items() if value is not None}
    _check(hidden, weight, temperature, chunk, slab, {"targets": targets, **per_row}, **options)

    stats = Stats(*(_nan(hidden, weight) for _ in range(4)))
    keep, silent = _rows_with_signal(advantages, weights, sequence_ids, everywhere=bool(kl_coef or entropy_coef))  # [K]
    loss, g = stats.logps.new_zeros(()), _nan(hidden, weight)

    def ask(rows, logps, entropy):  # an O(rows) question: how much does the loss want these log-probs to move?
        inputs = {k: v[rows] if k == "sequence_ids" else v[rows].to(logps.dtype) for k, v in per_row.items()}
        losses, stats.ratio[rows], stats.clipped[rows], g[rows] = _policy_rows(logps, entropy, options, **inputs)
        loss.add_(losses.sum())
        return known(rows)

    def known(rows, *_):  # dL/dlogps and dL/dentropy
        return g[rows], -entropy_coef * weights[rows].to(g.dtype) if entropy_coef else None

    need_dx, need_dw = (x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight))
    dx, dw = (torch.zeros(x.shape, dtype=g.dtype, device=x.device) if need else None for x, need in ((hidden, need_dx), (weight, need_dw)))
    with torch.no_grad():
        walk = lambda rows, *more: _walk(hidden, weight, targets, rows, temperature, chunk, slab, stats.logps, stats.entropy, *more)
        if sequence_ids is None:
            walk(keep, ask, dx, dw)
        else:  # the ratio of a sequence is known after its last token only: one walk for the log-probs, one for the gradients
            walk(keep)
            ask(keep, stats.logps[keep], stats.entropy[keep])
            if need_dx or need_dw:
                walk(keep, known, dx, dw)
        if all_stats:
            walk(silent)
    return _GradientsInHand.apply(hidden, weight, loss, [dx, dw]) if need_dx or need_dw else loss, stats


# ---- The walk over chunks ------------------------------------------------------------------------------------------------------

@torch.compiler.disable
def _walk(hidden, weight, targets, rows, temperature, chunk, slab, logps, entropy, signal=None, dx=None, dw=None):
    """Visit the rows [K], a chunk at a time: fills logps and entropy [N] there and adds to dx [N, D] and dw [V, D] (None: unwanted).

    signal(rows, logps, entropy) -> (g, h) gives dL/dlogp and dL/dentropy of a chunk (h None: no entropy term). With z the logits
    over the temperature, t the target, and sums over j other than t,
        e_j = exp(z_j - z_t)    s = sum e_j    logp = -log(1 + s)    entropy = log(1 + s) - sum e_j log(e_j) / (1 + s)
        dL/dz_j = -e_j / (1 + s) (g + h (logp + entropy + log e_j))      dL/dz_t = (g s - h (logp + entropy)) / (1 + s)
    so E = e, with -s at the target, and v = -g / (1 + s), one number per row, are the gradient if h is 0: dL/dz = v E. No large
    number is ever taken from another: 1 - p_t, for one, is s / (1 + s).
    """
    if not len(rows):
        return
    wide, size = logps.dtype, len(weight)
    # e^60 does not fit float16, so the gradients of such a head go by bfloat16.
    head = weight.detach() if _adds_up_wide(weight) and weight.dtype == hidden.dtype else weight.detach().to(wide)  # [V, D]
    low = torch.bfloat16 if head.dtype == torch.float16 else head.dtype
    back = head.to(low) if dx is not None else None
    chunk, slab = _sizes(weight, len(rows), chunk, slab)
    buffer = torch.empty(chunk * slab, dtype=wide, device=head.device)
    kept = torch.empty(chunk, size + -size % 64, dtype=low, device=head.device) if dx is not None or dw is not None else None

    def visit(rows):
        x, target, count = hidden[rows].to(head.dtype), targets[rows], len(rows)  # [C, D], [C]
        offset = (x.to(wide) * head[target]).sum(-1) / temperature  # [C] the target's logit
        s, h = torch.zeros(2, count, dtype=wide, device=x.device)  # [C], [C]
        E = None if kept is None else kept[:count, :size]  # [C, V]
        for start in range(0, size, slab):
            columns = head[start : start + slab]  # [S, D]
            logits = _product(x, columns.T, buffer[: count * len(columns)].view(count, -1))  # [C, S]
            _exp_slab(logits, None if E is None else E[:, start : start + slab], offset, target - start, 1 / temperature, s, h)
        logps[rows] = logp = -torch.log1p(s)
        entropy[rows] = uncertain = -logp - h / (1 + s)
        g, h = signal(rows, logp, uncertain) if signal else (None, None)  # [C], [C] or None
        if E is None:
            return
        p = 1 / (1 + s)  # [C] of the target
        v, at_target = -g * p, -s
        if h is not None:  # two numbers per row: p comes in before anything else, for g times e^60 is too large
            bias = h * (logp + uncertain)
            _reweigh(E, p * (g + bias), p * h)
            v, at_target = torch.full_like(p, -1.0), p * bias - g * (p * s)
        E.scatter_(1, target[:, None], at_target[:, None].to(low))
        v = (v / temperature)[:, None]
        if dx is not None:
            dx[rows] = v * _product(E, back, torch.empty(count, x.shape[1], dtype=wide, device=x.device))
        if dw is not None:
            _product(E.T, (v * x).to(low), dw, add=True)

    # autocast would round the logits to 16 bits behind our back
    with torch.autocast(hidden.device.type, enabled=False):
        for part in rows.split(chunk):
            visit(part)


def _adds_up_wide(x):
    """Are there products that read 16 bits and write 32? torch has them on GPUs only; elsewhere 16 bits are widened first."""
    return x.is_cuda


def _product(a, b, out, add=False):
    """out = a @ b, or out + a @ b, added up and stored in the precision of `out`, whatever a's and b's is."""
    mixed = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    return torch.addmm(out, a, b, **mixed, out=out) if add else torch.mm(a, b, **mixed, out=out)


def _sizes(weight, rows, chunk, slab):
    """Rows per chunk, all chunks alike, and columns per slab.

    CPU (measured on 2 cores): few enough exponentials for the caches, enough rows for dw not to be rewritten often.
    GPU (an estimate; nothing was measured there yet): products that fill an H200, exponentials of 1.3 GB at V = 151,936.
    """
    size, cuda = len(weight), weight.is_cuda
    most = chunk or (4224 * max(1, 2**15 // size) if cuda else max(2**20 // size, min(256, max(128, 2**24 // size))))
    chunk = -(-rows // -(-rows // most))
    return chunk, min(size, slab or (8192 if cuda else max(1024, 2**20 // chunk)))


def _nan(hidden, weight):
    """[N] of NaN in the precision in which everything is added up: float32, or float64 for inputs of that."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return torch.full((len(hidden),), float("nan"), dtype=dtype, device=hidden.device)


def _rows_with_signal(advantages, weights, sequence_ids, everywhere):
    """Indices of the rows that can move the loss [K], and of those that only their advantage of 0 keeps from it.

    `everywhere`: KL or entropy give signal where the advantage is 0.
    """
    live = keep = weights != 0
    if not everywhere:
        live = keep & (advantages != 0)
        # a token of advantage 0 still belongs to its sequence's mean ratio
        live = live if sequence_ids is None else keep & torch.isin(sequence_ids, sequence_ids[live])
    return live.nonzero().squeeze(1), (keep & ~live).nonzero().squeeze(1)


class _GradientsInHand(torch.autograd.Function):
    """Gives autograd a loss whose gradients are known already; the backward pass only scales them, in place, once."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, gradients):
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were given away: compute it again to differentiate it a second time")
        # scale first, round after: a float16 gradient may only be representable once the loss scale is in it
        dx, dw = (None if d is None else d.mul_(grad_output).to(t) for d, t in zip(ctx.gradients, ctx.dtypes, strict=True))
        ctx.gradients = None
        return dx, dw, None, None


def _check(hidden, weight, temperature, chunk, slab, per_row, kind="clip", kl_coef=0.0, tis_cap=None, dual_clip=None, **_):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    for name, value in per_row.items():
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be [N] = [{len(hidden)}], one value per row of hidden, got {list(value.shape)}")
    demands = {
        f"temperature must be positive, got {temperature}": temperature > 0,
        f"chunk must be at least 1, got {chunk}": chunk is None or chunk >= 1,
        f"slab must be at least 1, got {slab}": slab is None or slab >= 1,
        f"kind must be one of {', '.join(KINDS)}, got {kind!r}": kind in KINDS,
        "kl_coef needs ref_logps, the log-probs of the reference model": not kl_coef or "ref_logps" in per_row,
        "tis_cap must be positive and needs behavior_logps": tis_cap is None or (tis_cap > 0 and "behavior_logps" in per_row),
        f"dual_clip must be greater than 1, got {dual_clip}": dual_clip is None or dual_clip > 1,
    }
    for message, met in demands.items():
        if not met:
            raise ValueError(message)


# ---- Element-wise work: in torch, and as Triton kernels ------------------------------------------------------------------------

def _exp_slab(logits, E, offset, target, scale, s, h):
    """A slab of logits [C, S] (overwritten): E [C, S] = e = exp(scale logits - offset), 0 at the target; s += sum e, h += sum e log e.

    target [C] counts from the slab's first column and may lie outside of it. E None: only the sums [C] are wanted.
    """
    if _on_triton(logits):
        out = logits if E is None else E
        _exp_slab_kernel[(len(logits),)](logits, out, offset, target, s, h, logits.stride(0), out.stride(0), scale, LOG_LIMIT,
                                         logits.shape[1], E is not None, BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])))
        return
    q = torch.add(-offset[:, None], logits, alpha=scale, out=logits).clamp_(max=LOG_LIMIT)
    e = torch.exp(q, out=E)
    hit = ((target >= 0) & (target < e.shape[1])).nonzero().squeeze(1)
    e[hit, target[hit]] = q[hit, target[hit]] = 0.0
    s += e.sum(1)
    h += torch.linalg.vecdot(e, q)


def _reweigh(E, alpha, beta):
    """E [C, V] = e (alpha + beta log e), with alpha and beta [C]: what the entropy bonus makes of the exponentials."""
    if _on_triton(alpha):
        _reweigh_kernel[(len(E),)](E, alpha, beta, E.stride(0), E.shape[1], BLOCK=min(BLOCK, triton.next_power_of_2(E.shape[1])))
        return
    for e, a, b in zip(E, alpha, beta):  # row by row: no second [C, V]
        e.mul_(e.clamp_min(torch.finfo(e.dtype).tiny).log_().mul_(b).add_(a))


def _policy_rows(logps, entropy, options, *, weights, advantages, **inputs):
    """weights * policy_loss of some rows, their ratio and clipped, and its gradient w.r.t. their logps, all [C]."""
    if _on_triton(logps) and "sequence_ids" not in inputs:
        return _policy_rows_triton(logps, entropy, options, weights, advantages, **inputs)
    with torch.enable_grad():
        logps = logps.detach().requires_grad_()
        losses, ratio, clipped = policy_loss(logps, entropy, advantages, **inputs, **options)
        losses = weights * losses
        g, = torch.autograd.grad(losses.sum(), logps)
    return losses.detach(), ratio, clipped, g


def _on_triton(x):
    return triton is not None and x.dtype == torch.float32 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _policy_rows_triton(logps, entropy, options, weights, advantages, old_logps=None, behavior_logps=None, ref_logps=None):
    o, none = options, logps  # a pointer that is not read
    losses, ratio, clipped, g = torch.empty(4, len(logps), dtype=logps.dtype, device=logps.device)
    _policy_kernel[(triton.cdiv(len(logps), 128),)](
        logps, entropy, weights, advantages, *(none if x is None else x for x in (old_logps, behavior_logps, ref_logps)),
        losses, ratio, clipped, g, len(logps), 1 - o["eps_low"], 1 + o["eps_high"], o["dual_clip"] or 0.0, o["tis_cap"] or 0.0,
        o["kl_coef"], o["entropy_coef"], LOG_LIMIT, KIND=KINDS.index(o["kind"]), OLD=old_logps is not None,
        DUAL=o["dual_clip"] is not None, TIS=o["tis_cap"] is not None, KL=bool(o["kl_coef"]), BLOCK=128)
    return losses, ratio, clipped, g


if triton:
    @triton.jit
    def _exp_slab_kernel(LOGITS, E, OFFSET, TARGET, S, H, logits_stride, e_stride, scale, limit, SIZE: tl.constexpr,
                         STORE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # row * stride is beyond 2^31 for long chunks
        offset, target = tl.load(OFFSET + row), tl.load(TARGET + row)
        s, h = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < SIZE
            q = tl.load(LOGITS + row * logits_stride + column, mask=inside, other=0.0) * scale - offset
            q = tl.minimum(q, limit)
            e = tl.where(inside & (column != target), tl.exp(q), 0.0)
            s += e
            h += tl.where(e > 0, e * q, 0.0)
            if STORE:
                tl.store(E + row * e_stride + column, e.to(E.dtype.element_ty), mask=inside)
        tl.store(S + row, tl.load(S + row) + tl.sum(s, 0))
        tl.store(H + row, tl.load(H + row) + tl.sum(h, 0))

    @triton.jit
    def _reweigh_kernel(E, ALPHA, BETA, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        alpha, beta = tl.load(ALPHA + row), tl.load(BETA + row)
        for start in range(0, SIZE, BLOCK):
            column = start + tl.arange(0, BLOCK)
            e = tl.load(E + row * stride + column, mask=column < SIZE, other=0.0).to(tl.float32)
            new = e * (alpha + beta * tl.log(tl.where(e > 0, e, 1.0)))
            tl.store(E + row * stride + column, new.to(E.dtype.element_ty), mask=column < SIZE)

    @triton.jit
    def _policy_kernel(LOGPS, ENTROPY, WEIGHTS, ADVANTAGES, OLD_LOGPS, BEHAVIOR_LOGPS, REF_LOGPS, LOSSES, RATIO, CLIPPED, G, size,
                       low, high, dual_clip, tis_cap, kl_coef, entropy_coef, limit, KIND: tl.constexpr, OLD: tl.constexpr,
                       DUAL: tl.constexpr, TIS: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr):
        """`policy_loss` and its slope g, by hand: see there for what it says."""
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < size
        logp = tl.load(LOGPS + row, mask=inside, other=0.0)
        a = tl.load(ADVANTAGES + row, mask=inside, other=0.0)
        old = tl.load(OLD_LOGPS + row, mask=inside, other=0.0) if OLD else logp
        step = logp - old
        ratio = tl.exp(tl.minimum(tl.maximum(step, -limit), limit))
        within = tl.minimum(tl.maximum(ratio, low), high)
        clipped = inside & False
        if KIND == 0:  # clip
            clipped = ((a > 0) & (ratio > high)) | ((a < 0) & (ratio < low))
            gain = tl.minimum(ratio * a, within * a)
            if DUAL:
                floored = (a < 0) & (ratio > dual_clip)
                gain, clipped = tl.where(floored, dual_clip * a, gain), clipped | floored
            slope = tl.where(clipped | (tl.abs(step) > limit), 0.0, ratio * a)
        elif KIND == 1:  # cispo
            clipped = within != ratio
            gain, slope = within * a * logp, within * a
        else:  # reinforce
            gain, slope = a * logp, a
        if TIS:
            trust = tl.minimum(tl.exp(old - tl.load(BEHAVIOR_LOGPS + row, mask=inside, other=0.0)), tis_cap)
            gain, slope = gain * trust, slope * trust
        loss, g = -gain, -slope
        if KL:
            delta = tl.load(REF_LOGPS + row, mask=inside, other=0.0) - logp
            bound = tl.minimum(tl.maximum(delta, -limit), limit)
            loss += kl_coef * (tl.exp(bound) - bound - 1)
            g += tl.where(tl.abs(delta) > limit, 0.0, kl_coef * (1 - tl.exp(bound)))
        loss -= entropy_coef * tl.load(ENTROPY + row, mask=inside, other=0.0)
        w = tl.load(WEIGHTS + row, mask=inside, other=0.0)
        tl.store(LOSSES + row, w * loss, mask=inside)
        tl.store(RATIO + row, ratio, mask=inside)
        tl.store(CLIPPED + row, clipped.to(tl.float32), mask=inside)
        tl.store(G + row, w * g, mask=inside)


# ---- python kernels.py ---------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    try:
        from tests import bench_kernels
    except ImportError:
        raise SystemExit("The check and the table are made by tests/bench_kernels.py, which is not beside this copy.") from None
    bench_kernels.main(with_peers=False)
