"""train.py: the run as a person meets it: its folder, its errors, going on after a stop, and that something is learned.

Everything runs as a command in a folder of its own, at a size of seconds; the learning test takes about a minute.
"""

import asyncio
import doctest
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import train
from agent import Episode
from rollout import small_model
from tools import format_call

ROOT = Path(__file__).parent.parent
MODULES = ["agent", "env", "tools", "memory", "rollout", "grpo", "kernels", "train"]
SMALL = ["--env", "calculator:digits=1", "--warmup-steps", "6", "--steps", "4", "--save-every", "2", "--eval-tasks", "4",
         "--tasks-per-step", "2", "--group-size", "4"]


def command(*words, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small run: (folder it was started in, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    out = command(ROOT / "train.py", "--name", "whole", *SMALL, cwd=folder)
    assert out.returncode == 0, out.stderr
    return folder, out.stdout


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the folder ----


def test_a_run_leaves_what_the_readme_promises(finished):
    run = finished[0] / "runs" / "whole"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "episodes.jsonl", "metrics.jsonl", "model", "run.json",
                                                     "scores.json", "summary.json"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000000", "step-000002", "step-000004"]
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    wanted = {"seconds", "reward", "success", "success/calculator:digits=1", "reward_std", "no_signal", "entropy", "ratio_max", "clipped",
              "kl", "grad_norm", "lr", "turns", "tool_calls", "tool_errors", "sampled_tokens", "context_tokens", "tokens_per_second",
              "behaviour/calculator:digits=1/calls"}
    assert wanted <= set(metrics[0])
    summary = json.loads((run / "summary.json").read_text())
    scores = json.loads((run / "scores.json").read_text())["after"]["calculator:digits=1"]["sampled"]
    assert len(scores) == 4 and sum(scores) / 4 == summary["environments"]["calculator:digits=1"]["after"]
    assert set(summary["environments"]["calculator:digits=1"]) == {"before", "after", "before_greedy", "after_greedy", "ci_after", "tasks"}


def test_every_episode_is_kept_token_by_token(finished):
    """Lists of different lengths in one record: the first sign of a mask that slipped."""
    episodes = lines(finished[0] / "runs" / "whole" / "episodes.jsonl")
    assert len(episodes) == 4 * 2 * 4
    for e in episodes:
        for s in e["segments"]:
            assert len({len(s[name]) for name in ("ids", "tokens", "sampled", "logps", "turn")}) == 1
            assert all((logp != 0) <= sampled for logp, sampled in zip(s["logps"], s["sampled"]))


def test_the_model_loads_as_a_hugging_face_folder_and_is_scored_again(finished, here):
    """--eval-only on the finished run gives the very numbers of its summary."""
    folder = finished[0]
    code, out, _ = here(folder, "--eval-only", "runs/whole", "--eval-tasks", "4")
    assert code == 0
    after = json.loads((folder / "runs/whole/summary.json").read_text())["environments"]["calculator:digits=1"]
    sampled, greedy = (float(x) / 100 for x in re.search(r"sampled +([\d.]+)%.*greedy +([\d.]+)%", out).groups())
    assert (sampled, greedy) == (after["after"], after["after_greedy"])


# ---- the optimizer ----


def test_the_warm_start_s_optimizer_moves_every_weight_once():
    """Muon has the layers' matrices, AdamW the rest, and each weight is in exactly one; a given model is AdamW's alone."""
    model = small_model(32)
    optimizer = train.Imitator(model, train.Config())
    owned = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    assert len({id(p) for p in owned}) == len(owned) == len(list(model.parameters()))
    assert {p.ndim for group in optimizer.parts[1].param_groups for p in group["params"]} == {2}

    before = [p.clone() for p in model.parameters()]
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.set_lr(20)
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters()))
    assert len(train.Imitator(model, train.Config(model="some/model")).parts) == 1


def test_the_warm_start_s_learning_rate_rises_for_twenty_steps_and_falls_to_a_tenth():
    config = train.Config(env=["calculator"], warmup_steps=200)
    optimizer, rates = train.Imitator(small_model(32), config), []
    for step in (1, 20, 200):
        optimizer.set_lr(step)
        rates.append([group["lr"] / config.warmup_lr for part in optimizer.parts for group in part.param_groups])
    assert rates == [pytest.approx([share, share]) for share in (0.05 * 0.9955, 0.91, 0.1)]


# ---- Ctrl-C (test_resume.py has the rest of going on) ----


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(tmp_path):
    words = [sys.executable, str(ROOT / "train.py"), "--name", "long", *SMALL, "--steps", "500"]
    run = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    last = lines(metrics)[-1]["step"]
    assert f"stopped after step {last}. To go on: python train.py --resume runs/long" in errors and "Traceback" not in errors
    assert (tmp_path / "runs" / "long" / "checkpoints" / f"step-{last:06d}" / "trainer.pt").is_file()


# ---- bad input ----


BAD = [
    (["--env", "chess"], "unknown environment 'chess': choose from calculator, lookup"),
    (["--env", "calculator:digit=2"], "NAME one of digits"),
    (["--env", "calculator", "maze", "calculator"], "--env names calculator twice"),
    (["--env", "missing.py:Mine"], "no file missing.py"),
    (["--model", "not/a/folder"], "no causal language model at 'not/a/folder'"),
    (["--resume", "runs/none"], "no run at 'runs/none'"),
    (["--eval-only", "runs/none"], "no run at 'runs/none'"),
    (["--env", "calculator", "--context", "100"], "do not fit --context 100"),
    (["--kind", "magic"], "invalid choice: 'magic'"),
    (["--shard"], "--shard is for a model given by --model"),
    (["--shard", "--model", "m", "--dtype", "bfloat16"], "--shard is for a model given by --model, not in 16 bits"),
]


