"""The whole run: a model, a warm start, the RL loop, and evaluation on tasks it never saw.

    python train.py                                  # a small model, made here, learns six tasks
    python train.py --env calculator                 # one of them
    python train.py --model MODEL                    # a folder or hub id of a causal language model
    python train.py --env my_env.py:MyEnv            # an environment of yours
    python train.py --agent my_agent.py:solve        # an agent of yours (LangGraph, smolagents)
    python train.py --resume runs/0                  # go on after a crash or Ctrl-C
    python train.py --eval-only runs/0               # score a finished run
    torchrun --nproc-per-node 2 train.py             # several processes, one for each GPU

`plain_train` is the algorithm: imitate demonstrations, then repeat `train_step`, then evaluate on
held-out tasks. Read down to the first line of ====, and you know what a run does. Then come the
parts that it calls. Below the second line of ====, `train` makes the same run, but writes it down,
can be killed and resumed, and works in several processes.

A run leaves a folder runs/NAME: run.json (options), metrics.jsonl (a line per step),
episodes.jsonl.gz (every episode, token by token), checkpoints/, model/ (a Hugging Face folder),
scores.json (held-out successes, task by task) and, last of all, summary.json. A run may be killed
at any instant. When it is resumed, it ends with the same bits as a run that was never stopped, if
its tools are quick (`--rejoin-window`, see rollout.py).

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
from functools import partial, wraps
from itertools import chain, count, cycle, islice, product
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Literal

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
from rollout import Endpoint, Engine, make_chat, play, small_model
from tools import schema, tools_of


def plain_train(setup: "Setup") -> tuple["Scores", "Scores"]:
    """A run without files, in one process. Returns its scores before and after RL.

    `setup` holds the options (`config`), the model, the engine that samples from it, and for each
    environment a function that makes it. The KL term to the model before RL is left out.
    """
    warm_start(setup)  # imitate demonstrations: learns how to call tools, and fails most tasks
    progress = Progress(before=evaluate(setup))  # on tasks that are never trained on
    optimizer = make_optimizer(setup)
    for _ in range(setup.config.total_steps):
        train_step(setup, optimizer, progress)
    return progress.before, evaluate(setup)


def train_step(setup: "Setup", optimizer, progress: "Progress") -> "Step":
    """One step of RL: a batch of episodes, and `epochs` optimizer steps on it.

    A run has `total_steps` of them: `--steps` times the number of environments.
    """
    config, step = setup.config, progress.step + 1
    tasks = choose_tasks(setup, progress)  # pairs (environment, seed)
    episodes = roll_out(setup, tasks, step, config.group_size, config.temperature)

    # A row: tokens to train, each with an advantage. It compares an episode with its group.
    rows, advantages, signal_report = grpo.make_rows(episodes, config)
    # The learning rate falls quadratically to 0 at the end of the run.
    lr = config.lr * (1 - progress.step / config.total_steps) ** 2
    optimizer.param_groups[0]["lr"] = lr
    report = grpo.update(setup.model, optimizer, rows, config, config.temperature, setup.reference)

    progress.step = step
    for env, seed in tasks:  # an environment's last task has its largest seed, so that one stays
        progress.next_seed[env] = seed + 1
    return Step(episodes, advantages, {"step": step, "lr": lr, **signal_report, **report})


@dataclass
class Progress:
    """How far a run has come."""

    before: "Scores"  # after the warm start
    step: int = 0  # steps of RL that are complete
    next_seed: dict[str, int] = field(default_factory=dict)  # where an environment's tasks go on
    warmup_seconds: float = 0.0


@dataclass
class Step:
    """What a step of RL was like, for the log."""

    episodes: list[Episode]
    advantages: list[float]  # one for each episode
    report: dict[str, float]


def make_optimizer(setup: "Setup") -> torch.optim.Optimizer:
    """Of RL. It trains the model's weights, or float32 copies of them: grpo.masters."""
    weights = grpo.masters(setup.model)
    return torch.optim.AdamW(weights, lr=setup.config.lr, betas=(0.9, 0.99), weight_decay=0.0)


# ==================================================================================================
# That is a run. Next: its options, then the parts that it calls.
# ==================================================================================================

