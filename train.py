"""The whole run: a model, a warm start, the RL loop, and evaluation on tasks it never saw.

    python train.py                                  # a small model, made here, learns six tasks
    python train.py --env calculator                 # one of them
    python train.py --model MODEL                    # a folder or hub id of a causal language model
    python train.py --env my_env.py:MyEnv            # an environment of yours
    python train.py --agent my_agent.py:solve        # an agent of yours (LangGraph, smolagents)
    python train.py --resume runs/0                  # go on after a crash or Ctrl-C
    python train.py --eval-only runs/0               # score a finished run
    torchrun --nproc-per-node 2 train.py             # several processes, one for each GPU

`train` reads like the algorithm:

    imitate demonstrations                           # learns the format; most of them fail the task
    repeat: choose tasks                             # choose_tasks
            roll out groups of episodes              # rollout.py, agent.py, env.py
            compare the episodes of each group       # grpo.make_rows
            update the weights                       # grpo.update
    evaluate on held-out tasks

A run leaves a folder runs/NAME: run.json (options), metrics.jsonl (a line per step),
episodes.jsonl.gz (every episode, token by token), checkpoints/, model/ (a Hugging Face folder),
scores.json (held-out successes, task by task) and, last of all, summary.json. A run may be killed
at any instant. When it is resumed, it ends with the same bits as a run that was never stopped, if
its tools are quick (`--rejoin-window`).

Several processes do the same things in the same order. Each plays its share of the episodes and
computes its share of an update. Only the first one writes.

Left out: a search for learning rates, and dashboards.
"""

import ctypes
import fcntl
import gzip
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain, count, cycle, islice
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import IO, Literal

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import env as environments
import grpo
from agent import Agent, Chat, Episode, OutsideAgent, Script, small_tokenizer, transcript
from env import ENVIRONMENTS, EnvError, demonstrator, seeds
from grpo import GRPOConfig, gather, option, ranks
from rollout import Endpoint, Engine, play, small_model
from tools import schema, tools_of

RUNS = Path("runs")
METRICS, EPISODES = "metrics.jsonl", "episodes.jsonl.gz"  # files of a run that grow with every step
KEEP = 3  # newest checkpoints that stay, beside the first

WARM_BATCH = 44  # demonstrations per update of the warm start
MOST_DEMONSTRATIONS = 12000  # different ones; after that they are shown again
# How often an environment is demonstrated, relative to the others. One that is hard to learn gets
# more demonstrations, and one with long messages gets fewer. Yours: as many as the calculator.
DEMONSTRATED = {"calculator": 12, "lookup": 7, "maze": 31, "chain": 20, "recall": 3,
                "mastermind": 4}

# What an episode costs, in optimizer steps of the warm start (measured in the default run).
STEPS_PER_EPISODE = 0.05

# Options whose best value depends on the model: one of random weights, or one that knows language.
SMALL_MODEL = {"lr": 2.5e-4, "epochs": 3, "temperature": 1.1, "warmup_lr": 6e-3,
               "warmup_steps": 110, "context": 336}
GIVEN_MODEL = {"lr": 5e-5, "epochs": 1, "temperature": 1.0, "warmup_lr": 1e-4,
               "warmup_steps": 12, "context": 700}


def train(config: "Config") -> None:
    """A new run, or the rest of one that was stopped. Raises UserError for bad input."""
    # ----------------------------------------------------------------------------------------------
    # The run's folder, the environments, the model

    if config.resume and is_finished(config):
        print(f"{config.resume} is finished: there is nothing to go on with")
        return
    clock, writes = Clock(), ranks()[0] == 0  # of several processes only the first one writes
    run, lock, setup, checkpoint = open_run(config, writes)
    config, model, tokenizer = setup.config, setup.model, setup.chat.tokenizer
    grpo.share_weights(model)
    weights = grpo.masters(model)
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    print(f"{run}: {sum(p.numel() for p in weights) / 1e6:.2f}M parameters, {config.device}, "
          f"environments {', '.join(config.env)}")
    print("options:", ", ".join(f"{name} {getattr(config, name)}" for name in defaults(config)))

    # ----------------------------------------------------------------------------------------------
    # Warm start: imitate demonstrations, right ones and wrong ones

    if checkpoint:
        state = restore(run, checkpoint, optimizer, clock, writes)
    else:
        clock.start("warm start")
        warm_start(setup)
        clock.start("evaluation")
        # Other seeds than those of demonstrations, which begin at (seed + 1) * 10**9.
        state = State(evaluate(setup), dict.fromkeys(config.env, (config.seed + 1) * 10**6))
        if writes:
            save(run, setup, state, optimizer, clock)
    reference = load_reference(run, model) if config.kl_coef else None
    ctrl_c = CtrlC()
    print_scores(state.before, "before")

    # ----------------------------------------------------------------------------------------------
    # The loop: roll out, compare within groups, update

    for step in range(state.step + 1, config.updates + 1):
        clock.start("rollouts")
        began = time.perf_counter()
        tasks = choose_tasks(setup, state)
        episodes = roll_out(setup, tasks, step, config.group_size, config.temperature)

        clock.start("update")
        # `rows` hold an advantage for each token. `advantages`, one per episode, are only logged.
        rows, advantages, signal_report = grpo.make_rows(episodes, config)
        remaining = 1 - (step - 1) / config.updates  # falls from 1 to nearly 0
        lr = optimizer.param_groups[0]["lr"] = config.lr * remaining**2
        report = grpo.update(model, optimizer, rows, config, config.temperature, reference)
        state.step = step
        # The seeds of an environment ascend, so its last one counts.
        state.next_seed.update({env: seed + 1 for env, seed in tasks})

        clock.start("log")
        metrics = {"step": step, "seconds": time.perf_counter() - began, "lr": lr,
                   **measure(episodes), **signal_report, **report}
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / metrics["seconds"]
        print(metric_line(metrics))
        if step % 20 == 0:
            print(transcript(max(episodes, key=lambda e: (e.success, e.turns)), tokenizer))
        stop = any(gather(ctrl_c.pressed))
        if writes:
            write_step(run, metrics, episodes, advantages)
            if step % config.save_every == 0 or step == config.updates or stop:
                save(run, setup, state, optimizer, clock)
        if stop:
            how = f"stopped after step {step}. To go on: python train.py --resume {run}"
            sys.exit(how if writes else 1)

    # ----------------------------------------------------------------------------------------------
    # What it learned: evaluation and summary

    clock.start("evaluation")
    after = evaluate(setup)
    print_scores(state.before, "before")
    print_scores(after, "after")
    if writes:
        write_results(run, setup, state.before, after, clock)
        lock.close()


