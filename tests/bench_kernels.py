"""How fast, how lean and how exact the fused loss is: against its own ceiling, torch, and the peers that are installed.

    python tests/bench_kernels.py              # with TRL, Liger, CCE, verl, as far as they are installed (requirements-peers.txt)
    python tests/bench_kernels.py --sweep      # tokens per chunk, to choose the default on a new GPU
    python tests/bench_kernels.py --shape 16384,2048,151936 --json figures.json

Job: hidden states, head, targets, advantages, old log-probs -> loss and both gradients. All contestants take turns in one process;
the median counts. The ceiling is the three matrix products that no method can do without. Memory is what a step needs at its peak
beyond its inputs and the gradients it returns. Three kinds of data: random weights; peaked (a policy sure of most tokens); and
"rl batch", peaked with a quarter of the rows masked and half of the rest in groups without signal.
"""

import argparse
import contextlib
import json
import platform
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels import linear_logps, linear_policy_loss, policy_loss

LENGTH = 64  # tokens of a sequence: Liger takes one advantage per sequence


# ---- Right first ----


def plain_loss(hidden, head, targets, advantages, weights, *, temperature=1.0, **options):
    """The same loss the usual way: all logits at once, autograd through everything."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_p = F.log_softmax(F.linear(hidden, head) / temperature, dim=-1, dtype=wide)  # [N, V]
    logps = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)  # [N]
    entropy = -(log_p.exp() * log_p).sum(-1) if options.get("entropy_coef") else None  # [N]; free for the fused loss, not here
    return (weights * policy_loss(logps, entropy, advantages, **options)[0]).sum()


def toy(N, D, V, dtype, device="cpu", peaked=False, length=1):
    """(arguments of the loss, old_logps). `peaked`: of a policy sure of most tokens. `length` rows in a row have one advantage."""
    torch.manual_seed(0)
    hidden, head = torch.randn(N, D, device=device), torch.randn(V, D, device=device) / D**0.5
    targets = torch.randint(V, (N,), device=device)
    if peaked:
        hidden += 14 * head[targets]
        targets = torch.cat([(x @ head.T).softmax(-1).multinomial(1) for x in hidden.split(1024)]).squeeze(1)
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    advantages, weights = torch.randn(N // length, device=device).repeat_interleave(length), torch.full((N,), 1 / N, device=device)
    return (hidden, head, targets, advantages, weights), linear_logps(hidden, head, targets)[0] + 0.05 * torch.randn(N, device=device)


def check():
    """Largest error of value and gradients against float64 autograd, per option."""
    args, old = toy(64, 16, 101, torch.float64)
    cases = {"clip": {}, "dual clip": {"dual_clip": 1.5}, "cispo": {"kind": "cispo"}, "reinforce": {"kind": "reinforce"},
             "sequence ratio": {"sequence_ids": torch.arange(64) // 8},
             "tis, kl, entropy": {"behavior_logps": old - 0.1, "tis_cap": 2.0, "ref_logps": old + 0.1, "kl_coef": 0.1,
                                  "entropy_coef": 0.01, "temperature": 0.7}}
    for name, options in cases.items():
        fused = linear_policy_loss(*args, old_logps=old, chunk=10, **options)[0]
        plain = plain_loss(*args, old_logps=old, **options)
        results = [(loss.detach(), *torch.autograd.grad(loss, args[:2])) for loss in (fused, plain)]
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)]
        print(f"  {name:24} relative error: loss {errors[0]:.0e}  d hidden {errors[1]:.0e}  d head {errors[2]:.0e}")
        if not max(errors) < 1e-10:
            raise SystemExit(f"{name}: the fused loss differs from the plain one")


# ---- What is measured ----


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


def weigh(step, cuda: bool) -> int:
    """Bytes that `step` needs at its peak, beyond what was there before and the tensors it returns."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = step()
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in out)
    with _PeakMemory() as memory:
        out = step()
    return memory.peak - sum(x.nbytes for x in out)


def race(steps: dict, rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of each step in each round. They take turns, each round in another order, so that a busy machine is unfair to none."""
    seconds = {name: [] for name in steps}
    for r in range(rounds):
        for name in [*list(steps)[r % len(steps) :], *list(steps)[: r % len(steps)]]:
            start = time.perf_counter()
            steps[name]()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values) -> float:
    return sorted(values)[len(values) // 2]


# ---- Who runs ----


def of(loss, args, **options):
    """A step: both gradients of a loss."""
    return lambda: torch.autograd.grad(loss(*args, **options), args[:2])


def three_products(args):
    """The ceiling: the logits of a chunk, and both gradients from them, in the inputs' own precision. Only logits reuse memory."""
    hidden, head = (x.detach() for x in args[:2])
    chunk = min(len(hidden), 4096)
    logits = torch.empty(chunk, len(head), dtype=head.dtype, device=head.device)

    def step():
        dx, dw = torch.empty_like(hidden), torch.zeros_like(head)
        for x, out in zip(hidden.split(chunk), dx.split(chunk), strict=True):
            z = torch.mm(x, head.T, out=logits[: len(x)])
            torch.mm(z, head, out=out)
            dw.addmm_(z.T, x)
        return dx, dw
    return step


def ourselves(args, old) -> dict:
    fused = lambda *a, **k: linear_policy_loss(*a, **k)[0]
    return {"products alone": three_products(args), "fused": of(fused, args, old_logps=old), "plain": of(plain_loss, args, old_logps=old),
            "plain, compiled": of(torch.compile(plain_loss), args, old_logps=old)}


@contextlib.contextmanager
def _if_installed():
    try:
        yield
    except ImportError as e:
        print(f"  left out: {' '.join(str(e).split())[:100]}")


def peers(args, old) -> dict:
    """Steps of the other fused heads that can be imported. Those that give log-probs get this project's loss on top."""
    hidden, head, targets, advantages, weights = args

    def on_top(logps_of):
        return of(lambda h, w, t, a, k: (k * policy_loss(logps_of(h, w, t), None, a, old_logps=old)[0]).sum(), args)

    found = {}
    with _if_installed():
        from trl.kernels import ChunkedLogProbFunction
        found["TRL"] = on_top(lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 32768, None, 1.0, ("entropy",))[0])
    with _if_installed():
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        liger = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, compiled=hidden.is_cuda)
        by_sequence = lambda x: x.view(-1, LENGTH)
        found["Liger GRPO"] = of(lambda h, w, t, a, k: liger(h.view(-1, LENGTH, h.shape[1]), w, by_sequence(t), by_sequence(k != 0).float(),
                                                             by_sequence(a)[:, 0], old_per_token_logps=by_sequence(old))[0], args)
    with _if_installed():
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled
        found["Liger scaled CE"] = on_top(lambda h, w, t: -Scaled.apply(h, w, t, 1.0, -100, 1, True)[0])
    with _if_installed():
        from cut_cross_entropy import linear_cross_entropy
        for kind in ("cce", "cce_exact"):
            found[kind.upper()] = on_top(lambda h, w, t, kind=kind: -linear_cross_entropy(h, w, t, reduction="none", impl=kind))
    with _if_installed():
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as verl
        found["verl Triton"] = on_top(lambda h, w, t: verl(h, w, t, 1.0, "none")[0])
    return found