# A task is made from its seed. The seeds of a run begin at:
#
#     evaluation                 0 (the same tasks in every run)
#     reinforcement learning     (--seed + 1) * TRAINING_SEEDS
#     demonstrations             (--seed + 1) * DEMONSTRATION_SEEDS
#
# A task that is held out for evaluation is never trained on, whatever its seed (env.split).
TRAINING_SEEDS, DEMONSTRATION_SEEDS = 10**6, 10**9

Scores = dict[str, dict[str, list[int]]]  # see `evaluate`
KEEP = 3  # newest checkpoints that stay, beside the first
WARM_BATCH = 44  # demonstrations per step of the warm start
MOST_DEMONSTRATIONS = 12000  # different ones; after that they are shown again
MOST_OF_YOURS = 4000  # the same with --agent, as such agents may take 30 ms each
# How often an environment is demonstrated, relative to the others. One that is hard to learn gets
# more demonstrations, and one with long messages gets fewer. Yours: as many as the calculator.
DEMONSTRATED = {"calculator": 12, "lookup": 7, "maze": 31, "chain": 20, "recall": 3,
                "mastermind": 4}

# Options whose best value depends on the model: one of random weights, or one that knows language.
SMALL_MODEL = {"lr": 2.5e-4, "epochs": 3, "temperature": 1.1, "warmup_lr": 6e-3,
               "warmup_steps": 110, "context": 336}
GIVEN_MODEL = {"lr": 5e-5, "epochs": 1, "temperature": 1.0, "warmup_lr": 1e-4,
               "warmup_steps": 12, "context": 700}


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
    agent: str = option("", "FILE.py:function, an agent of yours: solve(task, tools, base_url), or "
                            "workflow(agent)")
    model: str = option("", "folder or hub id of a causal language model; empty: a small one")
    name: str = option("", "name of the run's folder under runs/; empty: the next number")
    seed: int = option(0, "of weights, tasks and sampling")
    steps: int = option(15, "RL: batches of episodes, times the number of environments")
    tasks_per_step: int = option(18, "tasks per step, an equal share of each environment")
    group_size: int = option(8, "attempts at each task")
    lr: float | None = by_model("lr", "RL: the learning rate at the start; it falls to 0")
    epochs: int | None = by_model("epochs", "optimizer steps per batch of episodes")
    negative_weight: float | None = option(
        None, "factor of advantages below 0 (1 as in GRPO; small model, built-in tasks: 0.1)")
    warmup_steps: int | None = by_model("warmup_steps", "imitation: optimizer steps, times these")
    warmup_lr: float | None = by_model("warmup_lr", "imitation: the learning rate stays below this")
    max_turns: int = option(10, "messages the model may write in an episode")
    max_new_tokens: int = option(64, "tokens in one message")
    context: int | None = by_model("context", "tokens in one segment, the newest message included")
    slots: int | None = option(None, "contexts decoded at once (all of a step, but at most 128)")
    rejoin_window: float | None = option(
        None, "seconds to wait for quick tools: a run repeats exactly (0.25; yours: 0)")
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
    def total_steps(self) -> int:
        """Steps of reinforcement learning, for all environments together."""
        return self.steps * len(self.env)

    @property
    def total_warmup_steps(self) -> int:
        """Steps of imitation, for all environments together. Each is one optimizer step."""
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
# What a run works with


@dataclass
class Player:
    """Who plays: our agent loop, or what --agent names."""

    make: Callable = Agent  # makes an agent of an LLM, a Chat and options
    endpoint: Endpoint | None = None  # HTTP server for `solve`; None for our loop and workflows
    demonstrator: Callable | None = None  # `demonstrate_<function>` beside your function


@dataclass
class Setup:
    """What a run works with. Demonstrations need no model."""

    config: Config
    envs: dict[str, Callable]  # name: a function that makes the environment
    player: Player = field(default_factory=Player)
    chat: Chat | None = None  # messages to tokens
    model: torch.nn.Module | None = None
    engine: Engine | None = None  # samples from the model
    reference: torch.nn.Module | None = None  # the model before RL, if there is a KL term

    def agent(self, llm, temperature: float = 1.0) -> Agent:
        c = self.config
        return self.player.make(llm, self.chat, max_turns=c.max_turns, context=c.context,
                                max_new_tokens=c.max_new_tokens, temperature=temperature,
                                tool_timeout=c.tool_timeout)

    @property
    def demonstrators(self) -> dict[str, Callable]:
        """Who writes demonstrations: a generator beside your agent, else one beside the task.

        An environment without one is left out.
        """
        own = self.player.demonstrator
        found = {env: own or demonstrator(factory) for env, factory in self.envs.items()}
        return {env: generator for env, generator in found.items() if generator}


