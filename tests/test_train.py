"""train.py: the run as a person meets it: its folder, its errors, going on after a stop, and that something is learned.

Everything runs as a command in a folder of its own, at a size of seconds; the learning test takes about a minute.
"""

import asyncio
import dataclasses
import doctest
import gzip
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import evidence
import pytest
import torch

import train
from agent import Episode, Segment, small_tokenizer
from grpo import GRPOConfig, make_rows
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
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


# ---- the folder ----


def test_a_run_leaves_what_the_readme_promises(finished):
    run = finished[0] / "runs" / "whole"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "episodes.jsonl.gz", "metrics.jsonl", "model", "run.json",
                                                     "scores.json", "summary.json"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000000", "step-000002", "step-000004"]
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    wanted = {"seconds", "reward", "success", "success/calculator:digits=1", "reward_std", "no_signal", "entropy", "ratio_max", "clipped",
              "kl_to_sampler", "grad_norm", "lr", "turns", "tool_calls", "tool_errors", "sampled_tokens", "context_tokens",
              "tokens_per_second", "trained_tokens", "no_signal_tokens", "error_tokens", "skipped_tokens",
              "behaviour/calculator:digits=1/calls"}
    assert wanted <= set(metrics[0])
    reasons = ("trained", "no_signal", "error", "skipped", "abandoned")
    for m in metrics:
        assert m["sampled_tokens"] == sum(m[f"{reason}_tokens"] for reason in reasons) > 0
    summary = json.loads((run / "summary.json").read_text())
    scores = json.loads((run / "scores.json").read_text())["after"]["calculator:digits=1"]["sampled"]
    assert set(summary) == {"before", "after", "seed", "warmup_seconds", "versions"} and summary["warmup_seconds"] > 0
    after = summary["after"]["calculator:digits=1"]
    assert len(scores) == 4 == after["tasks"] and sum(scores) / 4 == after["sampled"]
    for when in ("before", "after"):
        assert set(summary[when]["calculator:digits=1"]) == {"sampled", "interval", "greedy", "tasks"}


def test_every_episode_is_kept_token_by_token(finished):
    """Lists of different lengths in one record: the first sign of a mask that slipped."""
    episodes = lines(finished[0] / "runs" / "whole" / "episodes.jsonl.gz")
    assert len(episodes) == 4 * 2 * 4
    for e in episodes:
        for s in e["segments"]:
            assert len({len(s[name]) for name in ("ids", "sampled", "logps", "turn")}) == 1
            assert all((logp != 0) <= sampled for logp, sampled in zip(s["logps"], s["sampled"]))


def test_episodes_are_read_back_as_they_were(tmp_path, monkeypatch, capsys):
    """By the lines in the docstring of `record`: every Segment, every log-prob to the last bit, and the text."""
    monkeypatch.chdir(tmp_path)
    tokenizer, rng = small_tokenizer(["what is it"]), random.Random(0)
    tokenizer.save_pretrained("runs/0/checkpoints/step-000000")
    episodes = [Episode(reward=0.25), Episode(reward=1.0)]
    for e in episodes:
        first, second = Segment(), Segment()
        for turn in range(3):
            first.extend(tokenizer.encode("what is it"), turn - 1)
            first.extend([rng.randrange(260) for _ in range(5)], turn, [math.log(rng.random()) for _ in range(5)])
        second.extend(first.ids[-9:], 2)
        e.segments = [first, second]
    for e in episodes:
        train.append(Path("runs/0", train.EPISODES), [train.record(e, 0.5, 1)])
    reader = textwrap.dedent(inspect.getdoc(train.record).split("\n\n")[2])
    names = {"AutoTokenizer": train.AutoTokenizer, "Segment": Segment, "gzip": gzip, "json": json, "found": []}
    exec(reader + "\n    found.append(segments)", names)
    assert names["found"] == [e.segments for e in episodes]
    assert "0.25 what is it" in capsys.readouterr().out


def test_what_every_attempt_repeats_is_compressed_away(tmp_path):
    """The prompt, the marks, the turns: the default run wrote 98 MB. A log-prob needs 8 bytes, a new token 2."""
    prompt, step, rng = [*range(200)], [], random.Random(0)
    for _ in range(64):
        segment = Segment()
        segment.extend(prompt, -1)
        for turn in range(3):
            segment.extend([rng.randrange(1000) for _ in range(15)], turn, [math.log(rng.random()) for _ in range(15)])
            segment.extend([rng.randrange(1000) for _ in range(15)], turn)
        step.append(train.record(Episode(segments=[segment]), 0.0, 1))
    train.append(tmp_path / train.EPISODES, step)
    new = 64 * (45 * 8 + 90 * 2)
    assert (tmp_path / train.EPISODES).stat().st_size < 1.5 * new < 0.2 * len(json.dumps(step))


