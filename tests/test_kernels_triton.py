"""kernels.py's Triton kernel: in the interpreter, compiled for a GPU that is not here, and against float64 on one that is."""

import os
import subprocess
import sys
from pathlib import Path

import bench_kernels
import pytest
import torch
from triton_interpreted import OPTIONS, batch, results, widen

import kernels
from kernels import linear_policy_loss

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: run the suite on a machine with one")


def test_contract_12_in_the_interpreter():
    """Every option and odd shape, the extremes, 16-bit exponentials: tests/triton_interpreted.py, in a process of its own."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/triton_interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=Path(kernels.__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]


NO_OPTIONS = dict.fromkeys(("OLD_LOGPS", "BEHAVIOR_LOGPS", "REF_LOGPS", "dual_clip", "tis_cap"))
LAUNCHES = {  # what is None, or a constant, in each way to call the kernel
    "everything": {},
    "cispo": {"KIND": "cispo"},
    "first update": NO_OPTIONS | {"KIND": "reinforce"},
    "log-probs only": NO_OPTIONS | {"DLOGITS": None, "WEIGHTS": None, "ADVANTAGES": None},
}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(capability, launch):
    """Down to machine code for A100, H100 and B200: what only the interpreter accepts is found out here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = kernels._fused_kernel
    constants = {"VOCABULARY": 151936, "KIND": "clip", "BLOCK": 2048} | LAUNCHES[launch]
    types = {"DLOGITS": "*bf16", "TARGETS": "*i64", "logits_stride": "i64", "dlogits_stride": "i64"}
    signature = {}
    for name in kernel.arg_names:
        default = "*fp32" if name.isupper() else "fp32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
    assert "ex2.approx" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 1000
    # The approximate logarithm is wrong near 1, where a sure policy is.
    assert "lg2.approx" not in compiled.asm["ptx"]


# ---- on a GPU ----


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_equals_float64(name, dtype):
    """The whole loss through the kernel against float64 through the torch version, from the same 16-bit inputs."""
    args, given = batch(11, 64, 1000, dtype, "cuda")
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in (given | OPTIONS[name]).items()}
    got = results(args, **options, chunk=4)
    want = results(widen(args), **widen(options))
    kept = ~want[3].isnan()
    assert (got[3] - want[3])[kept].abs().max() < 1e-5 and (got[4] - want[4])[kept].abs().max() < 1e-4
    for mine, true in zip(got[1:3], want[1:3], strict=True):
        assert (mine.double() - true).norm() / true.norm() < (1e-5 if dtype == torch.float32 else 4e-3)


@gpu
@pytest.mark.parametrize("peaked", [False, True])
def test_gpu_at_the_size_of_a_real_vocabulary(peaked):
    """V = 151,936 in bfloat16: log-probs to 1e-5, entropies to 1e-4, gradients to 4e-3 of float64; twice the same bits."""
    args, old = bench_kernels.toy(512, 1024, 151936, torch.bfloat16, "cuda", peaked=peaked)
    first, second = (results(args, old_logps=old, chunk=200) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    want = results(widen(args), old_logps=old.double())
    assert (first[3] - want[3]).abs().max() < 1e-5 and (first[4] - want[4]).abs().max() < 1e-4
    for mine, true in zip(first[1:3], want[1:3], strict=True):
        assert (mine.double() - true).norm() / true.norm() < 4e-3


@gpu
def test_gpu_holds_no_more_than_it_says():
    """Beyond inputs and gradients: a chunk of logits, their gradient in 16 bits, both gradients in float32."""
    N, D, V, chunk = 4096, 512, 50304, 512
    args, old = bench_kernels.toy(N, D, V, torch.bfloat16, "cuda")
    step = lambda: torch.autograd.grad(linear_policy_loss(*args, old_logps=old, chunk=chunk)[0], args[:2])
    step()
    formula = (2 + 4) * chunk * V + 4 * (N + V) * D + 6 * chunk * D
    assert bench_kernels.weigh(step, cuda=True) <= 1.05 * formula


@gpu
def test_gpu_more_rows_than_a_grid_may_have():
    """65,536 tokens and more (Liger #1294 crashed there)."""
    args, old = bench_kernels.toy(70000, 16, 300, torch.bfloat16, "cuda")
    loss, stats = linear_policy_loss(*args, old_logps=old)
    want, _ = linear_policy_loss(*(x.detach().cpu().float() if x.is_floating_point() else x.cpu() for x in args), old_logps=old.cpu())
    assert loss.item() == pytest.approx(want.item(), rel=1e-3, abs=1e-5) and stats.logps.isfinite().all()