# --------------------------------------------------------------------------------------------------
# Rolling out


def choose_tasks(setup: Setup, progress: Progress) -> list[tuple[str, int]]:
    """(environment, seed) of each task of the next step, an equal share of each environment.

    With 18 tasks and 4 environments, each gets 4. The next two in turn get one more.
    """
    names, number = list(setup.envs), setup.config.tasks_per_step
    places = range(progress.step * number, (progress.step + 1) * number)
    counts = Counter(names[place % len(names)] for place in places)
    first, tasks = (setup.config.seed + 1) * TRAINING_SEEDS, []
    for env, factory in setup.envs.items():
        training = seeds(factory, evaluation=False, start=progress.next_seed.get(env, first))
        tasks += [(env, seed) for seed in islice(training, counts[env])]
    return tasks


def roll_out(setup: Setup, tasks: list[tuple[str, int]], step: int | str, size: int,
             temperature: float) -> list[Episode]:
    """A group of `size` attempts at each task (environment, seed), one group after the other.

    Every attempt has its own random numbers, from the run's seed, step, task and member. So a step
    of RL depends on its number, its tasks and the weights only. There is no random state to save.
    """
    async def attempt(env: str, seed: int, member: int) -> Episode:
        rng = Random(f"{setup.config.seed} {step} {env} {seed} {member}")
        return await setup.agent(setup.engine, temperature).run(setup.envs[env], seed, rng)

    # Empty the prefix cache. A resumed run begins with an empty one, so both compute the same bits.
    setup.engine.forget()
    episodes = play_tasks(setup, tasks, size, attempt, setup.engine.slots, setup.engine)
    if all(e.error for e in episodes):  # else a run would learn nothing until its steps are spent
        what = "agent or environment" if setup.config.agent else "environment"
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
    own = product(range(rank, len(tasks), world), range(size))  # pairs (group, member)
    starts = [partial(numbered, *pair) for pair in own]
    played = chain(*gather(play(starts, at_once, engine, setup.player.endpoint)))
    return sorted(played, key=lambda e: (e.group, e.member))


# --------------------------------------------------------------------------------------------------
# Warm start: imitate demonstrations, right ones and wrong ones


def warm_start(setup: Setup) -> None:
    """Imitate demonstrations, if there are any."""
    counts = demonstration_counts(setup)
    if not any(counts.values()):
        print("no demonstrations: no warm start")
        return
    start = (setup.config.seed + 1) * DEMONSTRATION_SEEDS
    imitate(setup.model, demonstrations(setup, counts, start), setup.config)


def demonstration_counts(setup: Setup) -> dict[str, int]:
    """How many demonstrations to make of each environment that has a demonstrator."""
    weights = {env: DEMONSTRATED.get(env.partition(":")[0], 12) for env in setup.demonstrators}
    limit = MOST_OF_YOURS if setup.config.agent else MOST_DEMONSTRATIONS
    most = min(setup.config.total_warmup_steps * WARM_BATCH, limit)
    return {env: round(most * weight / sum(weights.values())) for env, weight in weights.items()}


def demonstrations(setup: Setup, counts: dict[str, int], start: int) -> list[Episode]:
    """`counts` demonstrations of each environment, evenly mixed, for tasks from seed `start` on.

    A demonstrator plays the policy, in the same agent loop. Raises UserError if it fails.
    """
    generators = setup.demonstrators

    async def attempt(env: str, seed: int, member: int) -> Episode:
        environment = setup.envs[env]()
        messages = generators[env](environment, Random(f"demonstration {setup.config.seed} {seed}"))
        agent = setup.agent(Script(setup.chat, messages))  # in the place of the LLM
        # A generator beside `solve` must see each request before it writes: no Script then.
        if setup.player.endpoint and setup.player.demonstrator:
            agent.recite(messages)
        try:
            return await agent.run(environment, seed)
        except ValueError as e:
            raise UserError(f"{env}: its demonstrator fails: {e}") from e

    places = []  # (place in the list of its environment, from 0 to 1; environment; seed)
    for env, number in counts.items():
        tasks = islice(seeds(setup.envs[env], evaluation=False, start=start), number)
        places += [(i / number, env, seed) for i, seed in enumerate(tasks)]
    # So each environment is spread evenly over the list. Equal places keep the order of `counts`.
    places.sort(key=lambda place: place[0])
    tasks = [(env, seed) for _, env, seed in places]
    return play_tasks(setup, tasks, 1, attempt, at_once=64)