def score(config: "Config") -> None:
    """--eval-only: score a run's model on the held-out tasks."""
    run, stored = read_run(config.eval_only)
    folder = run / "model" if (run / "model").is_dir() else newest_checkpoint(run)
    if folder is None:
        raise UserError(f"{run} has no model yet: it stopped in its warm start, and --resume {run} "
                        "begins that again")
    stored = replace(stored, eval_tasks=config.eval_tasks, device=config.device)
    print_scores(evaluate(make_setup(stored, folder)), "score")


# --------------------------------------------------------------------------------------------------
# Options


class UserError(ValueError):
    """Something the user can correct. Shown as one line."""


def by_model(name: str, text: str):
    """An option whose default is in the tables above."""
    return option(None, f"{text} ({SMALL_MODEL[name]}; with --model {GIVEN_MODEL[name]})")


@dataclass
class Config(GRPOConfig):
    """Every option of a run, with those of the update (grpo.py)."""

    env: list[str] = field(default_factory=lambda: [*ENVIRONMENTS], metadata={
        "help": "environments: NAME, NAME:argument=value,..., or FILE.py:Class"})
    agent: str = option("", "FILE.py:function: an agent of yours, solve(task, tools, base_url), or "
                            "a workflow(agent) (tests/README.md)")
    model: str = option("", "folder or hub id of a causal language model; empty: a small one")
    name: str = option("", "name of the run's folder under runs/; empty: the next number")
    seed: int = option(0, "of weights, tasks and sampling")
    steps: int = option(15, "reinforcement learning: steps (batches of episodes), times the number "
                            "of environments")
    tasks_per_step: int = option(18, "tasks per step; the environments take turns")
    group_size: int = option(8, "attempts at each task")
    lr: float | None = by_model("lr", "reinforcement learning: learning rate; it falls to 0")
    epochs: int | None = by_model("epochs", "optimizer steps per batch of episodes")
    negative_weight: float | None = option(
        None, "factor of advantages below 0 (1 as in GRPO; small model, built-in tasks: 0.1)")
    warmup_steps: int | None = by_model(
        "warmup_steps", "imitation: optimizer steps, times the number of environments")
    warmup_lr: float | None = by_model("warmup_lr", "imitation: the learning rate stays below this")
    max_turns: int = option(10, "messages the model may write in an episode")
    max_new_tokens: int = option(64, "tokens in one message")
    context: int | None = by_model("context", "tokens in one segment, the newest message included")
    slots: int | None = option(None, "contexts decoded at once (all of a step, but at most 128)")
    rejoin_window: float | None = option(None, "seconds to wait for quick tools, so that a run "
                                         "repeats exactly (0.25; environments of yours: 0)")
    tool_timeout: float = option(10.0, "seconds a tool call may take")
    temperature: float | None = by_model("temperature", "of sampling in training")
    eval_tasks: int = option(200, "held-out tasks per environment, before and after")
    eval_only: str = option("", "RUN: only score the model of this run")
    resume: str = option("", "RUN: go on from its newest checkpoint; the run's own options hold")
    save_every: int = option(20, "steps between checkpoints")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: Literal["float32", "bfloat16", "float64"] = option(
        "float32", "to compute in; the weights that are trained are float32 at least")
    recompute: bool = option(False, "compute layers again in the backward pass: less memory")

    @property
    def updates(self) -> int:
        """Steps of reinforcement learning, for all environments together."""
        return self.steps * len(self.env)

    @property
    def warmup_updates(self) -> int:
        """Optimizer steps of imitation, for all environments together."""
        return self.warmup_steps * len(self.env)