@pytest.mark.parametrize("words, said", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_2(tmp_path, here, words, said):
    code, _, errors = here(tmp_path, *words)
    assert code == 2 and said in errors and "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("train.py: ")]) == 1
    assert not (tmp_path / "runs").exists(), "what cannot start leaves nothing behind"


def test_a_name_that_exists_is_refused(finished, here):
    code, _, errors = here(finished[0], "--name", "whole", *SMALL)
    assert code == 2 and "runs/whole exists" in errors


# ---- lifting ----

LIFTS = {
    "kernels": (["kernels"], "import torch, kernels; print(kernels.linear_logps(torch.eye(2), torch.eye(2), torch.tensor([0, 1])))"),
    "grpo": (["grpo", "kernels"], "import grpo; assert grpo.advantages([1, 0], [0, 0]) == [0.5, -0.5]; grpo.GRPOConfig()"),
    "tools": (["tools"], "import tools; assert tools.calculator('6 * 7') == '42'"),
    "memory": (["memory"], "import memory; n = memory.Notes(); n.add('a b'); assert n.search('b') == ['a b']"),
    "agent": (["agent", "tools", "memory"], "import agent; assert agent.Chat(agent.small_tokenizer(['hello'])).prompt('hi', [])"),
}


@pytest.mark.parametrize("name", LIFTS)
def test_a_module_can_be_lifted(tmp_path, name):
    """Copied alone, with what it says it needs, into an empty folder."""
    files, use = LIFTS[name]
    for file in files:
        shutil.copy(ROOT / f"{file}.py", tmp_path)
    out = command("-c", use, cwd=tmp_path)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("name", ["tools", "memory", "env", "agent", "rollout"])
def test_every_module_runs_on_its_own(tmp_path, name):
    """kernels.py and grpo.py are run by their own tests."""
    out = command(ROOT / f"{name}.py", cwd=tmp_path, input="", timeout=120)
    assert out.returncode == 0 and out.stdout, out.stderr


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and tried > 0


def test_the_readmes_own_tool_and_environment_work(tmp_path, here):
    """The code blocks of the README that define an environment are run as they stand there, each under 20 lines."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for name, code in blocks:
        assert code.count("\n") < 20
        (tmp_path / name).write_text(code)
    code, _, errors = here(tmp_path, "--name", "mine", *SMALL, "--steps", "1", "--env", "buttons.py:Buttons", "wordy.py:Wordy")
    assert code == 0, errors
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").is_file()


# ---- learning ----


def test_recall_cannot_be_answered_from_the_window_of_the_default_run():
    """Even if nothing is noted, so that more pages fit: else what is learned there would not be memory."""
    config = train.Config(env=["recall"])
    factories = train.make_envs(config)
    chat = train.Chat(train.learn_tokenizer(factories, config))
    for seed in range(50):
        environment = factories["recall"]()
        environment.reset(seed)
        fact = next(fact for fact in environment._facts if fact.startswith(environment._person))
        script = [format_call("next_page")] * 5 + ["I do not know."]
        agent = train.Agent(train.Script(chat, script), chat, max_turns=config.max_turns, max_new_tokens=config.max_new_tokens,
                            context=config.context)
        episode = asyncio.run(agent.run(environment, seed))
        seen = [chat.tokenizer.decode(segment.ids) for segment in episode.segments]
        assert any(fact in text for text in seen[:-1]) and fact not in seen[-1] and "Where does" in seen[-1]


def test_the_tasks_of_a_step_go_where_attempts_fail():
    """And to every environment one, else what is forgotten would not be noticed."""
    assert train.share_out({"a": 1.0, "b": 1.0, "c": 0.0}, 6) == ["a", "b", *"cccc"]
    assert train.share_out({"a": 0.0, "b": 0.0}, 4) == ["a", "a", "b", "b"] and train.share_out({"a": 1.0, "b": 0.2}, 1) == ["b"]


def test_an_environment_gets_at_most_twice_its_even_share():
    """One in which nothing succeeded took 13 of 18 tasks, and taught nothing: its groups had no spread."""
    counts = Counter(train.share_out({"hopeless": 0.0, **dict.fromkeys("abcde", 0.95)}, 18))
    assert counts["hopeless"] == 6 and counts.total() == 18 and min(counts.values()) >= 2
    assert len(train.share_out(dict.fromkeys("abcdef", 0.0), 1)) == 1, "fewer tasks than environments"
    assert train.share_out({"only": 0.0}, 5) == ["only"] * 5


# ---- records ----


def test_episodes_that_report_different_things_are_averaged_where_they_do():
    """An environment that reports its moves only if there were some ended the run with a KeyError, before it was saved."""
    episodes = [Episode(env="maze", behaviour=b) for b in ({}, {"moves": 2.0}, {"moves": 4.0, "turns back": 1.0})]
    numbers = train.measure(episodes)
    assert numbers["behaviour/maze/moves"] == 3 and numbers["behaviour/maze/turns back"] == 1


def test_a_run_of_a_minute_learns(tmp_path):
    """Success on held-out tasks must rise by 25 points, sampled, by reinforcement learning alone: after the warm start."""
    out = command(ROOT / "train.py", "--name", "short", *LEARNING, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    scores = json.loads((tmp_path / "runs/short/summary.json").read_text())["environments"]["calculator:digits=2"]
    assert scores["before"] <= 0.5
    assert scores["after"] >= scores["before"] + 0.25, scores


LEARNING = ["--env", "calculator:digits=2", "--warmup-steps", "120", "--steps", "12", "--eval-tasks", "60"]