def imitate(model, shown: list[Episode], config: Config) -> None:
    """Supervised fine-tuning on what the demonstrators write.

    The cross-entropy is the policy gradient's loss with advantage 1 for all tokens.
    """
    right, steps = fmean(e.success for e in shown), config.total_warmup_steps
    print(f"warm start: {len(shown)} demonstrations, {right:.0%} of them right")
    options = replace(config, kind="reinforce", epochs=1, normaliser="token", kl_coef=0.0,
                      entropy_coef=0.0, tis_cap=None)
    optimizer, endless, began = Imitator(model, config), cycle(shown), time.perf_counter()
    for step in range(1, steps + 1):
        rows = []
        for number, episode in enumerate(islice(endless, WARM_BATCH)):
            rows += grpo.episode_rows(episode, number, [1.0] * episode.turns)
        optimizer.param_groups[0]["lr"] = config.warmup_lr * warmup_share(step, steps)
        loss = grpo.update(model, optimizer, rows, options)["loss"]
        if step == 10 or step % 50 == 0:
            minutes = (time.perf_counter() - began) / step * (steps - step) / 60
            print(f"warm start: step {step} of {steps}, loss {loss:.3f} nats per token, about "
                  f"{minutes:.1f} minutes to go")


def warmup_share(step: int, steps: int) -> float:
    """The learning rate of a step of imitation, as a share of `warmup_lr`.

    It is a product of two factors. The first rises from 0 to 1 in 20 steps. The second falls from 1
    to 0.1 over all steps. With only 12 steps, the product is never above 1/6.
    """
    return min(1.0, step / 20) * (1 - 0.9 * step / steps)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(setup: Setup, final: bool = False) -> Scores:
    """Successes on held-out tasks, the same in every run.

    Returns {environment: {"sampled": [0 or 1 for each task], "greedy": [...]}}. The settings of
    this file were chosen on these tasks, though no weight was trained on them. With `final`, they
    are other held-out tasks, on which nothing was chosen (tests/evidence.py).
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


def rates(scores: Scores) -> dict[str, dict]:
    """The success rates of each environment, from what `evaluate` returns."""
    return {env: {"sampled": fmean(of["sampled"]), "interval": interval(of["sampled"]),
                  "greedy": fmean(of["greedy"]), "tasks": len(of["sampled"])}
            for env, of in scores.items()}


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


def print_scores(scores: Scores, when: str) -> None:
    for env, rate in rates(scores).items():
        low, high = rate["interval"]
        print(f"{when:>6}  {env:<16} held-out success: sampled {rate['sampled']:6.1%} "
              f"[{low:.1%}, {high:.1%}]  greedy {rate['greedy']:6.1%}  ({rate['tasks']} tasks)")


# --------------------------------------------------------------------------------------------------
# Environments and models


def make_setup(config: Config, checkpoint: Path | None = None) -> Setup:
    """Raises EnvError for an environment that cannot be used, and UserError for a model."""
    setup = Setup(config, make_envs(config), load_agent(config.agent))
    try:
        setup.model, tokenizer = load_model(setup, checkpoint)
        setup.chat, setup.engine = make_engine(setup.model, tokenizer, config)
    except ValueError as e:
        raise UserError(str(e)) from e
    return setup


def make_envs(config: Config) -> dict[str, Callable]:
    """{name: factory}, each checked against the interface."""
    envs = {env: environments.make_env(env) for env in config.env}
    for factory in envs.values():
        environments.check_env(factory)
    return envs


def load_agent(spec: str) -> Player:
    """From "FILE.py:function". Raises UserError, or EnvError if the file fails."""
    if not spec:
        return Player()
    path, _, name = spec.rpartition(":")
    module = vars(environments.load_file(Path(path))) if path.endswith(".py") else {}
    function, own = module.get(name), module.get(f"demonstrate_{name}")
    if not callable(function):
        raise UserError(f"--agent {spec}: want FILE.py:function, of a function that exists")
    if len(inspect.signature(function).parameters) == 1:  # workflow(agent)
        return Player(partial(Agent, workflow=function), demonstrator=own)
    endpoint = Endpoint()  # else solve(task, tools, base_url)
    return Player(partial(OutsideAgent, function, endpoint), endpoint, own)


def make_engine(model, tokenizer, config: Config) -> tuple[Chat, Engine]:
    """Raises ValueError for a model that cannot chat, or that the engine does not know."""
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):  # more is common: a model's vocabulary is often rounded up
        raise ValueError(f"the model knows {known} tokens and its tokenizer has {len(tokenizer)}: "
                         "they do not belong together")
    chat = make_chat(model, tokenizer)
    return chat, Engine(model, chat.stop_ids, slots=config.slots, context=config.context,
                        rejoin_window=config.rejoin_window)


def load_model(setup: Setup, checkpoint: Path | None):
    """(model, tokenizer): from a checkpoint, from a folder or hub id, or a small one made here.

    A model's own code is never run.
    """
    config = setup.config
    where, dtype = checkpoint or config.model, getattr(torch, config.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if where:
        model, tokenizer = read_model(where, wide)
    else:
        tokenizer = learn_tokenizer(setup)
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
    """Keep freed memory in this process.

    glibc returns the memory of a large tensor to the system when the tensor is freed, and asks for
    it again for the next one. With two threads, that takes a quarter of each update.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt:
        # Arenas, mmap threshold, trim threshold: mallopt(3).
        for parameter, value in ((-8, 1), (-3, 2**25), (-1, 2**31 - 1)):
            mallopt(parameter, value)