def test_the_model_loads_as_a_hugging_face_folder_and_is_scored_again(finished, here):
    """--eval-only on the finished run gives the very numbers of its summary."""
    folder = finished[0]
    code, out, _ = here(folder, "--eval-only", "runs/whole", "--eval-tasks", "4")
    assert code == 0
    after = json.loads((folder / "runs/whole/summary.json").read_text())["after"]["calculator:digits=1"]
    sampled, greedy = (float(x) / 100 for x in re.search(r"sampled +([\d.]+)%.*greedy +([\d.]+)%", out).groups())
    assert (sampled, greedy) == (after["sampled"], after["greedy"])


def test_the_evidence_counts_each_task_once(finished, monkeypatch, capsys):
    """Three seeds on the same 200 tasks passed for 600 tasks: intervals were too narrow. And settings were chosen on these tasks."""
    assert doctest.testmod(evidence).failed == 0
    seed = [1] * 150 + [0] * 50
    assert evidence.cell([seed, seed, seed]).startswith(evidence.cell([seed])), "three times the same says no more"
    monkeypatch.chdir(finished[0])
    monkeypatch.setattr(sys, "argv", ["evidence.py", "runs/whole"])
    monkeypatch.setattr(train, "imitate", lambda *_: None)  # it takes minutes
    evidence.main()
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| calculator | ") and row.count("%") == 6 and row.endswith(" | not run | 100.0% [51.0, 100.0] |")
    (finished[0] / "runs/whole/final.json").unlink()


# ---- the optimizer ----


def test_the_warm_start_s_optimizer_moves_every_weight_once():
    """Muon has the layers' matrices, AdamW the rest, and each weight is in exactly one; a given model is AdamW's alone."""
    model = small_model(32)
    optimizer = train.Imitator(model, train.resolve(train.Config()))
    owned = [*optimizer.averages, *optimizer.adam.param_groups[0]["params"]]
    assert len({id(p) for p in owned}) == len(owned) == len(list(model.parameters()))
    assert {p.ndim for p in optimizer.averages} == {2}

    before = [p.clone() for p in model.parameters()]
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.param_groups[0]["lr"] = 6e-3
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters()))
    assert not train.Imitator(model, train.resolve(train.Config(model="some/model"))).averages


def test_the_warm_start_s_learning_rate_rises_for_twenty_steps_and_falls_to_a_tenth():
    shares = [train.warmup_share(step, 200) for step in (1, 20, 200)]
    assert shares == pytest.approx([0.05 * 0.9955, 0.91, 0.1])
    assert max(train.warmup_share(step, 12) for step in range(1, 13)) < 1 / 6


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
    (["--env", "calculator:digit=2"], "calculator takes NAME=VALUE of (digits: int = 3"),
    (["--env", "missing.py:Mine"], "missing.py cannot be loaded: FileNotFoundError"),
    (["--model", "not/a/folder"], "no causal language model at 'not/a/folder'"),
    (["--resume", "runs/none"], "no run at 'runs/none'"),
    (["--eval-only", "runs/none"], "no run at 'runs/none'"),
    (["--env", "calculator", "--context", "100"], "do not fit --context 100"),
    (["--kind", "magic"], "invalid choice: 'magic'"),
    (["--eval-tasks", "0"], "--eval-tasks 0: want a number of at least 1"),
    (["--save-every", "0"], "--save-every 0: want a number of at least 1"),
    (["--lr", "nan"], "--lr nan: want a number of at least 0"),
    (["--temperature", "0"], "--temperature 0.0: want a number of at least 0.01"),
    (["--env", "calculator", "--max-new-tokens", "6"], "calculator: its demonstrator fails: a message of 18 tokens is longer than"),
]


