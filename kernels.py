"""Hidden states -> policy-gradient loss, without ever holding the logits of the whole batch.

A language model ends in one matrix product: hidden states [N, D] against the vocabulary [V, D] give logits [N, V]. With V of
150,000, those logits, their softmax and their gradient outweigh the rest of training memory, yet the loss wants one number per
row: the log-prob of the sampled token. So this file walks over the rows in chunks and takes the gradient on the way: given
advantages and old log-probs, dL/dlogp of a token is known as soon as its logp is, so a chunk's logits can be turned into their
share of the two gradients and thrown away. Three products per chunk, none repeated in the backward pass.

Two layers. `policy_loss` is the loss of the papers, a function of log-probs, differentiated by ordinary autograd: read it first,
change it there. `linear_policy_loss` is the fused version the trainer calls; it asks autograd about `policy_loss` only.

Left out: logit soft-capping and a bias in the head, tensor parallelism, double backward, GPU kernels (this is the torch path; it
runs on a GPU too, but makes several passes over each chunk of logits where one would do).

Inputs come from the batch of grpo.py: rows are the trained tokens, `hidden` the last hidden states there. The loss goes back to
grpo.py to be differentiated, `Stats` to its metrics. Lift the file as it is: it needs torch only.

    python kernels.py     # checks against float64 autograd, then times and weighs the loss against the plain one, in seconds
"""

import time
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("clip", "cispo", "reinforce")
# exp(88) overflows float32, and 0 * inf in a backward pass is NaN: beyond e^60 a ratio saturates (value e^60, gradient 0).
LOG_LIMIT = 60.0


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
def linear_logps(hidden, weight, targets, *, temperature=1.0, chunk=None):
    """Log-probs of `targets` [N] under softmax(hidden [N, D] @ weight [V, D].T / temperature), and the entropies: ([N], [N]).

    No gradient: for old and reference log-probs and for evaluation. Raises ValueError for mismatching shapes.

    >>> linear_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3]))   # four equally likely tokens: log 4 = 1.3863
    (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    _check(hidden, weight, temperature, chunk, {"targets": targets})
    rows = torch.arange(len(hidden), device=hidden.device)
    logps, entropy, _, _ = _walk(hidden, weight, targets, rows, temperature, chunk)
    return logps, entropy


def linear_policy_loss(hidden, weight, targets, advantages, weights, *, old_logps=None, behavior_logps=None, ref_logps=None,
                       eps_low=0.2, eps_high=0.28, dual_clip=None, tis_cap=None, kl_coef=0.0, entropy_coef=0.0, kind="clip",
                       sequence_ids=None, temperature=1.0, chunk=None):
    """sum_i weights_i * policy_loss_i of the tokens `targets` [N] under softmax(hidden [N, D] @ weight [V, D].T / temperature).

    Returns (loss, Stats); the loss is a scalar that can be differentiated once, w.r.t. hidden and weight. `weights` [N] carries
    mask and normaliser in one: 0 for tokens the policy did not sample, elsewhere 1/(tokens of the global batch) or whatever the
    algorithm asks for. The options are those of `policy_loss`. Logits are divided by `temperature`, which must be the one sampled
    at, or the first ratio is not 1. With `sequence_ids` all rows of a sequence must be in the same call; its ratio is the mean
    over its rows of weight other than 0.

    Rows that cannot matter are dropped before any product, so they may hold anything (a target of -100, NaN) and get exactly zero
    gradient: weight 0; also advantage 0, when KL and entropy bonus are off (with `sequence_ids`: of the whole sequence). `chunk`
    rows of logits are held at a time. Products accumulate in float32 at least (float64 for float64 inputs), whatever the inputs
    or autocast say: log-probs from 16-bit logits are off by several percent. Raises ValueError for input that makes no sense.

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
    _check(hidden, weight, temperature, chunk, {"targets": targets, **per_row}, **options)

    keep = _rows_with_signal(advantages, weights, sequence_ids, everywhere=bool(kl_coef or entropy_coef))  # [K]
    dtype = _accumulation_dtype(hidden, weight)
    ratio, clipped, g = (torch.full((len(hidden),), float("nan"), dtype=dtype, device=hidden.device) for _ in range(3))  # [N]
    h = g.clone() if entropy_coef else None
    loss = g.new_zeros(())

    def signal(rows, logps, entropy):  # an O(rows) question to autograd: how much does the loss want these log-probs to move?
        inputs = {k: v[rows] if k == "sequence_ids" else v[rows].to(dtype) for k, v in per_row.items()}
        part, ratio[rows], clipped[rows], g[rows], dentropy = _differentiate(logps, entropy, options, **inputs)
        loss.add_(part)
        if h is not None:
            h[rows] = dentropy
        return signal_known(rows)

    def signal_known(rows, *_):
        return g[rows], None if h is None else h[rows]

    need_dx, need_dw = (x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight))
    with torch.no_grad():
        walk = (hidden, weight, targets, keep, temperature, chunk)
        if sequence_ids is None:
            logps, entropy, dx, dw = _walk(*walk, signal, need_dx, need_dw)
        else:  # the ratio of a sequence is known after its last token only: one walk for the log-probs, one for the gradients
            logps, entropy, dx, dw = _walk(*walk)
            signal(keep, logps[keep], entropy[keep])
            if need_dx or need_dw:
                _, _, dx, dw = _walk(*walk, signal_known, need_dx, need_dw)
    if need_dx or need_dw:
        loss = _GradientsInHand.apply(hidden, weight, loss, dx, dw)
    return loss, Stats(logps, entropy, ratio, clipped)