def read_model(where: Path | str, dtype: torch.dtype):
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"no causal language model at '{where}': want a Hugging Face folder, a hub "
                        f"id, or nothing for a small one ({str(e).splitlines()[0]})") from e
    # Tensors that were read from a file are not aligned in memory. Their products may differ in
    # the last bit from those of aligned ones, and a resumed run would differ, too.
    for p in model.parameters():
        p.data = p.data.clone()
    return model, tokenizer


def learn_tokenizer(setup: Setup):
    """A small tokenizer, learned from what the environments and their demonstrators write.

    Demonstrations are played with a tokenizer that has a token for each byte. Decoded again, all
    that was read and written in them is the text to learn from.
    """
    spelling = Chat(small_tokenizer([]))  # a token for each byte
    no_limits = replace(setup.config, context=10**6, max_new_tokens=10**5)
    setup = replace(setup, config=no_limits, chat=spelling)
    shown = demonstrations(setup, dict.fromkeys(setup.demonstrators, 300), start=0)
    written = [segment.ids for episode in shown for segment in episode.segments]
    for factory in setup.envs.values():
        written += prompts(spelling, factory, 50)
    decode = partial(spelling.tokenizer.decode, skip_special_tokens=True)
    return small_tokenizer(decode(ids) for ids in written)


def prompts(chat: Chat, factory: Callable, number: int) -> list[list[int]]:
    """The prompts of the first training tasks."""
    schemas = [schema(tool) for tool in tools_of(factory()).values()]
    training = islice(environments.tasks_of(factory, evaluation=False), number)
    return [chat.prompt(task, schemas) for _, task in training]


def check_fit(setup: Setup) -> None:
    """Raise UserError unless a few demonstrations play, and unless

    with --agent: one episode of each environment plays, whatever the policy makes of it;
    without: each prompt leaves room for a message.
    """
    config = setup.config
    counts = dict.fromkeys(setup.demonstrators, 10 if config.warmup_steps else 0)
    shown = demonstrations(setup, counts, start=0)
    if any(e.finish == "context" for e in shown):
        raise UserError(f"demonstrations do not fit --context {config.context}")
    check_trial(setup, shown)
    if config.agent:
        tasks = [(env, next(seeds(of, evaluation=False))) for env, of in setup.envs.items()]
        check_trial(setup, roll_out(setup, tasks, "trial", 1, 1.0))
        return
    for env, factory in setup.envs.items():
        longest = max(len(ids) for ids in prompts(setup.chat, factory, 20))
        if longest + config.max_new_tokens > config.context:
            raise UserError(f"{env}: a prompt of {longest} tokens and a message of "
                            f"{config.max_new_tokens} do not fit --context {config.context}")


