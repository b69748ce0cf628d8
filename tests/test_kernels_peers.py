"""kernels.py against the losses that others train with: TRL's GRPOTrainer and Liger's fused GRPO loss, on the same inputs.

They are not needed for anything else: `pip install -r tests/requirements-peers.txt`, or these tests are skipped.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_policy_loss

B, T, D, V = 4, 6, 5, 23
LENGTHS = [6, 4, 1, 5]


def batch():
    """B completions of up to T tokens as the peers want them: [B, T], padded at the right."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden, head = (1.5 * draw(B * T, D)).requires_grad_(), draw(V, D).requires_grad_()
    targets, advantages = torch.randint(V, (B, T), generator=g), draw(B)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double()  # [B, T]
    logps = (hidden @ head.T).log_softmax(-1).gather(1, targets.view(-1, 1)).view(B, T).detach()
    old, ref, behavior = (logps + 0.4 * draw(B, T) for _ in range(3))
    return hidden, head, targets, advantages, mask, old, ref, behavior


# (ours, TRL's, Liger's). Both call 1 + eps_high "epsilon_high" for cispo, and clip nothing below.
CASES = {
    "clip": ({}, {}, {}),
    "clip_higher": ({"eps_low": 0.1, "eps_high": 0.4}, {"epsilon_low": 0.1, "epsilon_high": 0.4},
                    {"epsilon_low": 0.1, "epsilon_high": 0.4}),
    "dual_clip": ({"dual_clip": 1.5}, {"delta": 1.5}, {"delta": 1.5}),
    "kl": ({"kl_coef": 0.3}, {"beta": 0.3}, {"beta": 0.3}),
    "cispo": ({"kind": "cispo", "eps_low": 1.0, "eps_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3},
              {"loss_type": "cispo", "epsilon_high": 1.3}),
    "gspo": ({"gspo": True}, {"importance_sampling_level": "sequence"}, {"importance_sampling_level": "sequence"}),
    "tis": ({"tis_cap": 1.3}, {"tis": 1.3}, {"tis": 1.3}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}, {"temperature": 0.7}),
    "all": ({"dual_clip": 1.5, "kl_coef": 0.2, "tis_cap": 1.3, "temperature": 1.4},
            {"delta": 1.5, "beta": 0.2, "tis": 1.3, "temperature": 1.4},
            {"delta": 1.5, "beta": 0.2, "tis": 1.3, "temperature": 1.4}),
}
DEFAULTS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": None, "beta": 0.0, "loss_type": "dapo",
            "importance_sampling_level": "token", "temperature": 1.0}


def ours(gspo=False, **options):
    hidden, head, targets, advantages, mask, old, ref, behavior = batch()
    ids = torch.arange(B).repeat_interleave(T) if gspo else None
    given = {"old_logps": old.flatten(), "ref_logps": ref.flatten(), "behavior_logps": behavior.flatten(), "sequence_ids": ids}
    loss, _ = linear_policy_loss(hidden, head, targets.flatten(), advantages.repeat_interleave(T), mask.flatten() / mask.sum(),
                                 **given, **options, chunk=7)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def trls(tis=None, entropy_coef=0.0, **options):
    """GRPOTrainer._compute_loss itself, on a trainer that is nothing but its options."""
    trainer_class = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed: pip install -r tests/requirements-peers.txt").GRPOTrainer
    o = DEFAULTS | options
    hidden, head, targets, advantages, mask, old, ref, behavior = batch()

    def logps_and_entropies(*args, **kwargs):
        log_p = F.log_softmax(hidden @ head.T / o["temperature"], dim=-1)
        logps, entropy = log_p.gather(1, targets.view(-1, 1)).view(B, T), -(log_p.exp() * log_p).sum(-1).view(B, T)
        return logps, entropy, None

    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies = logps_and_entropies
    trainer.configure_mock(aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=o["beta"],
                           importance_sampling_level=o["importance_sampling_level"], loss_type=o["loss_type"],
                           epsilon_low=o["epsilon_low"], epsilon_high=o["epsilon_high"], use_vllm=tis is not None,
                           vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
                           _entropy_bonus_enabled=bool(entropy_coef), entropy_coef=entropy_coef, use_adaptive_entropy=False)
    trainer.args = SimpleNamespace(delta=o["delta"], use_bias_correction_kl=False, steps_per_generation=1)
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda x: x
    trainer.model.training = True
    inputs = {"prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": targets, "completion_mask": mask,
              "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
              "importance_sampling_ratio": (old - behavior).exp().clamp(max=tis) if tis else None}
    loss = trainer_class._compute_loss(trainer, None, inputs)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def ligers(tis=None, **options):
    ops = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed: pip install -r tests/requirements-peers.txt")
    o = DEFAULTS | options
    hidden, head, targets, advantages, mask, old, ref, behavior = batch()
    loss_function = ops.LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=bool(o["beta"]), chunk_size=1, **o)
    loss, *_ = loss_function(hidden.view(B, T, D), head, targets, mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old,
                             vllm_is_ratio=(old - behavior).exp().clamp(max=tis) if tis else None)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


@pytest.mark.parametrize("name", CASES)
def test_contract_12_same_as_trl(name):
    """Value and both gradients of TRL 1.16's trainer, in float64."""
    mine, theirs, _ = CASES[name]
    for a, b in zip(ours(**mine), trls(**theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_contract_12_same_entropy_bonus_as_trl():
    """TRL's bonus is a mean over tokens, as ours is with weights of 1/tokens."""
    for a, b in zip(ours(entropy_coef=0.2), trls(entropy_coef=0.2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_contract_12_same_as_liger(name):
    """Value and both gradients of Liger 0.8.5's fused loss. It works in float32 inside."""
    mine, _, theirs = CASES[name]
    for a, b in zip(ours(**mine), ligers(**theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, check_dtype=False)
