"""kernels.py: the fused loss is the plain one to the last digits of float64; what is dropped is dropped; nothing overflows.

The reference here uses nothing of kernels.py, on purpose: all logits, F.log_softmax, the papers' formulas, autograd.
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import (
    linear_logps,
    linear_policy_loss,
    plain_linear_loss,
    plain_policy_loss,
    policy_loss,
)

N, D, V = 13, 6, 19
NAN = float("nan")


def batch(n=N, d=D, v=V, dtype=torch.float64, seed=0, scale=1.5):
    """Random inputs: a third of the tokens masked, a quarter of advantage 0, ratios on both sides of both clips."""
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    head = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.1
    advantages[1::4], weights[2::3] = 0.0, 0.0
    z = (hidden.double() @ head.double().T).detach()
    logps = z.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    given = {name: logps + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)
            for name in ("old_logps", "behavior_logps", "ref_logps")}
    return (hidden, head, targets, advantages, weights), given


def reference(hidden, head, targets, advantages, weights, *, old_logps=None, behavior_logps=None, ref_logps=None, eps_low=0.2,
              eps_high=0.28, dual_clip=None, tis_cap=None, kl_coef=0.0, entropy_coef=0.0, kind="clip", sequence_ids=None,
              temperature=1.0):
    """One token after the other, with every logit in memory. Sequence ratios are over tokens of weight other than 0."""
    log_p = F.log_softmax(F.linear(hidden, head) / temperature, dim=-1)
    logps = [log_p[i, targets[i]] for i in range(len(targets))]
    old = [x.detach() for x in logps] if old_logps is None else old_logps
    seq = range(len(targets)) if sequence_ids is None else sequence_ids.tolist()
    total = log_p.sum() * 0
    for i in range(len(targets)):
        if weights[i] == 0:
            continue
        same = [j for j in range(len(targets)) if seq[j] == seq[i] and weights[j] != 0]
        ratio = torch.exp(sum(logps[j] - old[j] for j in same) / len(same))
        low, high = 1 - eps_low, 1 + eps_high
        if kind == "clip":
            a = advantages[i]
            if a >= 0:
                gain = a * ratio if ratio <= high else a * high
            else:
                gain = a * ratio if ratio >= low else a * low
                if dual_clip is not None and ratio > dual_clip:
                    gain = a * dual_clip
        elif kind == "cispo":
            gain = min(max(ratio.item(), low), high) * advantages[i] * logps[i]
        else:
            gain = advantages[i] * logps[i]
        if tis_cap is not None:
            gain = gain * min(math.exp(old[i] - behavior_logps[i]), tis_cap)
        loss = 0 - gain
        if kl_coef:
            d = ref_logps[i] - logps[i]
            loss = loss + kl_coef * (torch.exp(d) - d - 1)
        if entropy_coef:
            loss = loss + entropy_coef * (log_p[i].exp() * log_p[i]).sum()
        total = total + weights[i] * loss
    return total


def gradients(loss, args):
    return torch.autograd.grad(loss, args[:2])


SEQ = torch.tensor([0, 0, 5, 5, 5, 0, 2, 2, 2, 2, 9, 9, 9])
OPTIONS = {
    "clip": {},
    "clip_wide": {"eps_low": 0.4, "eps_high": 0.5},
    "first_update": {"old_logps": None},
    "dual_clip": {"dual_clip": 1.3},
    "cispo": {"kind": "cispo"},
    "cispo_first_update": {"kind": "cispo", "old_logps": None},
    "reinforce": {"kind": "reinforce"},
    "tis": {"tis_cap": 1.2},
    "tis_first_update": {"tis_cap": 1.2, "old_logps": None},
    "kl": {"kl_coef": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "temperature": {"temperature": 0.6},
    "gspo": {"sequence_ids": SEQ},
    "gspo_first_update": {"sequence_ids": SEQ, "old_logps": None},
    "gspo_cispo": {"sequence_ids": SEQ, "kind": "cispo"},
    "everything": {"dual_clip": 1.3, "tis_cap": 1.2, "kl_coef": 0.3, "entropy_coef": 0.2, "temperature": 1.7},
    "gspo_everything": {"sequence_ids": SEQ, "dual_clip": 1.3, "tis_cap": 1.2, "kl_coef": 0.3, "entropy_coef": 0.2,
                        "temperature": 0.7},
    "cispo_everything": {"kind": "cispo", "tis_cap": 1.2, "kl_coef": 0.3, "entropy_coef": -0.2, "temperature": 1.7},
    "reinforce_everything": {"kind": "reinforce", "tis_cap": 1.2, "kl_coef": 0.3, "entropy_coef": 0.2, "temperature": 1.7},
}


@pytest.mark.parametrize("chunk", [1, 7, N, None])
@pytest.mark.parametrize("name", OPTIONS)
def test_contract_12_fused_equals_plain(name, chunk):
    """Value and both gradients equal autograd on materialised logits in float64, for every option and chunk size."""
    args, given = batch()
    options = given | OPTIONS[name]
    want = reference(*args, **options)
    loss, _ = linear_policy_loss(*args, **options, chunk=chunk)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-13)
    for got, expected in zip(gradients(loss, args), gradients(want, args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_12_fused_equals_the_plain_version_of_the_file(name):
    """`plain_linear_loss`, which the reader meets first, is the same function (where no token is masked)."""
    (*inputs, weights), given = batch()
    args, options = (*inputs, weights + 0.1), given | OPTIONS[name]
    plain, (fused, _) = plain_linear_loss(*args, **options), linear_policy_loss(*args, **options, chunk=5)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradients(fused, args), gradients(plain, args), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("limits", [{}, {"eps_low": 0.05, "eps_high": 0.4}])
def test_contract_12_policy_loss_is_the_plain_one(limits):
    """Without options, `policy_loss` is the three lines above it: same bits, slopes included."""
    (*_, advantages, _), given = batch(200)
    found = []
    for name in ("plain", "with options"):
        logps = (given["old_logps"] + given["ref_logps"] - given["behavior_logps"]).requires_grad_()
        if name == "plain":
            losses = plain_policy_loss(logps, given["old_logps"], advantages, **limits)
        else:
            losses, _, clipped = policy_loss(logps, None, advantages, old_logps=given["old_logps"], **limits)
        found.append((losses, *torch.autograd.grad(losses.sum(), logps)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and 0.1 < clipped.mean() < 0.9


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (2, 1, 257), (40, 33, 5), (5, 4, 300)])
def test_contract_12_every_shape(shape):
    """One token, one dimension, a vocabulary of one: no shape is special (verl #2899 was wrong when V % 256 was not 0)."""
    args, given = batch(*shape)
    for options in ({}, {"kl_coef": 0.3, "entropy_coef": 0.2, "tis_cap": 1.2}, {"sequence_ids": torch.arange(shape[0]) // 2}):
        want, (loss, _) = reference(*args, **given, **options), linear_policy_loss(*args, **given, **options, chunk=3)
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-13)
        for got, expected in zip(gradients(loss, args), gradients(want, args), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_contract_12_logps_and_stats():
    """linear_logps, Stats and log_softmax say the same, for every chunk size; entropy is that of the tempered distribution."""
    args, given = batch()
    log_p = F.log_softmax(args[0] @ args[1].T / 0.7, -1).detach()
    logps, entropy = log_p[torch.arange(N), args[2]], -(log_p.exp() * log_p).sum(-1)
    for chunk in (1, 7, N, None):
        got = linear_logps(*args[:3], temperature=0.7, chunk=chunk)
        torch.testing.assert_close(got, (logps, entropy), rtol=1e-12, atol=1e-13)
        assert not any(x.requires_grad for x in got)
        _, stats = linear_policy_loss(*args, **given, temperature=0.7, chunk=chunk, kl_coef=1.0)
        kept = args[4] != 0
        ratio = (logps - given["old_logps"]).exp()
        for mine, want in ((stats.logps, logps), (stats.entropy, entropy), (stats.ratio, ratio)):
            torch.testing.assert_close(mine[kept], want[kept], rtol=1e-12, atol=1e-13)
            assert mine.shape == (N,) and not mine.requires_grad and mine[~kept].isnan().all()
        assert stats.clipped[kept].unique().tolist() == [0.0, 1.0] and stats.clipped[~kept].isnan().all()


@pytest.mark.parametrize("name", ["clip", "reinforce", "everything", "gspo_everything"])
def test_gradcheck(name):
    """Finite differences agree, so autograd and we do not share a mistake (where nothing is detached: no cispo, no old=None)."""
    (hidden, head, *rest), given = batch(5, 4, 11, scale=0.5)
    options = {k: v[:5] if k == "sequence_ids" else v for k, v in (given | OPTIONS[name]).items()}

    class Loss(torch.autograd.Function):  # gradcheck differentiates one loss several times, ours gives its gradients away once
        @staticmethod
        def forward(ctx, hidden, head):
            ctx.save_for_backward(hidden, head)
            return linear_policy_loss(hidden, head, *rest, **options, chunk=2)[0].detach()

        @staticmethod
        def backward(ctx, grad_output):
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                loss = linear_policy_loss(*leaves, *rest, **options, chunk=2)[0]
            return torch.autograd.grad(loss, leaves, grad_output)
    assert torch.autograd.gradcheck(Loss.apply, (hidden, head), eps=1e-6, atol=1e-7)


def test_central_differences():
    """Twenty entries of hidden and of head, at a size where chunks are cut: the loss moves as the gradient says."""
    (hidden, head, *rest), given = batch(40, 16, 300, scale=0.5)
    loss = lambda: linear_policy_loss(hidden, head, *rest, **given, **OPTIONS["everything"], chunk=9)[0]
    g = torch.Generator().manual_seed(1)
    for x, gradient in zip((hidden, head), torch.autograd.grad(loss(), (hidden, head)), strict=True):
        for i in torch.randint(x.numel(), (20,), generator=g):
            with torch.no_grad():
                entry, step = x.view(-1)[i].clone(), 1e-6
                x.view(-1)[i] = entry + step
                up = loss()
                x.view(-1)[i] = entry - step
                slope = (up - loss()) / (2 * step)
                x.view(-1)[i] = entry
            assert slope.item() == pytest.approx(gradient.view(-1)[i].item(), rel=1e-5, abs=1e-8)


def test_inputs_need_not_be_contiguous():
    """A transposed head, hidden states and statistics with strides: what their copies give, but for rounding."""
    args, given = batch()
    want = linear_policy_loss(*args, **given, kl_coef=0.1)[0]
    stretched = [torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_(x.requires_grad) for x in (*args, *given.values())]
    assert not any(x.is_contiguous() for x in stretched)
    loss = linear_policy_loss(*stretched[:5], **dict(zip(given, stretched[5:], strict=True)), kl_coef=0.1)[0]
    transposed = (args[0], args[1].detach().T.contiguous().T.requires_grad_(), *args[2:])
    again = linear_policy_loss(*transposed, **given, kl_coef=0.1)[0]
    grads = gradients(want, args)
    for got, inputs in ((loss, stretched), (again, transposed)):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients(got, inputs), grads, rtol=1e-12, atol=1e-15)


def test_very_many_tokens():
    """More than 65,536 tokens, which is more than a GPU's second grid dimension has (Liger #1294)."""
    args, given = batch(66000, 3, 5)
    loss, stats = linear_policy_loss(*args, **given)
    log_p = (args[0] @ args[1].T).log_softmax(-1).gather(1, args[2][:, None]).squeeze(1)
    losses, _, _ = policy_loss(log_p, None, args[3], old_logps=given["old_logps"])
    torch.testing.assert_close(loss, (args[4] * losses).sum(), rtol=1e-12, atol=0)
    assert stats.logps.isnan().equal((args[3] == 0) | (args[4] == 0))


def test_without_triton():
    """Importing and using the file where Triton is not installed."""
    use = ("import sys; sys.modules['triton'] = None; import torch, kernels; assert kernels.triton is None; "
           "print(kernels.linear_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3]))[0].tolist())")
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, cwd=Path(kernels.__file__).parent, check=False)
    assert done.returncode == 0 and done.stdout.startswith("[-1.386"), done.stderr


def hand(ratio, advantage, **options):
    """(loss, dloss/dlogp, clipped) of one token of that ratio, from the spec."""
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = logps.detach() - math.log(ratio)
    loss, _, clipped = policy_loss(logps, None, torch.tensor([advantage], dtype=torch.float64), old_logps=old, **options)
    (g,) = torch.autograd.grad(loss.sum(), logps)
    return pytest.approx((loss.item(), g.item(), clipped.item()), abs=1e-12)


@pytest.mark.parametrize(("advantage", "ratio", "options", "want"), [
    (2.0, 0.5, {}, (-1.0, -1.0, 0)),           # A > 0, below: pull it back up
    (2.0, 1.0, {}, (-2.0, -2.0, 0)),
    (2.0, 1.27, {}, (-2.54, -2.54, 0)),        # clip-higher: above 1.2 still moves
    (2.0, 1.5, {}, (-2.56, 0.0, 1)),           # pushed up enough
    (-2.0, 0.5, {}, (1.6, 0.0, 1)),            # pushed down enough
    (-2.0, 1.0, {}, (2.0, 2.0, 0)),
    (-2.0, 1.5, {}, (3.0, 3.0, 0)),            # A < 0, above: no upper clip
    (-2.0, 5.0, {}, (10.0, 10.0, 0)),
    (-2.0, 5.0, {"dual_clip": 3.0}, (6.0, 0.0, 1)),
    (-2.0, 2.5, {"dual_clip": 3.0}, (5.0, 5.0, 0)),
    (2.0, 5.0, {"dual_clip": 3.0}, (-2.56, 0.0, 1)),
    (2.0, 1.0, {"eps_high": 0.0}, (-2.0, -2.0, 0)),      # at the edge, not beyond it
    (2.0, 0.5, {"kind": "cispo"}, (1.6, -1.6, 1)),       # weight 0.8, logp -1; the gradient never vanishes
    (2.0, 1.1, {"kind": "cispo"}, (2.2, -2.2, 0)),
    (-2.0, 1.5, {"kind": "cispo"}, (-2.56, 2.56, 1)),
    (2.0, 1.5, {"kind": "reinforce"}, (2.0, -2.0, 0)),
    # old = -1 - log(ratio); behavior = -2: exp(old - behavior) = e / ratio
    (2.0, 1.0, {"tis_cap": 10.0, "behavior_logps": torch.tensor([-2.0])}, (-2 * math.e, -2 * math.e, 0)),
    (2.0, 1.0, {"tis_cap": 1.5, "behavior_logps": torch.tensor([-2.0])}, (-3.0, -3.0, 0)),
    (2.0, 1.0, {"behavior_logps": torch.tensor([-2.0])}, (-2.0, -2.0, 0)),            # given, but no cap: diagnostics only
    (0.0, 1.0, {"kl_coef": 0.5, "ref_logps": torch.tensor([0.0])}, (0.5 * (math.e - 2), 0.5 * (1 - math.e), 0)),
])
def test_hand_table(advantage, ratio, options, want):
    """The clip, dual clip, CISPO, TIS and k3 cases worked out by hand: loss, its slope in logp, and the clipped flag."""
    assert want == hand(ratio, advantage, **options)


def test_first_update_is_ratio_one():
    """old_logps=None is old = logps.detach() bit for bit: ratio exactly 1, nothing clipped, gradient that of REINFORCE."""
    args, _ = batch()
    loss, stats = linear_policy_loss(*args)
    again, _ = linear_policy_loss(*args, old_logps=stats.logps)  # Stats of the first epoch, NaN included, serve the later ones
    plain, _ = linear_policy_loss(*args, kind="reinforce")
    kept = ~stats.ratio.isnan()
    assert (stats.ratio[kept] == 1).all() and (stats.clipped[kept] == 0).all() and torch.equal(loss, again)
    for a, b, c in zip(gradients(loss, args), gradients(again, args), gradients(plain, args), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("name", OPTIONS)
def test_contract_03_gradient_iff_sampled_and_signal(name, chunk):
    """A token gets gradient iff its weight is not 0 and something pulls on it: its advantage (unless clipped), KL or entropy."""
    args, given = batch()
    advantages, weights = args[3:]
    options = given | OPTIONS[name]
    loss, stats = linear_policy_loss(*args, **options, chunk=chunk)
    dx, _ = gradients(loss, args)
    everywhere = bool(options.get("kl_coef") or options.get("entropy_coef"))
    pulls = advantages != 0
    if options.get("kind", "clip") == "clip":
        pulls &= stats.clipped != 1
    if options.get("sequence_ids") is not None and options.get("kind", "clip") == "clip":  # one ratio: a pull on one is on all
        pulls = torch.tensor([(pulls & (weights != 0) & (SEQ == s)).any().item() for s in SEQ])
    assert torch.equal(dx.ne(0).any(1), (weights != 0) & (pulls | everywhere))
    if options.get("sequence_ids") is None:
        assert torch.equal(~stats.logps.isnan(), (weights != 0) & ((advantages != 0) | everywhere))


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "entropy_coef": 0.1}, {"sequence_ids": SEQ}, {"tis_cap": 1.2}])
def test_contract_03_masked_rows_may_hold_anything(options):
    """NaN, a target of -100 and infinite log-probs in tokens of weight 0 reach neither loss nor gradients (0 * NaN is NaN)."""
    args, given = batch()
    want = linear_policy_loss(*args, **given, **options)[0]
    masked = args[4] == 0
    hidden = args[0].detach().masked_fill(masked[:, None], NAN).requires_grad_()
    dirty = (hidden, args[1], args[2].masked_fill(masked, -100), args[3].masked_fill(masked, NAN), args[4])
    loss, stats = linear_policy_loss(*dirty, **{k: v.masked_fill(masked, -math.inf) for k, v in given.items()}, **options)
    assert torch.equal(loss, want) and stats.logps[masked].isnan().all()
    for got, expected in zip(gradients(loss, dirty), gradients(want, args), strict=True):
        assert torch.equal(got, expected)
    assert gradients(linear_policy_loss(*dirty, **options | given)[0], dirty)[0][masked].eq(0).all()