def check_trial(setup: Setup, episodes: list[Episode]) -> None:
    """The part of `check_fit` that looks at episodes."""
    for e in episodes:
        if e.error and setup.config.agent:
            raise UserError(f"--agent fails: {e.error}")
        # A policy of random weights may fill the context. But its first message must fit.
        if e.finish == "context" and not any(any(segment.sampled) for segment in e.segments):
            raise UserError(f"{e.env}: a prompt does not fit --context {setup.config.context}")
        if not e.turns:
            raise UserError("--agent asked the policy nothing: does it use base_url?")


# --------------------------------------------------------------------------------------------------
# The optimizer of the warm start. It is no part of RL


class Imitator:
    """The optimizer of the warm start. It is not RL: skip it on first reading.

    AdamW works too, but needs about three times the steps. Muon trains the matrices of the small
    model's layers: it makes a step orthogonal, so that a matrix moves equally far in all
    directions. AdamW trains all other weights, and a given model. So does RL: rewards are noisy,
    and Muon moves as far along noise as along signal.

    Muon: kellerjordan.github.io/posts/muon, scaled as in arXiv 2502.16982. Not torch.optim.Muon,
    because it multiplies in bfloat16, which the CPUs of most laptops emulate slowly.
    """

    def __init__(self, model, config: Config):
        layers = [] if config.model else grpo.masters(model.base_model.layers)
        self.averages = {p: torch.zeros_like(p) for p in layers if p.ndim == 2}  # of gradients
        others = [p for p in grpo.masters(model) if p not in self.averages]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
        self.param_groups = self.adam.param_groups  # its learning rate holds for both

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        for p, average in self.averages.items():
            average.lerp_(p.grad, 0.05)
            direction = orthogonal(p.grad.lerp(average, 0.95))  # Nesterov's momentum
            # Scaled so that an entry moves as far as with Adam.
            p.sub_(direction, alpha=self.param_groups[0]["lr"] * 0.2 * max(p.shape) ** 0.5)


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


# ==================================================================================================
# Files and processes. `train` is `plain_train`, written down, resumable, in several processes.
# ==================================================================================================

RUNS = Path("runs")
METRICS, EPISODES = "metrics.jsonl", "episodes.jsonl.gz"  # files of a run that grow with every step


def train(config: Config) -> None:
    """A new run, or the rest of one that was stopped. Raises UserError for bad input."""
    began, setup = time.perf_counter(), None
    if config.resume:
        run, config = read_run(config.resume)
        if (run / "summary.json").exists():  # it is written last
            print(f"{run} is finished: there is nothing to go on with")
            return
    else:
        setup = make_setup(resolve(config))
        check_fit(setup)  # before the folder is made: bad input leaves none behind
        run = gather(make_run(setup.config))[0]  # the first process has made it
    with locked(run):
        train_and_record(run, setup or make_setup(config, newest_checkpoint(run)))
    print(f"{run}: {time.perf_counter() - began:.0f} s")