def defaults(config: Config) -> dict:
    """Values of the options that follow from others.

    A negative_weight below 1 makes the policy seek risk. It may prefer a reward of 1 with
    probability 0.4 to a certain reward of 0.6. The built-in tasks can all be solved, so the risk
    costs little there, and the small model learns them in fewer steps.
    """
    built_in = all(env.partition(":")[0] in ENVIRONMENTS for env in config.env)
    return {
        **(GIVEN_MODEL if config.model else SMALL_MODEL),
        "negative_weight": 0.1 if built_in and not config.model else 1.0,
        "slots": min(128, config.tasks_per_step * config.group_size),
        # Built-in tools take microseconds. An agent written elsewhere may take longer.
        "rejoin_window": 0.25 if built_in and not config.agent else 0.0,
    }


def resolve(config: Config) -> Config:
    """The config with a value in place of each None, and each environment only once."""
    values = {k: v for k, v in defaults(config).items() if getattr(config, k) is None}
    return replace(config, env=[*dict.fromkeys(config.env)], **values)


# The least value of an option. All other numbers must be at least 0.
AT_LEAST = {
    "tasks_per_step": 1, "group_size": 2, "epochs": 1, "pack_tokens": 1, "normaliser_tokens": 1,
    "max_turns": 1, "max_new_tokens": 1, "context": 1, "slots": 1, "eval_tasks": 1, "save_every": 1,
    "dual_clip": 1.01, "temperature": 0.01, "tool_timeout": 0.01, "tis_cap": 0.01}


def check_options(config: Config) -> None:
    """Raise UserError for a number that makes no sense, or a name that is taken.

    Better now than after the warm start.
    """
    for name, value in asdict(config).items():
        least = AT_LEAST.get(name, 0)
        if isinstance(value, (int, float)) and not least <= value < math.inf:  # NaN: neither
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value}: want a number of at least {least}")
    if config.name and (RUNS / config.name).exists():
        raise UserError(f"{RUNS / config.name} exists: choose another --name, or --resume it")


# --------------------------------------------------------------------------------------------------
# Rolling out


@dataclass
class YourAgent:
    """What --agent names."""

    function: Callable
    demonstrator: Callable | None  # `demonstrate_<function>` beside it
    endpoint: Endpoint

    @property
    def is_workflow(self) -> bool:
        """It takes our Agent, not a task, tools and a URL."""
        return len(inspect.signature(self.function).parameters) == 1


@dataclass
class Setup:
    """What episodes are made with."""

    config: Config
    envs: dict[str, Callable]  # name: a function that makes the environment
    chat: Chat  # messages to tokens
    yours: YourAgent | None = None
    model: torch.nn.Module | None = None
    engine: Engine | None = None  # samples from the model; demonstrations need neither

    def agent(self, llm, temperature: float = 1.0) -> Agent:
        c, yours = self.config, self.yours
        options = {"max_turns": c.max_turns, "max_new_tokens": c.max_new_tokens,
                   "context": c.context, "temperature": temperature, "tool_timeout": c.tool_timeout}
        if yours is None:
            return Agent(llm, self.chat, **options)
        if yours.is_workflow:
            return Agent(llm, self.chat, workflow=yours.function, **options)
        return OutsideAgent(yours.function, yours.endpoint, llm, self.chat, **options)

    def demonstrating_agent(self, messages: Iterator[str]) -> Agent:
        """An agent whose policy writes these messages."""
        agent = self.agent(Script(self.chat, messages))
        if self.yours and self.yours.demonstrator and not self.yours.is_workflow:
            agent.recite(messages)
        return agent

    @property
    def endpoint(self) -> Endpoint | None:
        return self.yours and self.yours.endpoint

    def demonstrator(self, env: str) -> Callable | None:
        """Who writes demonstrations: a generator beside your agent, else one beside the task."""
        return (self.yours and self.yours.demonstrator) or demonstrator(self.envs[env])

    def demonstrated(self) -> list[str]:
        """The environments that have a demonstrator."""
        return [env for env in self.envs if self.demonstrator(env)]


def roll_out(setup: Setup, tasks: list[tuple[str, int]], step: int | str, size: int,
             temperature: float) -> list[Episode]:
    """A group of `size` attempts at each task (environment, seed), one group after the other.

    Every attempt samples from its own random numbers, and their seed is the attempt's name. So a
    step depends on its number, its tasks and the weights only. There is no random state to save.
    """
    async def attempt(env: str, seed: int, member: int) -> Episode:
        rng = Random(f"{setup.config.seed} {step} {env} {seed} {member}")
        return await setup.agent(setup.engine, temperature).run(setup.envs[env], seed, rng)

    # Empty the prefix cache. A resumed run begins with an empty one, so both compute the same bits.
    setup.engine.forget()
    episodes = play_tasks(setup, tasks, size, attempt, setup.engine.slots, setup.engine)
    if all(e.error for e in episodes):  # else a run would learn nothing until its steps are spent
        what = "agent or environment" if setup.yours else "environment"
        raise UserError(f"the {what} failed in every episode of step {step}: {episodes[0].error}")
    return episodes