@pytest.mark.parametrize("options", [{}, {"kind": "cispo"}, {"kl_coef": 0.3}, {"sequence_ids": SEQ}])
def test_contract_03_dropping_changes_nothing(options):
    """Taking the masked tokens out by hand gives the same loss and gradients: the mask is not a computation, it is an absence."""
    args, given = batch()
    kept = args[4] != 0
    few = (args[0].detach()[kept].requires_grad_(), args[1], *(x[kept] for x in args[2:]))
    few_given = {k: v[kept] for k, v in (given | options).items() if isinstance(v, torch.Tensor)}
    loss, want = linear_policy_loss(*args, **given, **options)[0], linear_policy_loss(*few, **options | few_given)[0]
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
    (dx, dw), (dx_few, dw_few) = gradients(loss, args), gradients(want, few)
    torch.testing.assert_close(dx[kept], dx_few, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dw, dw_few, rtol=1e-12, atol=1e-15)
    assert dx[~kept].eq(0).all()


def test_contract_03_zero_advantage_token_stays_in_its_sequence_ratio():
    """One ratio per sequence: a token of advantage 0 (turn-level credit) still counts in the mean and still gets gradient."""
    args, _ = batch(4)
    args = (*args[:3], torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), torch.ones(4).double())
    ids = torch.tensor([0, 0, 1, 1])
    old = linear_logps(*args[:3])[0] - torch.tensor([0.1, 0.05, 0.3, 0.3])
    loss, stats = linear_policy_loss(*args, old_logps=old, sequence_ids=ids)
    dx, _ = gradients(loss, args)
    assert dx.ne(0).any(1).tolist() == [True, True, False, False]
    assert stats.ratio[:2].tolist() == pytest.approx([math.exp(0.075)] * 2) and stats.ratio[2:].isnan().all()