# ---- Plumbing: which rows, what gradient per row, the walk over chunks, and the hand-over to autograd --------------------------

def _rows_with_signal(advantages, weights, sequence_ids, everywhere):
    """Indices [K] of the rows that can move the loss; `everywhere`: KL or entropy give signal where the advantage is 0."""
    keep = weights != 0
    if not everywhere:
        live = keep & (advantages != 0)
        # a token of advantage 0 still belongs to its sequence's mean ratio
        keep = live if sequence_ids is None else keep & torch.isin(sequence_ids, sequence_ids[live])
    return keep.nonzero().squeeze(1)


def _differentiate(logps, entropy, options, *, weights, advantages, **inputs):
    """The loss of some rows, their ratio and clipped, and its gradient w.r.t. their logps and entropy (None if unused)."""
    with torch.enable_grad():
        logps, entropy = logps.detach().requires_grad_(), entropy.detach().requires_grad_()
        per_token, ratio, clipped = policy_loss(logps, entropy, advantages, **inputs, **options)
        loss = (weights * per_token).sum()
    return loss.detach(), ratio, clipped, *torch.autograd.grad(loss, (logps, entropy), allow_unused=True)


def _walk(hidden, weight, targets, keep, temperature, chunk, signal=None, need_dx=False, need_dw=False):
    """The rows `keep` [K], a chunk at a time: (logps [N], entropy [N], dX [N, D] or None, dW [V, D] or None), NaN where not kept.

    signal(rows, logps, entropy) -> (g, h) gives dL/dlogps and dL/dentropy of a chunk (h None: no entropy term). Then, with
        z = logits / temperature, p = softmax(z):    dL/dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy)
    """
    dtype = _accumulation_dtype(hidden, weight)
    head = weight.detach().to(dtype)  # [V, D]
    logps, entropy = (torch.full((len(hidden),), float("nan"), dtype=dtype, device=hidden.device) for _ in range(2))  # [N]
    dx = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_dx else None  # [N, D]
    dw = torch.zeros_like(head) if need_dw else None  # [V, D]

    def visit(rows):  # a function, so that its logits are gone before those of the next chunk are made
        x, target = hidden[rows].to(dtype) / temperature, targets[rows].unsqueeze(1)  # [C, D], [C, 1]
        logits = x @ head.T  # [C, V]
        log_p = F.log_softmax(logits, dim=-1)  # [C, V]
        p = torch.exp(log_p, out=logits)  # [C, V], in the memory of the logits
        logps[rows] = log_p.gather(1, target).squeeze(1)
        entropy[rows] = -torch.einsum("cv,cv->c", p, log_p)
        if signal is None:
            return
        g, h = signal(rows, logps[rows], entropy[rows])  # [C], [C] or None
        if dx is None and dw is None:
            return
        g, pull = g.unsqueeze(1), -g.unsqueeze(1)  # [C, 1]
        if h is not None:
            pull = log_p.add_(entropy[rows].unsqueeze(1)).mul_(-h.unsqueeze(1)).sub_(g)  # [C, V]
        dlogits = p.mul_(pull).scatter_add_(1, target, g)  # [C, V]
        if dx is not None:
            dx[rows] = dlogits @ head / temperature
        if dw is not None:
            dw.addmm_(dlogits.T, x)

    # autocast would round the logits to 16 bits behind our back
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in keep.split(chunk or _default_chunk(weight)):
            visit(rows)
    return logps, entropy, dx, dw