# ---- Tables ----


def table(steps: dict, args, old, rounds: int) -> list[dict]:
    """Print and return a row per contestant: milliseconds, share of the ceiling, memory, gradient error against float64."""
    cuda, rows = args[0].is_cuda, []
    wide = [x.detach().double().requires_grad_(i < 2) if x.is_floating_point() else x for i, x in enumerate(args)]
    loss, exact = linear_policy_loss(*wide, old_logps=old.double())
    want = torch.autograd.grad(loss, wide[:2])
    logps = linear_logps(*args[:3])[0]
    print(f"  largest error of the fused log-probs: {(logps - exact.logps)[~exact.logps.isnan()].abs().max().item():.0e}")
    for name, step in list(steps.items()):
        try:  # the first call also compiles
            step(), step()
        except Exception as e:  # a peer without its compiler or GPU: said, and the others still have a table
            if name in ("products alone", "fused", "plain"):
                raise
            print(f"  {name:16} does not run here: {type(e).__name__}: {' '.join(str(e).split())[:100]}")
            del steps[name]
    seconds = race(steps, rounds, cuda)
    for name, step in steps.items():
        share = median([alone / own for alone, own in zip(seconds["products alone"], seconds[name], strict=True)])  # round by round
        row = {"name": name, "ms": 1e3 * median(seconds[name]), "share": share, "MB": weigh(step, cuda) / 2**20}
        line = f"  {name:16} {row['ms']:9.1f} ms  {row['share']:4.0%} of the ceiling"
        if name != "products alone":
            row["error"] = max(((got.double() - x).norm() / x.norm()).item() for got, x in zip(step(), want, strict=True))
            line += f"  {row['MB']:7.0f} MB  gradient error {row['error']:.0e}"
        print(line, flush=True)
        rows.append(row)
    return rows


def rl_batch(args):
    """A quarter of the sequences masked, half of all without signal."""
    hidden, head, targets, advantages, weights = args
    sequence = torch.arange(len(targets), device=targets.device) // LENGTH
    return hidden, head, targets, advantages * (sequence % 2 == 0), weights * (sequence % 4 != 1)


def sweep(args, old, rounds: int) -> list[dict]:
    """Rows per chunk: milliseconds and scratch memory of the fused loss."""
    cuda, rows = args[0].is_cuda, []

    def fused(chunk):
        return of(lambda *a: linear_policy_loss(*a, old_logps=old, chunk=chunk)[0], args)

    steps = {chunk: fused(chunk) for chunk in ((512, 1024, 2048, 4096, 8192) if cuda else (64, 128, 256, 512))}
    for step in steps.values():  # the first call compiles
        step()
    for chunk, seconds in race(steps, rounds, cuda).items():
        rows.append({"chunk": chunk, "ms": 1e3 * median(seconds), "MB": weigh(steps[chunk], cuda) / 2**20})
        print("  chunk {chunk:6d}  {ms:9.1f} ms  {MB:7.0f} MB".format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, weigh and check the fused loss on this machine.")
    parser.add_argument("--shape", default="", help="N,D,V: tokens (a multiple of 64), width, vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="tokens per chunk instead of the contestants")
    parser.add_argument("--json", default="", help="file for the figures")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    N, D, V = map(int, options.shape.split(",")) if options.shape else (16384, 2048, 151936) if cuda else (1024, 128, 8192)
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print("The fused loss against autograd on all logits, float64:")
    check()
    found = {"machine": machine, "torch": torch.__version__, "shape": [N, D, V], "dtype": str(dtype)}
    print(f"Forward and backward on {machine}, torch {torch.__version__}, N={N} D={D} V={V} {dtype}")
    for kind in ("random", "peaked", "rl batch"):
        print(f"{kind} data:")
        args, old = toy(N, D, V, dtype, device, peaked=kind != "random", length=LENGTH)
        args = rl_batch(args) if kind == "rl batch" else args
        if options.sweep:
            found[kind] = sweep(args, old, options.rounds)
        else:
            found[kind] = table(ourselves(args, old) | peers(args, old), args, old, options.rounds)
        if options.json:  # after each table: a run that is cut keeps what it has
            Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
