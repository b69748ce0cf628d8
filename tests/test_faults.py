"""Faults around a run: environments that fail, models that do not fit. What does the person see?

A full disk and Ctrl-C are in test_resume.py, tools in test_tools.py, gradients in test_grpo.py, and
bad options in test_train.py.
"""

import gzip
import json
from collections import defaultdict

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agent import INSTRUCTIONS, small_tokenizer

FAULTY = '''
from itertools import count


class Attempt:
    """The reward depends on the number of the attempt. `every`: one attempt in so many fails."""

    numbers = count()

    def __init__(self, every: int = 4):
        self.every = every

    def reset(self, seed: int) -> str:
        self._answer, self._seed = None, seed
        self._number = next(self.numbers) if seed >= 10**6 else 0
        return f"Write. Number {seed}."

    def _fail(self, number):
        if self._seed >= 10**6 and number % self.every == 0:
            raise OSError("the server is gone")

    def final_answer(self, answer: str) -> None:
        """Answer.

        Args:
            answer: Letters
        """
        self._answer = answer

    def get_reward(self) -> float:
        return self._number * 7 % 10 / 10

    @property
    def done(self) -> bool:
        return self._answer is not None

    @property
    def state(self) -> str:
        return ""


class Reset(Attempt):
    def reset(self, seed: int) -> str:
        super().reset(seed)
        self._fail(seed)
        return f"Write. Number {seed}."


class Reward(Attempt):
    def get_reward(self) -> float:
        self._fail(self._number)
        return super().get_reward()
'''
OPTIONS = ["--env", "faulty.py:Attempt", "--steps", "3", "--eval-tasks", "2", "--group-size", "4",
           "--tasks-per-step", "4", "--max-turns", "2", "--max-new-tokens", "6", "--context", "300",
           "--save-every", "9"]


def tokenizer():
    return small_tokenizer(["Write. Number 1234567890.", INSTRUCTIONS,
                            "user system assistant tool error: your message was cut at"])


def save_model(folder, tokenizer, vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1, num_attention_heads=2, initializer_range=0.1,
                         pad_token_id=None, bos_token_id=None, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An environment and a model."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faulty.py").write_text(FAULTY)
    words = tokenizer()
    save_model(folder / "model", words, len(words))
    return folder


def lines(path):
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


# ---- environments ----


def test_an_environment_whose_reward_fails_leaves_the_group_and_is_counted(folder, here):
    """One broken reward ended a run of days. Counted as 0, it taught that the attempt was bad."""
    code, _, errors = here(folder, "--name", "reward", "--model", "model", *OPTIONS,
                           "--env", "faulty.py:Reward")
    assert code == 0, errors
    metrics, groups = lines(folder / "runs/reward/metrics.jsonl"), defaultdict(list)
    for e in lines(folder / "runs/reward/episodes.jsonl.gz"):
        groups[e["step"], e["group"]].append(e)
    failed = [e for group in groups.values() for e in group if e["error"]]
    assert 10 <= len(failed) <= 14
    assert len(failed) == round(sum(m["finish/error"] * 16 for m in metrics))
    assert {e["error"] for e in failed} == {"get_reward: OSError: the server is gone"}
    assert {e["advantage"] for e in failed} == {0}
    for group in groups.values():
        sound = [e for e in group if not e["error"]]
        mean = sum(e["reward"] for e in sound) / len(sound)
        assert len(group) == 4
        assert all(e["advantage"] == pytest.approx(e["reward"] - mean) for e in sound)
    assert all(m["grad_norm"] > 0 for m in metrics), "the others are learned from"
    assert all(m["reward"] > 0 for m in metrics)


def test_a_task_that_cannot_be_reset_is_passed_over(folder, here):
    """The run ended before its first episode: drawing tasks needs their text, and so a reset."""
    code, _, errors = here(folder, "--name", "reset", "--model", "model", *OPTIONS,
                           "--env", "faulty.py:Reset")
    assert code == 0, errors
    seeds = {e["seed"] for e in lines(folder / "runs/reset/episodes.jsonl.gz")}
    assert len(seeds) == 12 and all(seed % 4 for seed in seeds)


ALWAYS = {
    "Reset": "20 seeds failed in a row, at last: Reset.reset(1000019) raised OSError: the server is gone",
    "Reward": "the environment failed in every episode of step 1: "
              "get_reward: OSError: the server is gone",
}


@pytest.mark.parametrize(("where", "said"), ALWAYS.items())
def test_an_environment_that_always_fails_ends_the_run_with_one_line(folder, here, where, said):
    """A run went on for days with nothing to learn from, and its learning rate fell to 0."""
    code, _, errors = here(folder, "--name", f"no{where}", "--model", "model", *OPTIONS,
                           "--env", f"faulty.py:{where}:every=1")
    own_lines = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    assert code == 2 and own_lines == [f"train.py: {said}"] and "Traceback" not in errors
    assert (folder / "runs" / f"no{where}" / "checkpoints" / "step-000000").exists()


# ---- models ----


def test_a_model_without_a_pad_token_and_with_more_tokens_than_its_tokenizer(folder, here):
    """Vocabularies are rounded up for GPUs. Tokens the tokenizer lacks are trained like others."""
    words = tokenizer()
    words.pad_token = None
    save_model(folder / "wide", words, len(words) + 300)
    code, _, errors = here(folder, "--name", "wide", "--model", "wide", *OPTIONS)
    assert code == 0, errors
    episodes = lines(folder / "runs/wide/episodes.jsonl.gz")
    unknown = [i for e in episodes for s in e["segments"] for i in s["ids"] if i >= len(words)]
    assert len(unknown) > 50 and set(words.convert_ids_to_tokens(unknown)) == {None}
    assert any(m["grad_norm"] > 0 for m in lines(folder / "runs/wide/metrics.jsonl"))


def test_a_model_that_cannot_be_used_is_refused_in_one_line(folder, here):
    words = tokenizer()
    save_model(folder / "narrow", words, len(words) - 1)
    words.chat_template = None
    save_model(folder / "base", words, len(words))
    reasons = {
        "base": "the tokenizer has no chat template: use an instruction-tuned model",
        "narrow": f"the model knows {len(words) - 1} tokens and its tokenizer has {len(words)}",
    }
    for model, said in reasons.items():
        code, _, errors = here(folder, "--name", model, "--model", model, *OPTIONS)
        assert code == 2 and f"train.py: {said}" in errors and "Traceback" not in errors
        assert not (folder / "runs" / model).exists()


def test_a_model_that_has_diverged_ends_the_run_with_one_line(folder, here):
    """Sampling from NaN gives token 0 for ever, which looks like a run."""
    code, _, errors = here(folder, "--name", "high", "--model", "model", *OPTIONS, "--lr", "1e30")
    assert code == 2 and "Traceback" not in errors
    assert "train.py: the model's logits are not finite: has the run diverged?" in errors
