"""kernels.py's Triton kernels in Triton's interpreter, on a CPU: the numbers of their torch versions. Run by test_kernels_triton.py:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py     # a process of its own: Triton decides when it is imported

Float32 goes through the kernel, float64 through the torch version. The interpreter runs a program per token in Python: small shapes only.
It cuts off where a GPU rounds when it stores 16 bits.
"""

import pytest
import torch

import kernels
from kernels import linear_logps, linear_policy_loss

OPTIONS = {
    "clip": {},
    "first_update": {"old_logps": None},
    "dual_clip": {"dual_clip": 1.3},
    "cispo": {"kind": "cispo"},
    "reinforce": {"kind": "reinforce"},
    "tis": {"tis_cap": 1.2},
    "kl": {"kl_coef": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "temperature": {"temperature": 0.6},
    "gspo": {"sequence_ids": torch.arange(11) // 4},
    "everything": {"dual_clip": 1.3, "tis_cap": 1.2, "kl_coef": 0.3, "entropy_coef": 0.2, "temperature": 1.7},
    "gspo_entropy": {"sequence_ids": torch.arange(11) // 4, "entropy_coef": 0.2, "kl_coef": 0.1},
}


def batch(n=11, d=5, v=70, dtype=torch.float32, device="cpu", seed=0):
    """Random inputs, a few tokens masked or of advantage 0, ratios on both sides of both clips."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    hidden, head = (1.5 * draw(n, d)).to(dtype), draw(v, d).to(dtype)
    advantages, weights, targets = draw(n), torch.rand(n, generator=g) + 0.1, torch.randint(v, (n,), generator=g)
    advantages[1::4], weights[2::5] = 0.0, 0.0
    logps = linear_logps(hidden.double(), head.double(), targets)[0].float()
    given = {name: (logps + 0.5 * draw(n)).to(device) for name in ("old_logps", "behavior_logps", "ref_logps")}
    args = [x.to(device) for x in (hidden, head, targets, advantages, weights)]
    return tuple(x.requires_grad_() if i < 2 else x for i, x in enumerate(args)), given


def results(args, **options):
    loss, stats = linear_policy_loss(*args, **options)
    return loss.detach(), *torch.autograd.grad(loss, args[:2]), stats.logps, stats.entropy, stats.ratio, stats.clipped


def widen(x):
    """Float tensors as float64 leaves, all else as it is."""
    if isinstance(x, dict):
        return {k: widen(v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(map(widen, x))
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def both(args, **options):
    """(of the kernel, of the torch version), result by result."""
    torchs = [x.float() for x in results(widen(args), **widen(options))]
    return zip(results(args, **options), torchs, strict=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_12_the_triton_kernel_equals_the_torch_version(name):
    """Every option: value, gradients and statistics."""
    args, given = batch()
    options = given | OPTIONS[name]
    for mine, torchs in both(args, **options, chunk=4):
        torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (2, 1, 257), (3, 4, 2500)])
def test_contract_12_triton_every_shape(shape):
    """One token, a vocabulary of one, one wider than a block of 2048: masked columns must not leak in."""
    args, given = batch(*shape)
    for options in ({}, {"entropy_coef": 0.2, "kl_coef": 0.1}):
        for mine, torchs in both(args, **given, **options):
            torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=2e-6, equal_nan=True)


def test_the_interpreter_really_ran(monkeypatch):
    """Float32 goes through the kernel and float64 does not: else the tests above would compare the torch version with itself."""
    args, given = batch()
    launched, kernel = [], kernels._fused_kernel

    class Spy:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_fused_kernel", Spy())
    results(args, **given, entropy_coef=0.1)
    assert launched
    launched.clear()
    results(widen(args), **widen(given), entropy_coef=0.1)
    assert not launched


@pytest.fixture
def mixed_products(monkeypatch):
    """The 16-bit path of a GPU, on a CPU: products that read 16 bits and write 32, which torch lacks there, are given to it."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a, b, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def mm_out(a, b, out_dtype, *, out):
        return out.copy_(mm(a, b, out_dtype))

    def addmm(self, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert (beta, alpha) == (1, 1)
        return out.copy_(self + a.to(out_dtype) @ b.to(out_dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", mm_out, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    init = kernels.ChunkedHead.__init__

    def init_as_on_a_gpu(self, hidden, head, *rest):
        init(self, hidden, head, *rest)
        if hidden.dtype == torch.bfloat16:
            self.dtype, self.mixed, self.head = torch.bfloat16, {"out_dtype": self.wide}, head.detach()

    monkeypatch.setattr(kernels.ChunkedHead, "__init__", init_as_on_a_gpu)
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_contract_12_16_bits_as_on_a_gpu(mixed_products, name, dtype):
    """Log-probs to 1e-5, entropies to 1e-4, gradients to 1 % (the gradient of the logits is cut off to 16 bits here, rounded on a GPU) of float64."""
    args, given = batch(dtype=dtype)
    options = given | OPTIONS[name]
    found = list(both(args, **options, chunk=4))
    for (mine, true), atol in zip(found[3:], (1e-5, 1e-4, 1e-4, 0), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=atol, equal_nan=True)
    for mine, true in found[1:3]:
        assert mine.dtype == dtype and (mine.float() - true).norm() / true.norm() < 1e-2


def test_triton_a_sure_policy_keeps_its_digits():
    """p of the target about 1 - 1e-4, logits around 1,000: log-prob, entropy and gradient to six digits."""
    states, head = torch.tensor([[1010.0, 1000.0, 999.0, 1001.5]], requires_grad=True), torch.eye(4)
    args = (states, head.requires_grad_(), torch.tensor([0]), torch.ones(1), torch.ones(1))
    _, dx, _, logps, entropy, _, _ = both(args, temperature=1.1)
    for mine, torchs in (dx, logps, entropy):
        torch.testing.assert_close(mine, torchs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("logits", [[16.8, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 70.0, 0.0], [0.0, 1e4, -1e4], [1e4, -1e4, 0.0]])
def test_triton_extremes_are_finite(logits):
    """Targets of p = 1 - 1e-7, e^-50, e^-70, e^-10000 and 1: each right, and never a NaN from 0 * inf."""
    states, head = torch.tensor([logits], requires_grad=True), torch.eye(3, requires_grad=True)
    args = (states, head, torch.tensor([0]), torch.tensor([-1.0]), torch.ones(1))
    for options in ({}, {"old_logps": torch.tensor([-1e5])}, {"kl_coef": 0.1, "entropy_coef": 0.1, "ref_logps": torch.tensor([-1e5])}):
        for mine, torchs in both(args, **options):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-6)
