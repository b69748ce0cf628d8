"""train.py's warm start: its optimizer, and what it must not do on a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import train
from rollout import Decoder


class Products(TorchDispatchMode):
    """Writes down the precision of every matrix product."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "attention")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in self.NAMES):
            self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return function(*args, **(kwargs or {}))


def test_no_matrix_product_of_a_default_run_is_in_16_bits(here, tmp_path, monkeypatch):
    """torch.optim.Muon multiplies in bfloat16. A CPU without such instructions emulates that: the warm start took 20 minutes.

    The mode sees one thread at a time, so it stands around each piece of work: updates of both kinds, and the engine's steps.
    """
    seen = {}

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            with Products() as products:
                result = function(*args, **kwargs)
            seen.setdefault(f"{owner.__name__}.{name}", set()).update(products.seen)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(train.Imitator, "step")
    watch(Decoder, "step")
    watch(grpo, "pack_gradient")
    words = "--env calculator:digits=1 --warmup-steps 3 --steps 1 --tasks-per-step 2 --group-size 4 --eval-tasks 2 --name bits"
    before = torch.get_num_threads()
    code, _, errors = here(tmp_path, *words.split())
    torch.set_num_threads(before)
    assert code == 0, errors
    assert seen == {"Imitator.step": {torch.float32}, "Decoder.step": {torch.float32},
                    "grpo.pack_gradient": {torch.float32}}


def imitator(shape):
    """The optimizer of a "model" with one matrix [M, N] in its layers, and a bias."""
    layers = torch.nn.Linear(*reversed(shape), dtype=torch.float64)
    model = SimpleNamespace(parameters=layers.parameters, base_model=SimpleNamespace(layers=layers))
    optimizer = train.Imitator(model, train.resolve(train.Config(env=["maze"])))
    layers.bias.grad = torch.zeros_like(layers.bias)
    optimizer.param_groups[0]["lr"] = 0.5
    return layers.weight, optimizer


def direction(p, optimizer, gradient):
    """Which way a step moves the matrix."""
    before, p.grad = p.detach().clone(), gradient
    optimizer.step()
    return (before - p.detach()) / (0.5 * 0.2 * max(p.shape) ** 0.5)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_moves_a_matrix_equally_far_in_all_directions(shape):
    """Outside oracle: torch's SVD. The step has the gradient's singular vectors, and singular values near 1 (times lr and scale)."""
    torch.manual_seed(0)
    gradient = torch.randn(shape, dtype=torch.float64)
    step = direction(*imitator(shape), gradient)
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    inside = u.T @ step @ vh.T  # [6, 6]
    assert torch.allclose(inside, inside.diagonal().diag(), atol=1e-9)
    assert (0.6 < inside.diagonal()).all() and (inside.diagonal() < 1.2).all()
    assert s.max() / s.min() > 2, "the gradient itself was far from that"


def test_muon_averages_gradients():
    """Nesterov's momentum: of gradients a, then b, the direction is 0.05 b + 0.95 of the average, which is 0.0475 a + 0.05 b."""
    a, b = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, optimizer = imitator((3, 4))
    direction(p, optimizer, a)
    momentum = 0.05 * b + 0.95 * (0.95 * 0.05 * a + 0.05 * b)
    assert torch.allclose(direction(p, optimizer, b), train.orthogonal(momentum), atol=1e-9)