def play_tasks(setup: Setup, tasks: list[tuple[str, int]], size: int, attempt: Callable,
               at_once: int, engine: Engine | None = None) -> list[Episode]:
    """The episodes of `attempt(env, seed, member)`, for a group of `size` members at each task.

    With n processes, each plays every n-th group, and all get all episodes.
    """
    async def numbered(group: int, member: int) -> Episode:
        env, seed = tasks[group]
        episode = await attempt(env, seed, member)
        episode.env, episode.group, episode.member = env, group, member
        return episode

    rank, world = ranks()
    starts = []
    for group in range(rank, len(tasks), world):
        starts += [partial(numbered, group, member) for member in range(size)]
    played = chain(*gather(play(starts, at_once, engine, setup.endpoint)))
    return sorted(played, key=lambda e: (e.group, e.member))


def choose_tasks(setup: Setup, state: "State") -> list[tuple[str, int]]:
    """(environment, seed) of each task of the next step. The environments take turns."""
    names, number = list(setup.envs), setup.config.tasks_per_step
    turns = range(state.step * number, (state.step + 1) * number)
    counts = Counter(names[turn % len(names)] for turn in turns)
    tasks = []
    for env, factory in setup.envs.items():
        training = seeds(factory, evaluation=False, start=state.next_seed[env])
        tasks += [(env, seed) for seed in islice(training, counts[env])]
    return tasks


def evaluate(setup: Setup, final: bool = False) -> dict[str, dict[str, list[int]]]:
    """Successes on held-out tasks, the same in every run.

    Returns {environment: {"sampled": [0 or 1 for each task], "greedy": [...]}}. With `final`, the
    tasks are others: those that no setting was chosen on (tests/evidence.py).
    """
    tasks = []
    for env, factory in setup.envs.items():
        held_out = seeds(factory, evaluation=True, final=final)
        tasks += [(env, seed) for seed in islice(held_out, setup.config.eval_tasks)]
    scores = {env: {"sampled": [], "greedy": []} for env in setup.envs}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        for episode in roll_out(setup, tasks, "evaluation", 1, temperature):
            scores[episode.env][how].append(int(episode.success))
    return scores


# --------------------------------------------------------------------------------------------------
# Warm start


def warm_start(setup: Setup) -> None:
    """Imitate demonstrations, if there are any."""
    counts = demonstration_counts(setup)
    if not any(counts.values()):
        print("no demonstrations: no warm start")
        return
    shown = demonstrations(setup, counts, start=(setup.config.seed + 1) * 10**9)
    imitate(setup.model, shown, setup.config)


def demonstration_counts(setup: Setup) -> dict[str, int]:
    """How many demonstrations to make of each environment that has a demonstrator."""
    weights = {env: DEMONSTRATED.get(env.partition(":")[0], 12) for env in setup.demonstrated()}
    most = min(setup.config.warmup_updates * WARM_BATCH, MOST_DEMONSTRATIONS)
    return {env: round(most * weight / sum(weights.values())) for env, weight in weights.items()}


def demonstrations(setup: Setup, counts: dict[str, int], start: int) -> list[Episode]:
    """`counts` demonstrations of each environment, evenly mixed, for tasks from seed `start` on.

    A demonstrator plays the policy, in the same agent loop. Raises UserError if it fails.
    """
    async def attempt(env: str, seed: int, member: int) -> Episode:
        environment = setup.envs[env]()
        rng = Random(f"demonstration {setup.config.seed} {seed}")
        messages = setup.demonstrator(env)(environment, rng)
        try:
            return await setup.demonstrating_agent(messages).run(environment, seed)
        except ValueError as e:
            raise UserError(f"{env}: its demonstrator fails: {e}") from e

    places = []  # (place in the list of its environment, from 0 to 1; environment; seed)
    for env, number in counts.items():
        tasks = islice(seeds(setup.envs[env], evaluation=False, start=start), number)
        places += [(i / number, env, seed) for i, seed in enumerate(tasks)]
    places.sort(key=lambda place: place[0])  # equal shares keep the order of `counts`
    tasks = [(env, seed) for _, env, seed in places]
    return play_tasks(setup, tasks, 1, attempt, at_once=64)


def imitate(model, shown: list[Episode], config: Config) -> None:
    """Supervised fine-tuning on what the demonstrators write.

    The cross-entropy is the policy gradient's loss with advantage 1 for all tokens.
    """
    right, updates = fmean(e.success for e in shown), config.warmup_updates
    print(f"warm start: {len(shown)} demonstrations, {right:.0%} of them right")
    options = replace(config, kind="reinforce", epochs=1, normaliser="token", kl_coef=0.0,
                      entropy_coef=0.0, tis_cap=None)
    optimizer, endless, began = Imitator(model, config), cycle(shown), time.perf_counter()
    for step in range(1, updates + 1):
        rows = []
        for number, episode in enumerate(islice(endless, WARM_BATCH)):
            rows += grpo.episode_rows(episode, number, [1.0] * episode.turns)
        optimizer.set_lr(step)
        report = grpo.update(model, optimizer, rows, options)
        if step == 10 or step % 50 == 0:
            minutes = (time.perf_counter() - began) / step / 60  # for each optimizer step
            here = minutes * (updates - step)
            later = minutes * STEPS_PER_EPISODE * episodes_to_play(config)
            print(f"warm start {step} of {updates}: {report['loss']:.3f} nats per token, entropy "
                  f"{report['entropy']:.3f}, about {here:.1f} minutes to go here, "
                  f"{here + later:.1f} in all")