def train_and_record(run: Path, setup: Setup) -> None:
    """`plain_train` from the newest checkpoint on, and with the reference model of the KL term.

    All processes do the same in the same order. Each plays its share of the episodes
    (`play_tasks`), and computes its share of an update (grpo.py). Only the first one writes.
    """
    config, checkpoint = setup.config, newest_checkpoint(run)
    grpo.share_weights(setup.model)
    optimizer = make_optimizer(setup)
    print(f"{run}: {setup.model.num_parameters() / 1e6:.2f}M parameters, options:",
          ", ".join(f"{name} {getattr(config, name)}" for name in defaults(config)))

    if checkpoint:
        progress = restore(run, checkpoint, optimizer)
    else:
        began = time.perf_counter()
        warm_start(setup)
        warmup_seconds = time.perf_counter() - began
        progress = Progress(evaluate(setup), warmup_seconds=warmup_seconds)
        save(run, setup, progress, optimizer)
    if config.kl_coef:
        setup.reference = load_reference(run, setup.model)
    print_scores(progress.before, "before")

    ctrl_c = CtrlC()
    while progress.step < config.total_steps:
        began, counted = time.perf_counter(), token_counts(setup)
        step = train_step(setup, optimizer, progress)
        new = {name: total - counted[name] for name, total in token_counts(setup).items()}
        # Each sampled token is trained, or counted by the reason why it is not.
        grpo.check_ledger(new["sampled_tokens"], new["abandoned_tokens"], step.report)
        step.report |= new
        write_step(run, setup, step, time.perf_counter() - began)
        stop, last = any(gather(ctrl_c.pressed)), progress.step == config.total_steps
        if progress.step % config.save_every == 0 or last or stop:
            save(run, setup, progress, optimizer)
        if stop:
            how = f"stopped after step {progress.step}. To go on: python train.py --resume {run}"
            sys.exit(how if ranks()[0] == 0 else 1)

    after = evaluate(setup)
    print_scores(progress.before, "before")
    print_scores(after, "after")
    write_results(run, setup, progress, after)


def score(config: Config) -> None:
    """--eval-only: score a run's model on the held-out tasks."""
    run, stored = read_run(config.eval_only)
    folder = run / "model" if (run / "model").is_dir() else newest_checkpoint(run)
    if folder is None:
        raise UserError(f"{run} has no model yet: it stopped in its warm start, and --resume {run} "
                        "begins that again")
    stored = replace(stored, eval_tasks=config.eval_tasks, device=config.device)
    print_scores(evaluate(make_setup(stored, folder)), "score")


# --------------------------------------------------------------------------------------------------
# Records


def first_process_only(function: Callable) -> Callable:
    """Decorates what only one of several processes may do. In the others it does nothing."""
    @wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs) if ranks()[0] == 0 else None

    return wrapped


def token_counts(setup: Setup) -> dict[str, int]:
    """Tokens that the engines of all processes have sampled, and those of them in no episode."""
    stats = gather(dict(setup.engine.stats))
    return {name: sum(of.get(name, 0) for of in stats)
            for name in ("sampled_tokens", "abandoned_tokens")}


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
    return {**{name: fmean(of) for name, of in sorted(values.items())}, **finishes,
            "reward_std": fmean(pstdev(group) for group in rewards.values()),
            "context_tokens": sum(len(segment.ids) for e in episodes for segment in e.segments)}


def metric_line(m: dict) -> str:
    own = [f"{name.removeprefix('success/')} {value:.0%}" for name, value in m.items()
           if name.startswith("success/")]
    shown = ("no_signal", "turns", "entropy", "grad_norm", "skipped", "seconds")
    parts = [f"step {m['step']:3}", f"success {m['success']:4.0%}", *own]
    return "  ".join(parts + [f"{name} {m[name]:.2f}" for name in shown])


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


@first_process_only
def write_step(run: Path, setup: Setup, step: Step, seconds: float) -> None:
    """Print a step, and add it to the run's files. Every 20 steps, print an episode."""
    metrics = {"seconds": seconds, **measure(step.episodes), **step.report}
    metrics["tokens_per_second"] = metrics["sampled_tokens"] / seconds
    print(metric_line(metrics))
    number = metrics["step"]
    if number % 20 == 0:
        best = max(step.episodes, key=lambda e: (e.success, e.turns))
        print(transcript(best, setup.chat.tokenizer))
    # JSON has no NaN.
    append(run / METRICS, [{k: x if math.isfinite(x) else None for k, x in metrics.items()}])
    append(run / EPISODES, [record(*pair, number) for pair in zip(step.episodes, step.advantages)])