class _GradientsInHand(torch.autograd.Function):
    """Gives autograd a loss whose gradients are known already; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, dx, dw):
        ctx.save_for_backward(dx, dw)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        # scale first, round after: a float16 gradient may only be representable once the loss scale is in it
        dx, dw = (None if d is None else (d * grad_output).to(t) for d, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return dx, dw, None, None, None


def _accumulation_dtype(hidden, weight):
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _default_chunk(weight):
    """Rows per chunk: logits of 4 MB on a CPU (near its caches), of 1 GB on a GPU (large products), and never tiny products."""
    return max(128, (2**28 if weight.is_cuda else 2**20) // max(1, len(weight)))


def _check(hidden, weight, temperature, chunk, per_row, kind="clip", kl_coef=0.0, tis_cap=None, dual_clip=None, **_):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    for name, value in per_row.items():
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be [N] = [{len(hidden)}], one value per row of hidden, got {list(value.shape)}")
    demands = {
        f"temperature must be positive, got {temperature}": temperature > 0,
        f"chunk must be at least 1, got {chunk}": chunk is None or chunk >= 1,
        f"kind must be one of {', '.join(KINDS)}, got {kind!r}": kind in KINDS,
        "kl_coef needs ref_logps, the log-probs of the reference model": not kl_coef or "ref_logps" in per_row,
        "tis_cap must be positive and needs behavior_logps": tis_cap is None or (tis_cap > 0 and "behavior_logps" in per_row),
        f"dual_clip must be greater than 1, got {dual_clip}": dual_clip is None or dual_clip > 1,
    }
    for message, met in demands.items():
        if not met:
            raise ValueError(message)


# ---- python kernels.py ---------------------------------------------------------------------------------------------------------

def _plain_loss(hidden, weight, targets, advantages, weights, *, temperature=1.0, **options):
    """The same loss the usual way: all logits at once, autograd through everything. The ruler, not the tool."""
    log_p = F.log_softmax(F.linear(hidden, weight) / temperature, dim=-1)  # [N, V]
    logps = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)  # [N]
    entropy = -(log_p.exp() * log_p).sum(-1) if options.get("entropy_coef") else None  # [N]; free for the fused loss, not here
    return (weights * policy_loss(logps, entropy, advantages, **options)[0]).sum()


def _toy(N, D, V, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=dtype).requires_grad_(), (torch.randn(V, D, dtype=dtype) / D**0.5).requires_grad_()
    targets, advantages, weights = torch.randint(V, (N,)), torch.randn(N, dtype=dtype), torch.rand(N, dtype=dtype) / N
    old_logps = linear_logps(hidden, weight, targets)[0] + 0.2 * torch.randn(N, dtype=dtype)
    return (hidden, weight, targets, advantages, weights), old_logps


def _compare():
    """Largest error of value and gradients against float64 autograd, per option."""
    args, old = _toy(64, 16, 101, torch.float64)
    cases = {"clip": {}, "dual clip": {"dual_clip": 1.5}, "cispo": {"kind": "cispo"}, "reinforce": {"kind": "reinforce"},
             "sequence ratio": {"sequence_ids": torch.arange(64) // 8},
             "tis, kl, entropy": {"behavior_logps": old - 0.1, "tis_cap": 2.0, "ref_logps": old + 0.1, "kl_coef": 0.1,
                                  "entropy_coef": 0.01, "temperature": 0.7}}
    for name, options in cases.items():
        fused = linear_policy_loss(*args, old_logps=old, chunk=10, **options)[0]
        plain = _plain_loss(*args, old_logps=old, **options)
        results = [(loss.detach(), *torch.autograd.grad(loss, args[:2])) for loss in (fused, plain)]
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)]
        print(f"  {name:24} relative error: loss {errors[0]:.0e}  d hidden {errors[1]:.0e}  d weight {errors[2]:.0e}")
        if not max(errors) < 1e-10:
            raise SystemExit(f"{name}: the fused loss differs from the plain one")


class _PeakMemory(TorchDispatchMode):
    """Most bytes of tensors alive at once that were made inside the `with` (torch counts them itself on a GPU only)."""

    live = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(tree):
            return {t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}

        out = func(*args, **(kwargs or {}))
        for storage in storages(out) - storages((args, kwargs)):  # views make nothing
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def _measure(N=2048, D=128, V=4096, rounds=7):
    """Forward + backward of both, taking turns so that a busy machine is unfair to neither; the fastest round counts."""
    args, old = _toy(N, D, V, torch.float32)
    steps = {"fused": lambda: torch.autograd.grad(linear_policy_loss(*args, old_logps=old)[0], args[:2]),
             "plain": lambda: torch.autograd.grad(_plain_loss(*args, old_logps=old), args[:2])}
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    print(f"  N={N} D={D} V={V}, float32, {torch.get_num_threads()} threads")
    for name, step in steps.items():
        with _PeakMemory() as memory:
            step()
        print(f"  {name:8} {1000 * min(seconds[name]):7.0f} ms   {memory.peak / 2**20:7.0f} MB at the peak, gradients included")


if __name__ == "__main__":
    print("Fused loss against autograd on all logits, float64:")
    _compare()
    print("Forward and backward on this machine's CPU:")
    _measure()