def episodes_to_play(config: Config) -> int:
    """In the RL loop, and in the evaluations: before and after it, sampled and greedy."""
    evaluated = 4 * config.eval_tasks * len(config.env)
    return config.updates * config.tasks_per_step * config.group_size + evaluated


class Imitator:
    """The optimizer of the warm start.

    The small model starts from random weights. Muon trains the matrices of its layers, and AdamW
    all other weights, with the same learning rate. Muon makes the momentum orthogonal, so that a
    matrix moves equally far in all directions. With it the model learns to copy in a third of the
    updates. The RL loop uses AdamW for all weights: rewards are noisy, and Muon moves as far along
    noise as along signal.

    Muon: kellerjordan.github.io/posts/muon, scaled as in arXiv 2502.16982. Not torch.optim.Muon,
    because it multiplies in bfloat16, which the CPUs of most laptops emulate slowly.
    """

    def __init__(self, model, config: Config):
        self.config, self.lr = config, 0.0
        layers = [] if config.model else grpo.masters(model.base_model.layers)
        # The average gradient of each matrix.
        self.averages = {p: torch.zeros_like(p) for p in layers if p.ndim == 2}
        others = [p for p in grpo.masters(model) if p not in self.averages]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)

    def set_lr(self, step: int) -> None:
        """The learning rate of this step: `warmup_lr` times two factors.

        The first rises from 0 to 1 in 20 steps. The second falls from 1 to 0.1 over all steps. With
        only 12 steps, their product is never above 1/6.
        """
        share = min(1.0, step / 20) * (1 - 0.9 * step / self.config.warmup_updates)
        self.lr = self.adam.param_groups[0]["lr"] = self.config.warmup_lr * share

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        for p, average in self.averages.items():
            average.lerp_(p.grad, 0.05)
            direction = orthogonal(p.grad.lerp(average, 0.95))  # Nesterov's momentum
            # Scaled so that an entry moves as far as with Adam.
            p.sub_(direction, alpha=self.lr * 0.2 * max(p.shape) ** 0.5)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The matrix [M, N] with the singular vectors of x, and singular values near 1.

    It takes five steps of a Newton-Schulz iteration.

    >>> orthogonal(torch.tensor([[0.01, 0.0], [0.0, 0.02]])).round(decimals=1)
    tensor([[1.1000, 0.0000],
            [0.0000, 0.7000]])
    """
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x  # Keller Jordan's coefficients
    return x


# --------------------------------------------------------------------------------------------------
# Environments and models


def make_setup(config: Config, checkpoint: Path | None = None) -> Setup:
    """Raises EnvError for an environment that cannot be used, and UserError for a model."""
    envs, yours = make_envs(config), load_agent(config.agent)
    try:
        model, tokenizer = load_model(config, envs, yours, checkpoint)
        chat, engine = make_engine(model, tokenizer, config)
        return Setup(config, envs, chat, yours, model, engine)
    except ValueError as e:
        raise UserError(str(e)) from e


def make_envs(config: Config) -> dict[str, Callable]:
    """{name: factory}, each checked against the interface."""
    envs = {env: environments.make_env(env) for env in config.env}
    for factory in envs.values():
        environments.check_env(factory)
    return envs


def load_agent(spec: str) -> YourAgent | None:
    """From "FILE.py:function". Raises UserError, or EnvError if the file fails."""
    if not spec:
        return None
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--agent {spec}: want FILE.py:function, and a file that exists")
    module = vars(environments.load_file(Path(path)))
    if not callable(module.get(name)):
        raise UserError(f"--agent {spec}: {path} has no function {name}")
    return YourAgent(module[name], module.get(f"demonstrate_{name}"), Endpoint())


def make_engine(model, tokenizer, config: Config) -> tuple[Chat, Engine]:
    """Raises ValueError for a model that cannot chat, or that the engine does not know."""
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):  # more is common: a model's vocabulary is often rounded up
        raise ValueError(f"the model knows {known} tokens and its tokenizer has {len(tokenizer)}: "
                         "they do not belong together")
    ends = model.generation_config.eos_token_id  # Llama 3 has several; its tokenizer knows one
    ends = ends if isinstance(ends, list) else [ends]
    chat = Chat(tokenizer, set(ends) - {None})
    return chat, Engine(model, chat.stop_ids, slots=config.slots, context=config.context,
                        rejoin_window=config.rejoin_window)


def load_model(config: Config, envs: dict[str, Callable], yours: YourAgent | None,
               checkpoint: Path | None):
    """(model, tokenizer): from a checkpoint, from a folder or hub id, or a small one made here.

    A model's own code is never run.
    """
    where, dtype = checkpoint or config.model, getattr(torch, config.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if where:
        model, tokenizer = read_model(where, wide)
    else:
        tokenizer = gather(learn_tokenizer(envs, config, yours))[0]
        model = small_model(len(tokenizer), config.seed).to(wide)
    model.to(config.device)
    if not config.model and config.device == "cpu":
        # One operation of a small model is too short to share among cores. Instead, grpo.py
        # computes whole packs side by side.
        torch.set_num_threads(1)
        keep_memory()
    grpo.compute_in(model, dtype)
    if config.recompute:
        grpo.recompute_layers(model)
    return model, tokenizer


def keep_memory() -> None:
    """Keep freed memory in this process. Without this, page faults take a quarter of each update.

    glibc returns the memory of a large tensor to the system when the tensor is freed, and asks for
    it again for the next tensor.
    """
    settings = {-8: 1, -3: 2**25, -1: 2**31 - 1}  # arenas, mmap and trim thresholds: mallopt(3)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # only glibc has it
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)


def read_model(where: Path | str, dtype: torch.dtype):
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"no causal language model at '{where}': want a Hugging Face folder, "
                        f"a hub id, or nothing for a small one ({reason})") from e
    # Tensors that were read from a file are not aligned in memory. Their products may differ in
    # the last bit from those of aligned ones, and a resumed run would differ, too.
    for p in model.parameters():
        p.data = p.data.clone()
    return model, tokenizer


def load_reference(run: Path, model):
    """The model before RL, frozen. The KL term keeps the policy near it."""
    gather(None)  # wait until the first process has written it
    reference, _ = read_model(run / "checkpoints" / "step-000000", model.dtype)
    return reference.to(model.device).requires_grad_(False)


def learn_tokenizer(envs: dict[str, Callable], config: Config, yours: YourAgent | None = None):
    """A small tokenizer, learned from what the environments and their demonstrators write."""
    spell = Chat(small_tokenizer([]))  # a token for each byte
    setup = Setup(replace(config, context=10**6, max_new_tokens=10**5), envs, spell, yours)
    shown = demonstrations(setup, dict.fromkeys(setup.demonstrated(), 300), start=0)
    written = [segment.ids for episode in shown for segment in episode.segments]
    for factory in envs.values():
        written += prompts(spell, factory, 50)
    return small_tokenizer(spell.tokenizer.decode(ids, skip_special_tokens=True) for ids in written)


def prompts(chat: Chat, factory: Callable, number: int) -> list[list[int]]:
    """The prompts of the first training tasks."""
    schemas = [schema(tool) for tool in tools_of(factory()).values()]
    training = islice(environments.tasks_of(factory, evaluation=False), number)
    return [chat.prompt(task, schemas) for _, task in training]


def check_fit(setup: Setup) -> None:
    """Raise UserError if a prompt leaves no room for a message, or if a demonstrator fails."""
    config = setup.config
    if config.warmup_steps:
        shown = demonstrations(setup, dict.fromkeys(setup.demonstrated(), 10), start=0)
        check_trial(setup, shown)
    if setup.yours:
        tasks = [(env, next(seeds(setup.envs[env], evaluation=False))) for env in setup.envs]
        check_trial(setup, roll_out(setup, tasks, "trial", 1, 1.0))
        return
    for env, factory in setup.envs.items():
        longest = max(len(ids) for ids in prompts(setup.chat, factory, 20))
        if longest + config.max_new_tokens > config.context:
            raise UserError(f"{env}: a prompt of {longest} tokens and a message of "
                            f"{config.max_new_tokens} do not fit --context {config.context}")


def check_trial(setup: Setup, episodes: list[Episode]) -> None:
    """Raise UserError if an agent of yours does not work at all."""
    for e in episodes:
        if e.error and setup.yours:
            raise UserError(f"--agent fails: {e.error}")
        if e.finish == "context":
            raise UserError(f"{e.env}: the agent's messages do not fit "
                            f"--context {setup.config.context}")
        if not e.turns:
            raise UserError("--agent asked the policy nothing: does it use base_url?")


# --------------------------------------------------------------------------------------------------
# Records


def measure(episodes: list[Episode]) -> dict[str, float]:
    """What the episodes of a step were like: means, without episodes whose environment failed."""
    values, rewards, finishes = defaultdict(list), defaultdict(list), Counter()
    for e in episodes:
        finishes[f"finish/{e.finish}"] += 1 / len(episodes)
        if e.error:
            continue
        rewards[e.group].append(e.reward)
        values[f"success/{e.env}"].append(e.success)
        for name in ("reward", "success", "turns", "thinking", "tool_calls", "tool_errors"):
            values[name].append(getattr(e, name))
        for name, value in e.behaviour.items():
            values[f"behaviour/{e.env}/{name}"].append(value)
    segments = [segment for e in episodes for segment in e.segments]
    return {**{name: fmean(of) for name, of in sorted(values.items())}, **finishes,
            "reward_std": fmean(pstdev(group) for group in rewards.values()),
            "sampled_tokens": sum(sum(segment.sampled) for segment in segments),
            "context_tokens": sum(len(segment.ids) for segment in segments)}


def metric_line(m: dict) -> str:
    own = "  ".join(f"{name.removeprefix('success/')} {value:4.0%}" for name, value in m.items()
                    if name.startswith("success/"))
    skipped = " SKIPPED" if m["skipped"] else ""
    return (f"step {m['step']:3d}  success {m['success']:4.0%}  {own}  "
            f"no signal {m['no_signal']:4.0%}  turns {m['turns']:.1f}  entropy {m['entropy']:.2f}  "
            f"|g| {m['grad_norm']:.2f}{skipped}  {m['seconds']:.1f} s")


def record(e: Episode, advantage: float, step: int) -> dict:
    """An episode as a line of episodes.jsonl.gz, complete: token by token, with all its numbers.

    This reads a run's episodes:

        tokenizer = AutoTokenizer.from_pretrained("runs/0/checkpoints/step-000000")
        for line in gzip.open("runs/0/episodes.jsonl.gz", "rt"):
            episode = json.loads(line)
            segments = [Segment(**s) for s in episode["segments"]]
            print(episode["reward"], tokenizer.decode(segments[0].ids))
    """
    return {"step": step, "advantage": advantage, "success": e.success, **asdict(e)}


def write_step(run: Path, metrics: dict, episodes: list[Episode], advantages: list[float]) -> None:
    """Add a step to the run's files."""
    # JSON has no NaN.
    finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
    append(run / METRICS, [finite])
    records = [record(e, a, metrics["step"]) for e, a in zip(episodes, advantages)]
    append(run / EPISODES, records)