def append(path: Path, lines: list[dict]) -> None:
    """Add lines of JSON. To a .gz file they go as one compressed part, as gzip allows."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with writing(path), path.open("ab") as file:
        file.write(gzip.compress(data, compresslevel=5) if path.suffix == ".gz" else data)


@first_process_only
def write_results(run: Path, setup: Setup, progress: Progress, after: Scores) -> None:
    """The last files of a run. summary.json is the very last: with it the run is finished."""
    with atomic(run / "model") as folder:
        save_model(folder, setup.model, setup.chat.tokenizer)
    with atomic(run / "scores.json") as file:
        file.write_text(json.dumps({"before": progress.before, "after": after}))
    summary = {"before": rates(progress.before), "after": rates(after), "seed": setup.config.seed,
               "warmup_seconds": progress.warmup_seconds, "versions": versions()}
    with atomic(run / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=2))


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                            capture_output=True, text=True)
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": commit.stdout.strip() or "unknown"}


# --------------------------------------------------------------------------------------------------
# The folder


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


@first_process_only
def make_run(config: Config) -> Path:
    """Make the folder of a new run: runs/NAME, or the first number that is free.

    It is made under another name and renamed once it holds run.json. No folder can be renamed to
    one that holds files. So two runs that start together never share a folder.
    """
    free = (str(number) for number in count() if not (RUNS / str(number)).exists())
    with writing(RUNS / config.name):
        RUNS.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=RUNS, prefix="partial-") as temporary:
            made = Path(temporary) / "run"
            made.mkdir()
            options = {"config": asdict(config), "versions": versions()}
            (made / "run.json").write_text(json.dumps(options, indent=2))
            return made.rename(RUNS / (config.name or next(free)))


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other commands away from this run. The first of its processes holds the lock."""
    if ranks()[0] > 0:
        yield
        return
    with (run / "run.json").open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{run} is in use: another process is training it") from e
        yield


@first_process_only
def save(run: Path, setup: Setup, progress: Progress, optimizer) -> None:
    """Write a checkpoint: a Hugging Face folder of the model, and trainer.pt with all the rest.

    Of the older checkpoints the first and the newest stay.
    """
    written = {path.name: path.stat().st_size for path in run.glob("*.jsonl*")}
    saved = {"progress": asdict(progress), "optimizer": optimizer.state_dict(), "written": written}
    with atomic(run / "checkpoints" / f"step-{progress.step:06d}") as folder:
        save_model(folder, setup.model, setup.chat.tokenizer)
        torch.save(saved, folder / "trainer.pt")
    for old in sorted(run.glob("checkpoints/step-*"))[1:-KEEP]:
        shutil.rmtree(old)


def restore(run: Path, checkpoint: Path, optimizer) -> Progress:
    """Load trainer.pt into the optimizer, and cut the logs to the checkpoint."""
    saved = torch.load(checkpoint / "trainer.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    cut_off(run, saved["written"])
    return Progress(**saved["progress"])


def save_model(folder: Path, model, tokenizer) -> None:
    weights = {name: getattr(p, "master", p).detach()
               for name, p in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def load_reference(run: Path, model):
    """The model before RL, frozen. The KL term keeps the policy near it."""
    gather(None)  # wait until the first process has written it
    reference, _ = read_model(run / "checkpoints" / "step-000000", model.dtype)
    return reference.to(model.device).requires_grad_(False)


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


@first_process_only
def cut_off(run: Path, written: dict[str, int]) -> None:
    """Cut metrics and episodes to their sizes at the checkpoint. Later steps are run again."""
    for path in run.glob("*.jsonl*"):
        # Never make it longer: somebody may have emptied it.
        os.truncate(path, min(written.get(path.name, 0), path.stat().st_size))


# --------------------------------------------------------------------------------------------------
# The command


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
    signal.signal(signal.SIGTERM, stop_with_the_others)  # torchrun sends it
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def stop_with_the_others(*_) -> None:
    """End this process at once. Tools in other threads must not keep it alive."""
    sys.stderr.write(f"train.py: process {os.environ['RANK']} stops with the run; torchrun says "
                     "who was the first. To go on: torchrun ... train.py --resume RUN\n")
    os._exit(1)


def command_line() -> None:
    config, = HfArgumentParser(Config).parse_args_into_dataclasses()
    sys.stdout.reconfigure(line_buffering=True)  # into a log file, too
    transformers.utils.logging.disable_progress_bar()
    try:
        check_options(config)
        join(config)
        (score if config.eval_only else train)(config)
        if dist.is_initialized():
            dist.destroy_process_group()
    except grpo.ProcessLost:
        stop_with_the_others()
    except (UserError, EnvError, FloatingPointError) as e:  # the last: the run has diverged
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