def test_gspo_closed_form():
    """s = (prod of ratios)^(1/length) and dL/dlogp_t = -s A / length for each token, as printed in the paper."""
    (hidden, head, targets, *_), _ = batch(4)
    logps = linear_logps(hidden, head, targets)[0]
    ids, steps = torch.tensor([7, 7, 7, 3]), torch.tensor([0.3, -0.1, 0.1, -0.05]).double()
    advantages, weights = torch.tensor([2.0, 2.0, 2.0, -1.0]).double(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]).double()
    s = [math.exp(0.1), math.exp(-0.05)]
    loss, stats = linear_policy_loss(hidden, head, targets, advantages, weights, old_logps=logps - steps, sequence_ids=ids)
    assert loss.item() == pytest.approx(-2 * s[0] + s[1]) and stats.ratio.tolist() == pytest.approx([s[0]] * 3 + [s[1]])
    leaf = logps.clone().requires_grad_()
    per_token, _, _ = policy_loss(leaf, None, advantages, old_logps=logps - steps, sequence_ids=ids)
    g = torch.autograd.grad((weights * per_token).sum(), leaf)[0].tolist()
    assert g == pytest.approx([-2 * s[0] / 3] * 3 + [s[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits", [[16.8, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 70.0, 0.0], [0.0, 1e4, -1e4], [1e4, -1e4, 0.0]])
def test_extremes_are_finite(logits, dtype):
    """A target (the first) of p = 1 - 1e-7, e^-50, e^-70, e^-10000 or 1: its log-prob is right, and all is finite."""
    hidden, head = torch.tensor([logits], dtype=dtype, requires_grad=True), torch.eye(3, dtype=dtype, requires_grad=True)
    want = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)[0].item()
    for old in (None, torch.tensor([-1.0]), torch.tensor([-100.0]), torch.tensor([-1e5])):
        for options in ({}, {"kind": "cispo"}, {"kl_coef": 0.1, "entropy_coef": 0.1, "ref_logps": torch.tensor([-5.0])}):
            args = (hidden, head, torch.tensor([0]), torch.tensor([-1.0]), torch.tensor([1.0]))
            loss, stats = linear_policy_loss(*args, old_logps=old, **options)
            assert stats.logps.item() == pytest.approx(want, rel=1e-6, abs=1.3e-7)  # float32: to its eps
            assert all(torch.isfinite(x).all() for x in (loss, stats.ratio, stats.entropy, *gradients(loss, args)))


def test_a_sure_policy_keeps_its_digits():
    """In float32, with p of the target about 1 - 1e-4 and logits around 1,000: log-prob, entropy and gradient to six digits.

    1 - p, log(total) and logit / temperature - largest each lost most digits when computed as a difference.
    """
    logits = [[1010.0, 1000.0, 999.0, 1001.5]]
    found = []
    for dtype in (torch.float32, torch.float64):
        hidden, head = torch.tensor(logits, dtype=dtype, requires_grad=True), torch.eye(4, dtype=dtype)
        loss, stats = linear_policy_loss(hidden, head, torch.tensor([0]), torch.ones(1), torch.ones(1), temperature=1.1)
        loss.backward()
        found.append([stats.logps.double(), stats.entropy.double(), hidden.grad.double()])
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=0)


def test_known_distributions():
    """Uniform: entropy log V. One-hot by logits of 1e4: logp 0, entropy 0, and no gradient left to take."""
    logps, entropy = linear_logps(torch.zeros(1, 2), torch.ones(50, 2), torch.tensor([3]))
    assert (logps.item(), entropy.item()) == pytest.approx((-math.log(50), math.log(50)), abs=1e-6)
    hidden, head = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.eye(2)
    loss, stats = linear_policy_loss(hidden, head, torch.tensor([0]), torch.ones(1), torch.ones(1), entropy_coef=0.1)
    loss.backward()
    assert (stats.logps.item(), stats.entropy.item()) == (0.0, 0.0) and hidden.grad.eq(0).all()


@pytest.mark.parametrize("options", [{}, {"sequence_ids": SEQ}, {"kl_coef": 0.1, "entropy_coef": 0.1}])
def test_nothing_to_learn_from(options):
    """An empty batch, or one wholly masked, gives loss 0 and zero gradients of the right shape, not NaN and not an error."""
    args, given = batch()
    empty = (args[0].detach()[:0].requires_grad_(), args[1], *(x[:0] for x in args[2:]))
    masked = (*args[:4], torch.zeros(N))
    none_given = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in (given | options).items()}
    for a, r in ((empty, none_given), (masked, given | options)):
        loss, stats = linear_policy_loss(*a, **r)
        dx, dw = gradients(loss, a)
        assert loss.item() == 0 and dx.shape == a[0].shape and dw.shape == a[1].shape and not dx.any() and not dw.any()
        assert stats.logps.isnan().all() and len(stats.logps) == len(a[0])
    assert [len(x) for x in linear_logps(*empty[:3])] == [0, 0]