def append(path: Path, lines: list[dict]) -> None:
    """Add lines of JSON. To a .gz file they go as one compressed part, as gzip allows."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with writing(path), path.open("ab") as file:
        file.write(gzip.compress(data, compresslevel=5) if path.suffix == ".gz" else data)


def interval(successes: list[int]) -> list[float]:
    """The 95 % interval of a success rate (Wilson's).

    >>> [round(x, 3) for x in interval([1] * 95 + [0] * 5)]
    [0.888, 0.978]
    """
    n, p, z = len(successes), fmean(successes), 1.96
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def rates(scores: dict) -> dict[str, dict]:
    """The success rates of each environment, from what `evaluate` returns."""
    return {env: {"sampled": fmean(of["sampled"]), "interval": interval(of["sampled"]),
                  "greedy": fmean(of["greedy"]), "tasks": len(of["sampled"])}
            for env, of in scores.items()}


def print_scores(scores: dict, when: str) -> None:
    for env, rate in rates(scores).items():
        low, high = rate["interval"]
        print(f"{when:>6}  {env:<16} held-out success: sampled {rate['sampled']:6.1%} "
              f"[{low:.1%}, {high:.1%}]  greedy {rate['greedy']:6.1%}  ({rate['tasks']} tasks)")


def write_results(run: Path, setup: Setup, before: dict, after: dict, clock: "Clock") -> None:
    """The last files of a run. summary.json is the very last: with it the run is finished."""
    with atomic(run / "model") as folder:
        save_model(folder, setup.model, setup.chat.tokenizer)
    with atomic(run / "scores.json") as file:
        file.write_text(json.dumps({"before": before, "after": after}))
    clock.start("end")
    summary = {"before": rates(before), "after": rates(after), "seed": setup.config.seed,
               "seconds": {"total": clock.total(), **clock.seconds}, "versions": versions()}
    with atomic(run / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=2))
    print(f"{run}: {clock.total():.0f} s: "
          + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in clock.seconds.items()))


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                            capture_output=True, text=True)
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": commit.stdout.strip() or "unknown"}


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.phase, self.since = "start", time.perf_counter()

    def start(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def total(self) -> float:
        return sum(self.seconds.values())


# --------------------------------------------------------------------------------------------------
# The folder


def open_run(config: Config, writes: bool) -> tuple[Path, IO | None, Setup, Path | None]:
    """(folder, its lock, Setup, newest checkpoint) of a new run, or of the one to go on with."""
    if config.resume:
        run, config = read_run(config.resume)
        lock = lock_run(run) if writes else None
        checkpoint = newest_checkpoint(run)
        return run, lock, make_setup(config, checkpoint), checkpoint
    setup = make_setup(resolve(config))
    check_fit(setup)  # before the folder is made: bad input leaves none behind
    run = gather(make_run(setup.config) if writes else None)[0]
    return run, lock_run(run) if writes else None, setup, None


def is_finished(config: Config) -> bool:
    run, _ = read_run(config.resume)
    return (run / "summary.json").exists()  # it is written last


def read_run(name: str) -> tuple[Path, Config]:
    """(folder, options) of a run. Raises UserError if there is none, or one of another version."""
    run = Path(name)
    try:
        options = dict(json.loads((run / "run.json").read_text())["config"])
    except OSError as e:
        raise UserError(f"no run at '{name}': {e}") from e
    except (LookupError, TypeError, ValueError):
        options = {}
    differ = options.keys() ^ {f.name for f in fields(Config)}
    if differ:
        raise UserError(f"{run / 'run.json'} does not hold the options of a run of this version "
                        f"(missing or unknown: {', '.join(sorted(differ))})")
    return run, Config(**options)


def make_run(config: Config) -> Path:
    """Make the folder of a new run: runs/NAME, or the first number that is free.

    It is made under another name and renamed once it holds run.json. No folder can be renamed to
    one that holds files. So two runs that start together get a folder each.
    """
    made = (RUNS / (config.name or "new")).with_name(f"partial-{os.getpid()}")
    with writing(RUNS / config.name):
        made.mkdir(parents=True)
        try:
            options = {"config": asdict(config), "versions": versions()}
            (made / "run.json").write_text(json.dumps(options, indent=2))
            return rename_to_free(made, config.name)
        finally:
            shutil.rmtree(made, ignore_errors=True)  # if it failed


def rename_to_free(folder: Path, name: str) -> Path:
    """Rename to runs/NAME, or without a name to the first number that is free."""
    for number in count():
        run = RUNS / (name or str(number))
        try:
            return folder.rename(run)
        except OSError:
            if name or not run.exists():
                raise


def lock_run(run: Path) -> IO:
    """Keep other processes away from this run until the returned file is closed."""
    file = (run / "run.json").open("r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"{run} is in use: another process is training it") from e
    return file


@dataclass
class State:
    """How far a run has come. A checkpoint holds it, with the weights and the optimizer."""

    before: dict[str, dict[str, list[int]]]  # the scores after the warm start
    next_seed: dict[str, int]  # where to look for the next training task of each environment
    step: int = 0


def save(run: Path, setup: Setup, state: State, optimizer, clock: Clock) -> None:
    """Write a checkpoint: a Hugging Face folder of the model, and trainer.pt with all the rest.

    Of the older checkpoints the first and the newest stay.
    """
    written = {path.name: path.stat().st_size for path in run.glob("*.jsonl*")}
    with atomic(run / "checkpoints" / f"step-{state.step:06d}") as folder:
        save_model(folder, setup.model, setup.chat.tokenizer)
        torch.save({"state": asdict(state), "optimizer": optimizer.state_dict(),
                    "seconds": dict(clock.seconds), "written": written}, folder / "trainer.pt")
    for old in sorted(run.glob("checkpoints/step-*"))[1:-KEEP]:
        shutil.rmtree(old)


def restore(run: Path, checkpoint: Path, optimizer, clock: Clock, writes: bool) -> State:
    """Load trainer.pt into the optimizer and the clock, and cut the logs to the checkpoint."""
    saved = torch.load(checkpoint / "trainer.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    clock.seconds.update(saved["seconds"])
    if writes:
        cut_off(run, saved["written"])
    return State(**saved["state"])


def save_model(folder: Path, model, tokenizer) -> None:
    weights = {name: getattr(p, "master", p).detach()
               for name, p in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def newest_checkpoint(run: Path) -> Path | None:
    """None if the run stopped in its warm start. Raises UserError if its checkpoints are gone."""
    checkpoint = max(run.glob("checkpoints/step-*"), default=None)
    if checkpoint is None and (run / METRICS).exists():
        raise UserError(f"{run} has lost its checkpoints: there is nothing to go on from")
    return checkpoint


@contextmanager
def atomic(final: Path) -> Iterator[Path]:
    """Where to write a file or folder: under another name, which becomes the final one at the end.

    So nobody ever finds half of it, whenever the run is killed. The data reach the disk before the
    name does. So a power failure may cost the newest checkpoint, but never leaves half of one.
    """
    written = final.with_name(f"partial-{final.name}")
    with writing(final):
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(written, ignore_errors=True)  # left by a run that was killed
        try:
            yield written
            os.sync()
            shutil.rmtree(final, ignore_errors=True)  # of a run killed at its end
            written.rename(final)
        finally:
            shutil.rmtree(written, ignore_errors=True)  # left if writing failed: make room


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one clear line.

    torch raises RuntimeError, and safetensors an error of its own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
        raise UserError(f"cannot write {path}: {e} ({free / 1e6:.0f} MB are free). What was saved "
                        "before is whole; once there is room, --resume goes on from there") from e


def cut_off(run: Path, written: dict[str, int]) -> None:
    """Cut metrics and episodes to their sizes at the checkpoint. Later steps are run again."""
    for path in run.glob("*.jsonl*"):
        # Never make it longer: somebody may have emptied it.
        os.truncate(path, min(written.get(path.name, 0), path.stat().st_size))


class CtrlC:
    """After the first Ctrl-C the step is finished and saved. A second one ends the program."""

    def __init__(self):
        self.pressed = False
        signal.signal(signal.SIGINT, self.press)

    def press(self, *_) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: it may be what was interrupted.
        os.write(2, b"\nCtrl-C: finishing this step (again: stop now)\n")


# --------------------------------------------------------------------------------------------------
# The command


def join(config: Config) -> None:
    """Meet the other processes, if torchrun has started several.

    torchrun ends all processes when one dies. So none needs a time limit on waiting for the others,
    whose tools may take long.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = config.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=30))
    signal.signal(signal.SIGTERM, lambda *_: lost("told to by torchrun"))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def lost(reason: object) -> None:
    """End this process at once. Tools in other threads must not keep it alive."""
    sys.stderr.write(f"train.py: process {os.environ['RANK']} stops with the run ({reason}); "
                     "torchrun's report says who was the first. "
                     "To go on: torchrun ... train.py --resume RUN\n")
    os._exit(1)


def command_line() -> None:
    config, = HfArgumentParser(Config).parse_args_into_dataclasses()
    sys.stdout.reconfigure(line_buffering=True)  # into a log file, too
    try:
        check_options(config)
        join(config)
        if config.eval_only:
            score(config)
        else:
            train(config)
        if dist.is_initialized():
            dist.destroy_process_group()
    except grpo.ProcessLost as e:
        lost(e)
    except (UserError, EnvError, FloatingPointError) as e:  # the last: the run has diverged
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