@pytest.mark.parametrize("words, said", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_2(tmp_path, here, words, said):
    code, _, errors = here(tmp_path, *words)
    assert code == 2 and said in errors and "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("train.py: ")]) == 1
    assert not (tmp_path / "runs").exists(), "what cannot start leaves nothing behind"


@pytest.mark.parametrize("option", [f for f in dataclasses.fields(train.Config) if {"int", "float"} & {*re.findall(r"\w+", str(f.type))}
                                    or f.type in (int, float)], ids=lambda f: f.name)
def test_no_number_may_be_negative_or_nan(option):
    """A run was over after the warm start, with a traceback: ZeroDivisionError, or a step that never came."""
    train.check_options(train.Config())
    for value in [-1, *([math.nan, math.inf] if "float" in str(option.type) else [])]:
        with pytest.raises(train.UserError, match=f"--{option.name.replace('_', '-')} {value}: want "):
            train.check_options(train.Config(**{option.name: value}))


LATE = '''
class Late:
    """Its demonstrator writes long messages, but only for tasks of the warm start."""

    state = ""

    def reset(self, seed: int) -> str:
        self.seed, self.done = seed, False
        return f"Number {seed}."

    def say(self, word: str) -> str:
        """Say a word.

        Args:
            word: The word
        """
        self.done = True
        return "Thank you."

    def get_reward(self) -> float:
        return float(self.done)


def demonstrate_late(env, random):
    yield "word " * (40 if env.seed < 10**9 else 80)
    while True:
        yield '<tool_call>{"name": "say", "arguments": {"word": "yes"}}</tool_call>'
'''


def test_a_message_of_a_demonstrator_that_is_too_long_gives_one_line(tmp_path, here):
    """Wherever it is. Only the first ten tasks were tried: the run ended with a traceback."""
    (tmp_path / "late.py").write_text(LATE)
    code, _, errors = here(tmp_path, *SMALL, "--env", "late.py:Late", "--context", "600")
    assert code == 2 and "Traceback" not in errors
    assert "train.py: late.py:Late: its demonstrator fails: a message of " in errors


def test_without_a_warm_start_no_demonstrator_is_asked(tmp_path, here):
    (tmp_path / "late.py").write_text(LATE)
    words = ["--env", "late.py:Late", "--context", "600", "--warmup-steps", "0"]
    code, out, errors = here(tmp_path, *SMALL, *words, "--max-new-tokens", "8")
    assert code == 0 and "no demonstrations: no warm start" in out, errors


def test_an_environment_that_is_named_twice_counts_once():
    config = train.resolve(train.Config(env=["maze", "calculator", "maze"]))
    assert config.env == ["maze", "calculator"]


# ---- options that depend on the model ----


def test_a_given_model_is_trained_with_smaller_steps(capsys):
    """SmolLM2-135M was trained with the small model's learning rate, 5 times too high; its warm start's was 60 times too high."""
    small, given = train.resolve(train.Config()), train.resolve(train.Config(model="some/model"))
    assert (small.lr, small.warmup_lr, small.epochs) == (2.5e-4, 6e-3, 3)
    assert (given.lr, given.warmup_lr, given.epochs) == (5e-5, 1e-4, 1)
    assert train.resolve(train.Config(model="some/model", lr=1e-6)).lr == 1e-6, "what the user says holds"
    assert None not in [getattr(given, name) for name in train.GIVEN_MODEL] and train.resolve(given) == given


def test_a_run_says_and_keeps_the_options_it_resolved(finished):
    folder, out = finished
    config = json.loads((folder / "runs/whole/run.json").read_text())["config"]
    assert config["lr"] == 2.5e-4 and config["negative_weight"] == 0.1 and config["slots"] == 8
    assert "options: lr 0.00025, epochs 3, temperature 1.1, warmup_lr 0.006, warmup_steps 6, " in out


def test_a_tool_gets_the_seconds_it_is_given():
    """In demonstrations, too: there it was the default."""
    window = SimpleNamespace(expect=lambda task: None)
    engine, seen = SimpleNamespace(forget=lambda: None, window=window, slots=1, drain=drain), []
    player = train.Player(lambda *_, **options: seen.append(options) or FakeAgent())
    config = train.resolve(train.Config(env=["calculator"], tool_timeout=0.5))
    setup = train.Setup(config, train.make_envs(config), player, engine=engine)
    train.roll_out(setup, [("calculator", 0)], step=1, size=1, temperature=1.0)
    train.demonstrations(setup, {"calculator": 1}, start=0)
    assert [options["tool_timeout"] for options in seen] == [0.5, 0.5]


class FakeAgent:
    async def run(self, *_):
        return Episode()


async def drain():
    """Of the fake engine: it has no requests."""


@pytest.mark.parametrize("config, weight", [
    (train.Config(), 0.1), (train.Config(env=["maze:size=4"]), 0.1), (train.Config(model="some/model"), 1.0),
    (train.Config(env=["calculator", "my_env.py:Mine"]), 1.0),
    (train.Config(env=["my_env.py:Mine"], negative_weight=0.5), 0.5)])
def test_failures_weigh_less_only_where_the_small_model_learns_built_in_tasks(config, weight):
    assert train.resolve(config).negative_weight == weight


def expected_reward_learned(negative_weight):
    """Of a policy with two actions: a sure reward of 0.6, or 1 with probability 0.4. By the exact mean gradient over groups of 4."""
    config, outcomes = GRPOConfig(negative_weight=negative_weight), []
    for group in itertools.product((0.6, 1.0, 0.0), repeat=4):  # every outcome of four attempts
        episodes = [Episode(segments=[Segment([0, 1], [False, True], [0.0, 0.0], [-1, 0])], reward=r, turns=1) for r in group]
        rows, _, _ = make_rows(episodes, config)
        outcomes.append((group, {row.episode: row.advantages[0] for row in rows}))
    logit = 0.0
    for _ in range(300):
        risky = 1 / (1 + math.exp(-logit))
        chance = {0.6: 1 - risky, 1.0: 0.4 * risky, 0.0: 0.6 * risky}
        gradient = 0.0
        for group, advantages in outcomes:
            of_group = sum(a * ((group[i] != 0.6) - risky) for i, a in advantages.items())
            gradient += math.prod(chance[r] for r in group) * of_group
        logit += gradient
    return 0.4 * risky + 0.6 * (1 - risky)


def test_weighing_failures_less_seeks_risk():
    """A sure 0.6 is better than 1 with probability 0.4. With a weight of 0.1 the policy learns the worse one."""
    assert expected_reward_learned(1.0) > 0.59
    assert expected_reward_learned(0.1) < 0.45


# ---- two runs in one place ----


def test_of_two_runs_that_start_together_each_gets_its_own_folder(tmp_path, monkeypatch):
    """Both took number 0, the second removed the first's folder, and both ended with exit code 0."""
    monkeypatch.chdir(tmp_path)
    Path("runs/0").mkdir(parents=True)
    Path("runs/0/run.json").touch()
    first, second = train.make_run(train.Config(seed=1)), train.make_run(train.Config(seed=2))
    assert [str(first), str(second)] == ["runs/1", "runs/2"] and Path("runs/0/run.json").read_text() == ""
    assert [json.loads((run / "run.json").read_text())["config"]["seed"] for run in (first, second)] == [1, 2]
    train.make_run(train.Config(name="mine"))
    with pytest.raises(train.UserError, match="runs/mine exists: choose another --name, or "):
        train.check_options(train.Config(name="mine"))
    with pytest.raises(train.UserError, match="cannot write runs/mine: "):  # if it appears only now
        train.make_run(train.Config(name="mine"))
    assert sorted(os.listdir("runs")) == ["0", "1", "2", "mine"]


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


# ---- learning ----


def test_recall_cannot_be_answered_from_the_window_of_the_default_run():
    """Even if nothing is noted, so that more pages fit: else what is learned there would not be memory."""
    config = train.resolve(train.Config(env=["recall"]))
    factories = train.make_envs(config)
    chat = train.Chat(train.learn_tokenizer(train.Setup(config, factories)))
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


def test_each_environment_has_its_share_and_no_task_comes_twice():
    """Whether or not the environments divide the tasks of a step: over three steps of two, each of three has two."""
    config = train.resolve(train.Config(env=["calculator", "maze", "chain"], tasks_per_step=2))
    setup, steps = train.Setup(config, train.make_envs(config)), []
    progress = train.Progress(before={})
    for step in range(3):
        progress.step = step
        tasks = train.choose_tasks(setup, progress)
        progress.next_seed.update((env, seed + 1) for env, seed in tasks)
        steps.append(tasks)
    assert [[env for env, _ in tasks] for tasks in steps] == [["calculator", "maze"], ["calculator", "chain"], ["maze", "chain"]]
    assert len({task for tasks in steps for task in tasks}) == 6
    assert all(seed >= train.TRAINING_SEEDS for tasks in steps for _, seed in tasks)


def test_tasks_are_shared_out_evenly():
    config = train.resolve(train.Config())
    tasks = train.choose_tasks(train.Setup(config, train.make_envs(config)), train.Progress({}))
    assert Counter(env for env, _ in tasks) == dict.fromkeys(config.env, 3)


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
    summary = json.loads((tmp_path / "runs/short/summary.json").read_text())
    before, after = (summary[when]["calculator:digits=2"]["sampled"] for when in ("before", "after"))
    assert before <= 0.5
    assert after >= before + 0.25, (before, after)


LEARNING = ["--env", "calculator:digits=2", "--warmup-steps", "120", "--steps", "12", "--eval-tasks", "60"]