def test_frozen_parts_get_no_gradient():
    """A frozen head costs no third product and gets none; so do frozen hidden states; no_grad makes no gradient at all."""
    args, given = batch()
    dx, dw = gradients(linear_policy_loss(*args, **given)[0], args)
    head = args[1].detach()
    loss, _ = linear_policy_loss(args[0], head, *args[2:], **given)
    assert torch.equal(torch.autograd.grad(loss, args[0])[0], dx) and head.grad is None
    loss, _ = linear_policy_loss(args[0].detach(), *args[1:], **given)
    assert torch.equal(torch.autograd.grad(loss, args[1])[0], dw)
    with torch.no_grad():
        loss, _ = linear_policy_loss(*args, **given)
    assert not loss.requires_grad and torch.equal(loss, linear_policy_loss(*args, **given)[0].detach())


def products(call):
    """Number of matrix products `call` runs."""
    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += str(func.overloadpacket) in ("aten.mm", "aten.addmm", "aten.addmm_")
            return func(*args, **(kwargs or {}))
    with Count() as count:
        call()
    return count.n


def test_no_product_without_need():
    """Three products when both train, two for a frozen head, one for evaluation; a sequence ratio costs one; backward none."""
    args, given = batch()
    frozen = (args[0], args[1].detach(), *args[2:])
    assert products(lambda: linear_policy_loss(*args, **given)[0].backward()) == 3
    assert products(lambda: linear_policy_loss(*frozen, **given)[0].backward()) == 2
    assert products(lambda: linear_policy_loss(*args, **given, sequence_ids=SEQ)[0].backward()) == 4
    with torch.no_grad():
        assert products(lambda: linear_policy_loss(*args, **given)) == 1
        assert products(lambda: linear_policy_loss(*args, **given, sequence_ids=SEQ)) == 1


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "entropy_coef": 0.2}, {"sequence_ids": torch.arange(64) // 8}])
def test_logits_of_the_batch_are_never_held(options):
    """No tensor, forward or backward, is larger than a chunk of logits (or the inputs): that is what the file is for."""
    args, given = batch(64, 4, 50)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out
    with Largest() as seen:
        linear_policy_loss(*args, **given, **options, chunk=8)[0].backward()
    assert seen.numel == 8 * 64  # the next multiple of 64: lines that begin aligned are multiplied faster
    with Largest() as plain:
        reference(*args, **given)
    assert plain.numel == 64 * 50
    with Largest() as alone:
        linear_logps(*args[:3], chunk=8)
    assert alone.numel == 8 * 64


def test_gradient_is_scaled_by_what_comes_after():
    """Loss scaling, a sum of micro-batches, gradient accumulation into .grad: backward multiplies by grad_output."""
    args, given = batch()
    dx, dw = gradients(linear_policy_loss(*args, **given)[0], args)
    for _ in range(2):
        (3 * linear_policy_loss(*args, **given)[0]).backward()
    torch.testing.assert_close((args[0].grad, args[1].grad), (6 * dx, 6 * dw), rtol=1e-13, atol=0)
    loss, _ = linear_policy_loss(*args, **given)
    (first,) = torch.autograd.grad(loss**2, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    loss, _ = linear_policy_loss(*args, **given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away: compute it again"):  # they were scaled in place: no second [V, D]
        loss.backward()


def test_gradient_flows_on_into_the_model():
    """hidden and head need not be leaves, and a tied embedding gets both of its gradients."""
    (_, head, targets, advantages, weights), given = batch()
    ids = targets.roll(1)
    want = torch.autograd.grad(reference(torch.tanh(head[ids]), head, targets, advantages, weights, **given), head)[0]
    loss, _ = linear_policy_loss(torch.tanh(head[ids]), head, targets, advantages, weights, **given, chunk=5)
    torch.testing.assert_close(torch.autograd.grad(loss, head)[0], want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, autocast):
    """16-bit inputs, fp32 inside: logps to 1e-5 of float64 on the same inputs, gradients to one rounding, autocast or not."""
    args, given = batch(64, 32, 300, dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in args)
    want, stats64 = linear_policy_loss(*exact, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, stats = linear_policy_loss(*args, **given, chunk=10)
    assert loss.dtype == stats.logps.dtype == torch.float32
    kept = ~stats64.logps.isnan()
    assert (stats.logps - stats64.logps)[kept].abs().max() < 1e-5 and (stats.entropy - stats64.entropy)[kept].abs().max() < 1e-5
    unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)  # half a unit in the last place
    for got, expected in zip(gradients(loss, args), gradients(want, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1.1 * unit, atol=1e-5)


def test_float16_gradients_survive_small_weights():
    """With weights of 1/tokens a float16 gradient underflows unless the loss scale is applied before rounding."""
    args, given = batch(8, dtype=torch.float16)
    args = (*args[:4], args[4] * 1e-8)
    loss, _ = linear_policy_loss(*args, **given)
    dx, _ = torch.autograd.grad(loss * 2.0**26, args[:2])
    wide = tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in args)
    want, _ = torch.autograd.grad(linear_policy_loss(*wide, **given)[0] * 2.0**26, wide[:2])
    torch.testing.assert_close(dx.double(), want, rtol=1e-3, atol=1e-5)
    assert dx.any()


def test_arguments_are_left_alone():
    """No tensor that was handed in is written to (the bug of habit 3: a view that changed the normaliser between two passes)."""
    args, given = batch()
    before = [x.detach().clone() for x in (*args, *given.values(), SEQ)]
    for options in OPTIONS.values():
        linear_policy_loss(*args, **given | options)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*args, *given.values(), SEQ), strict=True))


def test_mixed_dtypes():
    """Bool weights, integer advantages and float32 old log-probs next to float64 states are fine: they are cast, not promoted."""
    args, given = batch()
    loss, stats = linear_policy_loss(*args[:3], torch.ones(N, dtype=torch.long), torch.ones(N, dtype=torch.bool))
    assert loss.item() == pytest.approx(-N) and stats.logps.dtype == torch.float64
    mixed = (args[0].detach().bfloat16().requires_grad_(), args[1].detach().float().requires_grad_(), *args[2:])
    dx, dw = gradients(linear_policy_loss(*mixed, **given)[0], mixed)
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "ppo"}, "kind must be one of clip, cispo, reinforce, got 'ppo'"),
    ({"kl_coef": 0.1, "ref_logps": None}, "kl_coef needs ref_logps"),
    ({"tis_cap": 2.0, "behavior_logps": None}, "tis_cap needs behavior_logps"),
    ({"tis_cap": 0.0}, "tis_cap must be positive, got 0.0"),
    ({"dual_clip": 1.0}, "dual_clip must be greater than 1"),
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ({"temperature": NAN}, "temperature must be positive"),
    ({"chunk": 0}, "chunk must be at least 1"),
    ({"hidden": torch.zeros(N, D + 1)}, r"hidden must be \[N, D\] and head \[V, D\]"),
    ({"hidden": torch.zeros(N, 1, D)}, r"hidden must be \[N, D\]"),
    ({"targets": torch.zeros(N + 1, dtype=torch.long)}, r"targets must be \[N\] = \[13\].*got \[14\]"),
    ({"advantages": torch.zeros(1)}, "advantages must be"),
    ({"weights": torch.zeros(N, 1)}, "weights must be"),
    ({"old_logps": torch.zeros(())}, "old_logps must be"),
    ({"behavior_logps": torch.zeros(3)}, "behavior_logps must be"),
    ({"ref_logps": torch.zeros(3)}, "ref_logps must be"),
    ({"sequence_ids": torch.zeros(3)}, "sequence_ids must be"),
])
def test_bad_input_is_one_clear_line(change, message):
    """Broadcasting would turn most of these into a wrong loss without a word; they are refused, naming the argument."""
    args, given = batch()
    names = ("hidden", "head", "targets", "advantages", "weights")
    with pytest.raises(ValueError, match=message) as error:
        linear_policy_loss(**dict(zip(names, args, strict=True)) | given | change)
    assert "\n" not in str(error.value)


def test_bad_input_of_linear_logps():
    """The same refusals where there is no loss."""
    with pytest.raises(ValueError, match="targets must be"):
        linear_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long), temperature=-1)


def test_examples_in_the_docstrings():
    """What the docstrings show is what happens."""
    import doctest
    result = doctest.testmod(kernels)
    assert result.attempted >= 8 and result.failed == 0


def test_runs_alone():
    """`python kernels.py` compares the plain and the fused loss, and finds no difference but rounding."""
    done = subprocess.run([sys.executable, kernels.__file__], capture_output=True, text=True,
                          timeout=120, cwd=Path(kernels.__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    _, plain, fused, last = done.stdout.splitlines()
    errors = [float(word) for word in re.findall(r"\de[+-]\d+", last)]
    assert len(errors) == 2 and max(errors) < 1e-12
    assert "logits of 1024 tokens" in plain and "MB" in fused
