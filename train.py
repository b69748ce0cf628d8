"""The whole run: a model, a warm start, the RL loop, and evaluation on tasks it never saw.

    python train.py                                  # a small model, made here, learns six tasks
    python train.py --env calculator                 # one of them
    python train.py --model MODEL                    # a folder or hub id of a causal language model
    python train.py --env my_env.py:MyEnv            # an environment of yours
    python train.py --resume runs/0                  # go on after a crash or Ctrl-C
    python train.py --eval-only runs/0               # score a finished run
    torchrun --nproc-per-node 2 train.py             # several processes, one for each GPU

`train` reads like the algorithm:

    imitate demonstrations                           # most of them fail, so imitation fails, too
    repeat: choose tasks, more where more fails      # share_out
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
import errno
import fcntl
import gzip
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import IO, Literal

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from agent import Agent, Chat, Episode, Script, small_tokenizer, transcript
from env import (
    ENVIRONMENTS,
    EnvError,
    check_env,
    demonstrator,
    make_env,
    seeds,
    task_hash,
    tasks_of,
)
from grpo import (
    GRPOConfig,
    ProcessLost,
    compute_in,
    episode_rows,
    gather,
    make_rows,
    masters,
    option,
    ranks,
    recompute_layers,
    share_weights,
    update,
)
from rollout import Engine, play, small_model
from tools import schema, tools_of

RUNS = Path("runs")
METRICS, EPISODES = "metrics.jsonl", "episodes.jsonl.gz"  # files of a run that grow with every step
KEEP = 3  # newest checkpoints that stay, beside the first

WARM_BATCH = 44  # demonstrations per update of the warm start
MOST_DEMONSTRATIONS = 12000  # different ones; after that they are shown again
# How often an environment is demonstrated, relative to the others: what is hard to learn, often;
# what has long messages, seldom. Other environments: as often as the calculator.
DEMONSTRATED = {"calculator": 12, "lookup": 7, "maze": 31, "chain": 20, "recall": 3,
                "mastermind": 4}

TIMED_UPDATES = 10  # after these the run says how long it will take
# What an RL step and an evaluated episode take, in updates of the warm start (measured).
UPDATES_PER_STEP, UPDATES_PER_EPISODE = 7, 0.055

# Options whose best value depends on the model: one of random weights, or one that knows language.
SMALL_MODEL = {"lr": 2.5e-4, "epochs": 3, "temperature": 1.1, "warmup_lr": 6e-3,
               "warmup_steps": 110, "context": 336}
GIVEN_MODEL = {"lr": 5e-5, "epochs": 1, "temperature": 1.0, "warmup_lr": 1e-4,
               "warmup_steps": 12, "context": 700}


def by_model(name: str, text: str):
    """An option whose default is in the tables above."""
    return option(None, f"{text} ({SMALL_MODEL[name]}; with --model {GIVEN_MODEL[name]})")


@dataclass
class Config(GRPOConfig):
    """Every option of a run, with those of the update (grpo.py)."""

    env: list[str] = field(default_factory=lambda: [*ENVIRONMENTS], metadata={
        "help": "environments: NAME, NAME:argument=value,..., or FILE.py:Class"})
    model: str = option("", "folder or hub id of a causal language model; empty: a small one")
    name: str = option("", "name of the run's folder under runs/; empty: the next number")
    seed: int = option(0, "of weights, tasks and sampling")
    steps: int = option(15, "updates by reinforcement learning, times the number of environments")
    tasks_per_step: int = option(18, "tasks per update, shared out among the environments")
    group_size: int = option(8, "attempts at each task")
    lr: float | None = by_model("lr", "learning rate of these updates; it falls to 0")
    epochs: int | None = by_model("epochs", "updates per batch of episodes")
    negative_weight: float | None = option(
        None, "factor of advantages below 0 (1, as in GRPO; 0.1 where the small model learns "
        "built-in environments)")
    warmup_steps: int | None = by_model(
        "warmup_steps", "updates by imitation before that, times the number of environments")
    warmup_lr: float | None = by_model(
        "warmup_lr", "learning rate at the peak of those; it falls to a tenth")
    max_turns: int = option(10, "messages the model may write in an episode")
    max_new_tokens: int = option(64, "tokens in one message")
    context: int | None = by_model("context", "tokens in one segment, the newest message included")
    slots: int | None = option(None, "contexts decoded at once (all of a step, but at most 128)")
    rejoin_window: float | None = option(
        None, "seconds to wait for quick tools after each message, so that a run repeats bit by "
        "bit (0.25 for built-in environments, else 0)")
    tool_timeout: float = option(10.0, "seconds a tool call may take")
    temperature: float | None = by_model("temperature", "of sampling in training")
    eval_tasks: int = option(200, "held-out tasks per environment, before and after")
    eval_only: str = option("", "RUN: only score the model of this run")
    resume: str = option("", "RUN: go on from its newest checkpoint; the run's own options hold")
    save_every: int = option(20, "updates between checkpoints")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: Literal["float32", "bfloat16", "float64"] = option(
        "float32", "to compute in; the weights that are trained are float32 at least")
    recompute: bool = option(False, "keep only each layer's input for the backward pass: "
                             "less memory, a third more products")

    @property
    def updates(self) -> int:
        """By reinforcement learning, in all."""
        return self.steps * len(self.env)

    @property
    def warmup_updates(self) -> int:
        """By imitation, in all."""
        return self.warmup_steps * len(self.env)


def resolve(config: Config) -> Config:
    """A value in place of each None. What the user gave stays.

    A negative_weight below 1 makes learning seek risk. With rewards that are graded or noisy, it
    may prefer 1 with probability 0.4 to a sure 0.6. The built-in tasks can all be solved, and the
    small model learns them in fewer steps with 0.1.
    """
    built_in = all(spec.partition(":")[0] in ENVIRONMENTS for spec in config.env)
    defaults = {
        **(GIVEN_MODEL if config.model else SMALL_MODEL),
        "negative_weight": 0.1 if built_in and not config.model else 1.0,
        "slots": min(128, config.tasks_per_step * config.group_size),
        "rejoin_window": 0.25 if built_in else 0.0,  # their tools take microseconds
    }
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, **missing)


AT_LEAST = {
    "seed": 0, "steps": 0, "tasks_per_step": 1, "group_size": 2, "epochs": 1, "pack_tokens": 1,
    "normaliser_tokens": 1, "warmup_steps": 0, "max_turns": 1, "max_new_tokens": 1, "context": 1,
    "slots": 1, "eval_tasks": 1, "save_every": 1, "rejoin_window": 0, "lr": 0, "warmup_lr": 0,
    "negative_weight": 0, "turn_credit": 0, "eps_low": 0, "eps_high": 0, "dual_clip": 1,
    "kl_coef": 0, "entropy_coef": 0,
}
ABOVE_0 = ("temperature", "tool_timeout", "max_grad_norm", "tis_cap")


def check_options(config: Config) -> None:
    """Raise UserError for a number that makes no sense: better now than after the warm start."""
    for name, value in asdict(config).items():
        if not isinstance(value, (int, float)):
            continue
        said = f"--{name.replace('_', '-')} {value}"
        if not math.isfinite(value):
            raise UserError(f"{said}: want a finite number")
        if value < AT_LEAST.get(name, -math.inf):
            raise UserError(f"{said}: want at least {AT_LEAST[name]}")
        if name in ABOVE_0 and value <= 0:
            raise UserError(f"{said}: want more than 0")


def train(config: Config) -> None:
    # ----------------------------------------------------------------------------------------------
    # The run's folder, the environments, the model

    clock, first = Clock(), ranks()[0] == 0
    # One answer for all processes: nobody makes the folder before all have looked.
    run, config = gather(open_run(config))[0]
    if run and (run / "summary.json").exists():  # it is written last
        print(f"{run} is finished: there is nothing to go on with")
        return
    lock = lock_run(run) if run and first else None  # held until this process ends
    factories = make_envs(config)
    checkpoint = newest_checkpoint(run) if run else None
    if run and not checkpoint and (run / METRICS).exists():  # to begin again would cut its files
        raise UserError(f"{run} has lost its checkpoints: there is nothing to go on from")
    model, tokenizer = load_model(config, factories, checkpoint)
    chat, engine = make_engine(model, tokenizer, config)
    check_fit(chat, factories, config)
    if not run:  # only now: bad input leaves no folder behind
        run, lock = make_run(config) if first else (None, None)
        run = gather(run)[0]
    share_weights(model)
    optimizer = torch.optim.AdamW(masters(model), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    print_start(run, model, tokenizer, config)

    # ----------------------------------------------------------------------------------------------
    # Warm start: imitate demonstrations, right ones and wrong ones

    if checkpoint is None:
        clock.start("warm start")
        imitate(model, chat, factories, config)
        clock.start("evaluation")
        before = evaluate(engine, chat, factories, config)
        first_task = (config.seed + 1) * 10**6
        state = {"step": 0, "tokens": 0, "written": {}, "before": before,
                 "success": dict.fromkeys(factories, 0.0),
                 "cursor": dict.fromkeys(factories, first_task)}
        save(run, state, clock, model, tokenizer, optimizer)
    else:
        state = torch.load(checkpoint / "trainer.pt", weights_only=True)
        optimizer.load_state_dict(state.pop("optimizer"))
        clock.seconds.update(state.pop("seconds"))
    if first:
        forget_after(run, state["written"])
    print_scores(state["before"], "before")
    reference = load_reference(model, run) if config.kl_coef else None

    # ----------------------------------------------------------------------------------------------
    # The loop: roll out, compare within groups, update

    ctrl_c = CtrlC()
    steps = range(state["step"] + 1, config.updates + 1)
    for step in tqdm(steps, desc="RL", initial=state["step"], total=config.updates, leave=False,
                     disable=not first):
        began = time.perf_counter()
        clock.start("rollouts")
        specs = share_out(state["success"], config.tasks_per_step)
        tasks = [(spec, next_seed(factories[spec], state["cursor"], spec)) for spec in specs]
        episodes = roll_out(engine, chat, factories, config, tasks, step)

        clock.start("update")
        rows, advantages, signal_report = make_rows(episodes, config)
        lr = config.lr * (1 - (step - 1) / config.updates) ** 2
        optimizer.param_groups[0]["lr"] = lr
        report = update(model, optimizer, rows, config, config.temperature, reference)

        clock.start("log")
        metrics = {"step": step, "seconds": time.perf_counter() - began, **measure(episodes),
                   **signal_report, **report, "lr": lr}
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / metrics["seconds"]
        state["step"], state["tokens"] = step, state["tokens"] + metrics["sampled_tokens"]
        state["success"] = recent_success(state["success"], metrics)
        if first:
            append(run / METRICS, [metrics])
            append(run / EPISODES, [record(e, a, step) for e, a in zip(episodes, advantages)])
        tqdm.write(metric_line(metrics))
        if step % 20 == 0:
            best = max(episodes, key=lambda e: (e.success, e.turns))
            tqdm.write(transcript(best, tokenizer))
        stop = any(gather(ctrl_c.pressed))
        if step % config.save_every == 0 or step == config.updates or stop:
            save(run, state, clock, model, tokenizer, optimizer)
        if stop:
            how = f"stopped after step {step}. To go on: python train.py --resume {run}"
            sys.exit(how if first else 1)

    # ----------------------------------------------------------------------------------------------
    # What it learned: evaluation and summary

    clock.start("evaluation")
    after = evaluate(engine, chat, factories, config)
    if not first:
        return
    with whole_folder(run / "model") as folder:
        save_model(folder, model, tokenizer)
    clock.start("end")
    print_scores(state["before"], "before")
    print_scores(after, "after")
    write_json(run / "scores.json", {"before": state["before"], "after": after})
    write_json(run / "summary.json", summarise(state, after, clock, config))
    phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in clock.seconds.items())
    print(f"{run}: {clock.total():.0f} s: {phases}")
    lock.close()


def score(config: Config) -> None:
    """--eval-only: score a run's model on the held-out tasks."""
    run, stored = read_run(config.eval_only)
    folder = run / "model" if (run / "model").is_dir() else newest_checkpoint(run)
    if folder is None:
        raise UserError(f"{run} has no model yet: it stopped in its warm start, and --resume {run} "
                        "begins that again")
    factories = make_envs(stored)
    stored = replace(stored, eval_tasks=config.eval_tasks, device=config.device)
    chat, engine = make_engine(*load_model(stored, factories, folder), stored)
    print_scores(evaluate(engine, chat, factories, stored), "score")


def make_envs(config: Config) -> dict[str, Callable]:
    """{name: factory}, each checked against the interface."""
    for spec, times in Counter(config.env).items():
        if times > 1:
            raise UserError(f"--env names {spec} twice: each has its share of the tasks already")
    factories = {spec: make_env(spec) for spec in config.env}
    for factory in factories.values():
        check_env(factory)
    return factories


def make_engine(model, tokenizer, config: Config) -> tuple[Chat, Engine]:
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):  # the other way round is common: vocabularies are rounded up
        raise UserError(f"the model knows {known} tokens and its tokenizer has {len(tokenizer)}: "
                        "they do not belong together")
    ends = model.generation_config.eos_token_id  # Llama 3 has several, its tokenizer knows one
    ends = ends if isinstance(ends, list) else [ends]
    try:
        chat = Chat(tokenizer, set(ends) - {None})
        engine = Engine(model, chat.stop_ids, slots=config.slots, context=config.context,
                        rejoin_window=config.rejoin_window)
    except ValueError as e:
        raise UserError(str(e)) from e
    return chat, engine


def load_reference(model, run: Path):
    """The model before RL, frozen: the KL term keeps the policy near it."""
    gather(None)  # the first process has written it by then
    start = run / "checkpoints" / "step-000000"
    reference = AutoModelForCausalLM.from_pretrained(start, dtype=model.dtype)
    return reference.to(model.device).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Rolling out


def roll_out(engine: Engine, chat: Chat, factories: dict, config: Config,
             tasks: list[tuple[str, int]], step: int | str, size: int = 0,
             temperature: float | None = None) -> list[Episode]:
    """`size` attempts at each (environment, seed), in that order.

    Every attempt has a random stream of its own, which follows from its name. So there is no random
    state to save, and a step follows from its number, the weights and the cursor.
    """
    size = size or config.group_size
    temperature = config.temperature if temperature is None else temperature
    engine.forget()  # a resumed run has not read what was read in the step before

    async def attempt(group: int, spec: str, seed: int, member: int) -> Episode:
        agent = make_agent(engine, chat, config, temperature)
        rng = Random(f"{config.seed} {step} {spec} {seed} {member}")
        episode = await agent.run(factories[spec], seed, rng)
        episode.env, episode.group, episode.member = spec, group, member
        return episode

    starts = []
    for group, (spec, seed) in enumerate(tasks):
        starts += [partial(attempt, group, spec, seed, member) for member in range(size)]
    episodes = play_together(starts, engine.slots, size, engine)
    if all(e.error for e in episodes):  # else a run would learn nothing until its steps are spent
        raise UserError(f"the environment failed in every episode of step {step}: "
                        f"{episodes[0].error}")
    return episodes


def make_agent(llm, chat: Chat, config: Config, temperature: float = 1.0) -> Agent:
    return Agent(llm, chat, max_turns=config.max_turns, max_new_tokens=config.max_new_tokens,
                 context=config.context, temperature=temperature, tool_timeout=config.tool_timeout)


def play_together(starts: list, at_once: int, size: int = 1,
                  engine: Engine | None = None) -> list[Episode]:
    """`play`, of which each process does its share, by groups of `size`. All get all episodes."""
    rank, world = ranks()
    players = [i // size % world for i in range(len(starts))]
    own = [start for start, player in zip(starts, players) if player == rank]
    shares = [iter(share) for share in gather(play(own, at_once, engine))]
    return [next(shares[player]) for player in players]  # in the order of `starts`


def share_out(success: dict[str, float], tasks: int) -> list[str]:
    """The environments of a step's tasks: one task each, the others where most attempts fail.

    None gets more than twice its even share. Where every attempt fails, the rewards of a group are
    equal and teach nothing. Without a bound, a hopeless environment takes most of every step.

    >>> share_out({"easy": 1.0, "hard": 0.5, "hopeless": 0.0}, 7)
    ['easy', 'hard', 'hard', 'hopeless', 'hopeless', 'hopeless', 'hopeless']
    """
    most = math.ceil(2 * tasks / len(success))
    counts = Counter(list(success) if tasks >= len(success) else ())

    def need(spec: str) -> float:
        return (1.05 - success[spec]) / (counts[spec] + 1)

    while counts.total() < tasks:
        counts[max((spec for spec in success if counts[spec] < most), key=need)] += 1
    return [spec for spec in success for _ in range(counts[spec])]


def recent_success(success: dict[str, float], metrics: dict) -> dict[str, float]:
    """A moving average. A step in which all attempts of an environment crashed changes nothing."""
    now = {spec: metrics.get(f"success/{spec}", old) for spec, old in success.items()}
    return {spec: old + 0.5 * (now[spec] - old) for spec, old in success.items()}


def next_seed(factory: Callable, cursor: dict[str, int], spec: str) -> int:
    """The next training task of an environment. `cursor` remembers how far the run has come."""
    seed = next(seeds(factory, evaluation=False, start=cursor[spec]))
    cursor[spec] = seed + 1
    return seed


def evaluate(engine: Engine, chat: Chat, factories: dict, config: Config,
             final: bool = False) -> dict[str, dict[str, list[int]]]:
    """Successes on held-out tasks, the same in every run.

    {environment: {"sampled": [0 or 1 for each task], "greedy": [...]}}. `final`: on the tasks that
    no setting was chosen on (tests/evidence.py).
    """
    tasks = []
    for spec, factory in factories.items():
        held_out = seeds(factory, evaluation=True, final=final)
        tasks += [(spec, seed) for seed in islice(held_out, config.eval_tasks)]
    scores = {spec: {} for spec in factories}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        episodes = roll_out(engine, chat, factories, config, tasks, "evaluation", size=1,
                            temperature=temperature)
        for spec in factories:
            scores[spec][how] = [int(e.success) for e in episodes if e.env == spec]
    return scores


# --------------------------------------------------------------------------------------------------
# Warm start


def any_episode(episode: Episode) -> bool:
    return True


def demonstrations(chat: Chat, factories: dict, config: Config, counts: dict[str, int], start: int,
                   keep: Callable[[Episode], bool] = any_episode) -> list[Episode]:
    """`counts` demonstrations of each environment, evenly mixed, for tasks from seed `start` on.

    Only those that `keep` accepts. Raises UserError if a demonstrator fails.
    """
    shown = []
    for spec, wanted in counts.items():
        episodes, cursor = [], {spec: start}
        while len(episodes) < wanted:
            missing = range(wanted - len(episodes))
            chosen = [next_seed(factories[spec], cursor, spec) for _ in missing]
            starts = [partial(demonstrate, chat, factories[spec], config, seed) for seed in chosen]
            try:
                episodes += filter(keep, play_together(starts, at_once=64))
            except ValueError as e:
                raise UserError(f"{spec}: its demonstrator fails: {e}") from e
        shown.append(episodes)
    return mixed(shown)


async def demonstrate(chat: Chat, factory: Callable, config: Config, seed: int) -> Episode:
    """One episode in which a demonstrator plays the policy, through the same agent loop."""
    env, rng = factory(), Random(f"demonstration {config.seed} {seed}")
    script = Script(chat, demonstrator(factory)(env, rng))
    return await make_agent(script, chat, config).run(env, seed)


def mixed(columns: list[list]) -> list:
    """The items of all lists, evenly mixed.

    >>> mixed([["a1", "a2"], ["b1", "b2", "b3", "b4"]])
    ['a1', 'b1', 'b2', 'a2', 'b3', 'b4']
    """
    placed = []
    for column in columns:
        placed += [(i / len(column), item) for i, item in enumerate(column)]
    placed.sort(key=lambda pair: pair[0])  # stable: at equal places, the order of the lists
    return [item for _, item in placed]


def demonstration_counts(factories: dict, config: Config) -> dict[str, int]:
    """How many demonstrations of each environment that has a demonstrator."""
    shown = [spec for spec, factory in factories.items() if demonstrator(factory)]
    weights = {spec: DEMONSTRATED.get(spec.partition(":")[0], 12) for spec in shown}
    most = min(config.warmup_updates * WARM_BATCH, MOST_DEMONSTRATIONS)
    return {spec: round(most * weight / sum(weights.values())) for spec, weight in weights.items()}


def imitate(model, chat: Chat, factories: dict, config: Config,
            keep: Callable[[Episode], bool] = any_episode, seconds: float = math.inf) -> None:
    """Make the demonstrators' messages likelier: the policy gradient with advantage 1 for all."""
    counts = demonstration_counts(factories, config)
    shown = demonstrations(chat, factories, config, counts, (config.seed + 1) * 10**9, keep)
    if not shown:
        print("no demonstrators beside these environments: no warm start")
        return
    options = replace(config, kind="reinforce", epochs=1, normaliser="token", kl_coef=0.0,
                      entropy_coef=0.0, tis_cap=None)
    right = sum(e.success for e in shown) / len(shown)
    print(f"warm start: {len(shown)} demonstrations, {right:.0%} of them right")
    optimizer, began = Imitator(model, config), time.perf_counter()
    for step in tqdm(range(1, config.warmup_updates + 1), desc="warm start", leave=False,
                     disable=ranks()[0] > 0):
        begin = (step - 1) * WARM_BATCH
        rows = []
        for number in range(WARM_BATCH):
            episode = shown[(begin + number) % len(shown)]
            rows += episode_rows(episode, number, [1.0] * episode.turns)
        optimizer.set_lr(step)
        report = update(model, optimizer, rows, options)
        spent = time.perf_counter() - began
        if step == TIMED_UPDATES:
            tqdm.write(estimate(spent / step, config))
        if step % 100 == 0:
            tqdm.write(f"warm start {step}: {report['loss']:.3f} nats per token, "
                       f"entropy {report['entropy']:.3f}")
        if spent > seconds:
            return


def estimate(update_seconds: float, config: Config) -> str:
    """How long a run will take, from the seconds of an update of the warm start.

    >>> estimate(0.2, resolve(Config()))
    'on this machine the warm start takes about 2 minutes, the whole run about 5'
    """
    evaluations = 4 * config.eval_tasks * len(config.env)  # before and after, sampled and greedy
    rest = UPDATES_PER_STEP * config.updates + UPDATES_PER_EPISODE * evaluations
    warm, whole = config.warmup_updates, config.warmup_updates + rest
    minutes = [max(1, round(updates * update_seconds / 60)) for updates in (warm, whole)]
    return (f"on this machine the warm start takes about {minutes[0]} minutes, "
            f"the whole run about {minutes[1]}")


class Imitator:
    """The optimizer of the warm start.

    The weights of the small model begin random. Muon on the matrices of its layers learns to copy
    in a third of the updates. All other weights have AdamW. So has the RL loop: rewards are noisy,
    and Muon steps as far along noise as along signal. Both take the same learning rate.
    """

    def __init__(self, model, config: Config):
        self.config = config
        layers = [] if config.model else masters(model.base_model.layers)
        matrices = [p for p in layers if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in masters(model) if id(p) not in chosen]
        self.parts = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]
        if matrices:
            self.parts.append(Muon(matrices))

    def set_lr(self, step: int) -> None:
        """20 steps up to the peak, then down to a tenth of it."""
        share = min(1.0, step / 20) * (1 - 0.9 * step / self.config.warmup_updates)
        for part in self.parts:
            part.param_groups[0]["lr"] = self.config.warmup_lr * share

    def step(self) -> None:
        for part in self.parts:
            part.step()


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a matrix moves equally far in all directions.

    kellerjordan.github.io/posts/muon, scaled as in arXiv 2502.16982. Not torch.optim.Muon: it
    multiplies in bfloat16, which most laptops' CPUs emulate slowly.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        group, by_shape = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            by_shape[p.shape].append(p)
        for shape, matrices in by_shape.items():
            directions = [self._direction(p, group["momentum"]) for p in matrices]
            size = 0.2 * max(shape) ** 0.5  # an entry moves as far as with Adam
            for p, direction in zip(matrices, orthogonal(torch.stack(directions))):
                p.add_(direction, alpha=-group["lr"] * size)

    def _direction(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's momentum. Updates the average of p's gradients."""
        average = self.state[p].setdefault("average", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices [K, M, N] with the same singular vectors, and singular values near 1.

    Five steps of a Newton-Schulz iteration.

    >>> orthogonal(torch.tensor([[[0.01, 0.0], [0.0, 0.02]]])).round(decimals=1)
    tensor([[[1.1000, 0.0000],
             [0.0000, 0.7000]]])
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x  # Keller Jordan's coefficients
    return x


# --------------------------------------------------------------------------------------------------
# Models


def load_model(config: Config, factories: dict, checkpoint: Path | None):
    """(model, tokenizer): of a checkpoint, of a folder or hub id, or made here.

    Remote code is never run.
    """
    where, dtype = checkpoint or config.model, getattr(torch, config.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if where:
        model, tokenizer = read_model(where, wide)
    else:
        tokenizer = gather(learn_tokenizer(factories, config))[0]
        model = small_model(len(tokenizer), config.seed).to(wide)
    model.to(config.device)
    if not config.model and config.device == "cpu":
        # Its operations are too short to share the cores. grpo.py computes packs side by side.
        torch.set_num_threads(1)
        keep_memory()
    compute_in(model, dtype)
    if config.recompute:
        try:
            recompute_layers(model)
        except ValueError as e:
            raise UserError(f"--recompute: {e}") from e
    return model, tokenizer


def keep_memory() -> None:
    """Keep freed memory in this process. Else 40,000 page faults take a quarter of every update.

    glibc gives the memory of a large tensor back to the system when the tensor is freed, and asks
    for it again for the next one.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        return
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # their numbers: see mallopt(3)
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_threshold, 2**25)
    libc.mallopt(trim_threshold, 2**31 - 1)


def read_model(where: Path | str, dtype: torch.dtype):
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"no causal language model at '{where}': want a Hugging Face folder, "
                        f"a hub id, or nothing for a small one ({reason})") from e
    # Tensors of a file begin at odd addresses, where products differ in the last bit.
    for p in model.parameters():
        p.data = p.data.clone()
    return model, tokenizer


def learn_tokenizer(factories: dict, config: Config):
    """A small tokenizer, learned from what the environments and their demonstrators write."""
    spell = Chat(small_tokenizer([]))  # byte by byte
    wide = replace(config, context=10**6, max_new_tokens=10**5)
    counts = {spec: 300 for spec, factory in factories.items() if demonstrator(factory)}
    written = [segment.ids for episode in demonstrations(spell, factories, wide, counts, start=0)
               for segment in episode.segments]
    for factory in factories.values():
        for task in first_tasks(factory, 50):
            written.append(spell.prompt(task, schemas_of(factory)))
    return small_tokenizer(spell.tokenizer.decode(ids, skip_special_tokens=True) for ids in written)


def schemas_of(factory: Callable) -> list[dict]:
    return [schema(tool) for tool in tools_of(factory()).values()]


def first_tasks(factory: Callable, count: int) -> list[str]:
    """The first training tasks."""
    return [task for _, task in islice(tasks_of(factory, evaluation=False), count)]


def check_fit(chat: Chat, factories: dict, config: Config) -> None:
    """Raise UserError if a task cannot fit the context, or a demonstrator fails.

    Better now than in an hour.
    """
    for spec, factory in factories.items():
        schemas = schemas_of(factory)
        for task in first_tasks(factory, 20):
            tokens = len(chat.prompt(task, schemas))
            if tokens + config.max_new_tokens > config.context:
                raise UserError(f"{spec}: a prompt of {tokens} tokens and a message of "
                                f"{config.max_new_tokens} do not fit --context {config.context}; "
                                f"task: {task[:80]!r}")
        if config.warmup_steps and demonstrator(factory):
            demonstrations(chat, factories, config, {spec: 10}, start=0)


# --------------------------------------------------------------------------------------------------
# Records


def measure(episodes: list[Episode]) -> dict[str, float]:
    """A step's episodes as numbers: means over episodes, without those whose environment failed."""
    sound = [e for e in episodes if not e.error]
    by_group = defaultdict(list)
    for e in sound:
        by_group[e.group].append(e.reward)
    numbers = {"reward": mean([e.reward for e in sound]),
               "success": mean([e.success for e in sound]),
               "reward_std": mean([np.std(rewards) for rewards in by_group.values()])}
    for name in ("turns", "thinking", "tool_calls", "tool_errors"):
        numbers[name] = mean([getattr(e, name) for e in sound])
    segments = [segment for e in episodes for segment in e.segments]
    numbers["sampled_tokens"] = sum(sum(segment.sampled) for segment in segments)
    numbers["context_tokens"] = sum(len(segment.ids) for segment in segments)
    for spec in sorted({e.env for e in sound}):
        numbers |= measure_env(spec, [e for e in sound if e.env == spec])
    for reason, times in sorted(Counter(e.finish for e in episodes).items()):
        numbers[f"finish/{reason}"] = times / len(episodes)
    return numbers


def measure_env(spec: str, episodes: list[Episode]) -> dict[str, float]:
    numbers = {f"success/{spec}": mean([e.success for e in episodes])}
    values = defaultdict(list)
    for e in episodes:
        for name, value in e.behaviour.items():
            values[name].append(value)
    return numbers | {f"behaviour/{spec}/{name}": mean(of) for name, of in values.items()}


def mean(values: list) -> float:
    return float(np.mean(values)) if values else math.nan


def metric_line(m: dict) -> str:
    own = "  ".join(f"{name.removeprefix('success/')} {value:4.0%}" for name, value in m.items()
                    if name.startswith("success/"))
    skipped = " SKIPPED" if m["skipped"] else ""
    return (f"step {m['step']:3d}  success {m['success']:4.0%}  {own}  "
            f"no signal {m['no_signal']:4.0%}  turns {m['turns']:.1f}  entropy {m['entropy']:.2f}  "
            f"|g| {m['grad_norm']:.2f}{skipped}  {m['seconds']:.1f} s")


def record(e: Episode, advantage: float, step: int) -> dict:
    """An episode as a line of episodes.jsonl.gz. No token is lost, so it can be read back:

        tokenizer = AutoTokenizer.from_pretrained("runs/0/checkpoints/step-000000")
        for line in gzip.open("runs/0/episodes.jsonl.gz", "rt"):
            episode = json.loads(line)
            segments = [Segment(**s) for s in episode["segments"]]
            print(episode["reward"], tokenizer.decode(segments[0].ids))
    """
    return {"step": step, "env": e.env, "seed": e.seed, "task": task_hash(e.task),
            "group": e.group, "member": e.member, "reward": e.reward, "advantage": advantage,
            "success": e.success, "finish": e.finish, "error": e.error, "turns": e.turns,
            "segments": [asdict(segment) for segment in e.segments]}


def append(path: Path, lines: list[dict]) -> None:
    """Add lines of JSON. To a .gz file they go as one compressed part, as gzip allows."""
    rows = [json.dumps({name: finite(x) for name, x in line.items()}) + "\n" for line in lines]
    data = "".join(rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=5)
    with writing(path), path.open("ab") as file:
        file.write(data)
    sync(path)  # before the checkpoint that counts on these lines


def finite(value):
    """NaN and infinity are not JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(successes: list[int]) -> list[float]:
    """95 % interval of a success rate (Wilson).

    >>> [round(x, 3) for x in interval([1] * 95 + [0] * 5)]
    [0.888, 0.978]
    """
    n, p, z = len(successes), rate(successes), 1.96
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def rate(successes: list[int]) -> float:
    return sum(successes) / len(successes)


def print_start(run: Path | None, model, tokenizer, config: Config) -> None:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{run}: {parameters:.2f}M parameters, {len(tokenizer)} tokens, {config.device}, "
          f"environments {', '.join(config.env)}")
    resolved = (*SMALL_MODEL, "negative_weight", "slots", "rejoin_window")
    print("options: " + ", ".join(f"{name} {getattr(config, name)}" for name in resolved))


def print_scores(scores: dict, when: str) -> None:
    for spec, s in scores.items():
        low, high = interval(s["sampled"])
        tqdm.write(f"{when:>6}  {spec:<16} held-out success: sampled {rate(s['sampled']):6.1%} "
                   f"[{low:.1%}, {high:.1%}]  greedy {rate(s['greedy']):6.1%}  "
                   f"({len(s['sampled'])} tasks)")


def summarise(state: dict, after: dict, clock: "Clock", config: Config) -> dict:
    environments = {}
    for spec in after:
        old, new = state["before"][spec], after[spec]
        environments[spec] = {
            "before": rate(old["sampled"]), "after": rate(new["sampled"]),
            "before_greedy": rate(old["greedy"]), "after_greedy": rate(new["greedy"]),
            "ci_after": interval(new["sampled"]), "tasks": len(new["sampled"])}
    return {"seconds": {"total": clock.total(), **clock.seconds}, "environments": environments,
            "tokens": state["tokens"], "seed": config.seed, "versions": versions()}


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                            capture_output=True, text=True)
    return {"python": platform.python_version(), "torch": torch.__version__,
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


def open_run(config: Config) -> tuple[Path | None, Config]:
    """The folder to go on with (None: a new run, see `make_run`), and the options that hold."""
    if config.resume:
        return read_run(config.resume)
    if config.name and (RUNS / config.name).exists():
        raise UserError(taken(config.name))
    return None, resolve(config)


def taken(name: str) -> str:
    return f"{RUNS / name} exists: choose another --name, or --resume {RUNS / name}"


def read_run(name: str) -> tuple[Path, Config]:
    run = Path(name)
    if not (run / "run.json").is_file():
        there = ", ".join(str(p.parent) for p in sorted(RUNS.glob("*/run.json")))
        raise UserError(f"no run at '{name}': choose from {there or '(no runs yet)'}")
    try:
        options = Config(**json.loads((run / "run.json").read_text())["config"])
    except (LookupError, TypeError, ValueError) as e:
        raise UserError(f"{run / 'run.json'} does not hold the options of a run of this version "
                        f"({e})") from e
    return run, resolve(replace(options, resume=name))


def make_run(config: Config) -> tuple[Path, IO]:
    """(folder, lock) of a new run. The folder appears with its run.json, whole and locked.

    It is made under another name and then renamed. A folder cannot be renamed onto one that is not
    empty. So two runs that start together get a folder each.
    """
    wanted = RUNS / (config.name or "new")
    partial_run = wanted.with_name(f"partial-{wanted.name}-{os.getpid()}")
    with writing(partial_run):
        partial_run.mkdir(parents=True)
        try:
            write_json(partial_run / "run.json", {"config": asdict(config), "versions": versions()})
            lock = lock_run(partial_run)
            run = rename_to_free(partial_run, config.name)
            for parent in (run.parent, run.parent.parent):  # the names, too; both may be new
                sync(parent)
            return run, lock
        finally:
            shutil.rmtree(partial_run, ignore_errors=True)  # if it failed


def rename_to_free(folder: Path, name: str) -> Path:
    """Move `folder` to runs/NAME. Without a name: to the first number behind all others."""
    numbers = [int(p.name) for p in RUNS.glob("*") if p.name.isdigit()]
    for free in [name] if name else map(str, count(max(numbers, default=-1) + 1)):
        try:
            return folder.rename(RUNS / free)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise UserError(taken(name))


def lock_run(run: Path) -> IO:
    """Keep other processes from going on with this run, until this process ends."""
    with writing(run / "run.json"):
        file = (run / "run.json").open("r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{run} is in use: another process is training it") from e
        return file


def save(run: Path, state: dict, clock: Clock, model, tokenizer, optimizer) -> None:
    """A checkpoint: all that a run needs to go on, in a folder that is also the model's.

    Of the older ones the first and the newest stay. Only the first process writes.
    """
    if ranks()[0] > 0:
        return
    sizes = {name: (run / name).stat().st_size for name in (METRICS, EPISODES)
             if (run / name).exists()}
    state = {**state, "seconds": dict(clock.seconds), "optimizer": optimizer.state_dict(),
             "written": sizes}
    checkpoints = run / "checkpoints"
    with whole_folder(checkpoints / f"step-{state['step']:06d}") as folder:
        save_model(folder, model, tokenizer)
        torch.save(state, folder / "trainer.pt")
    for old in sorted(checkpoints.glob("step-*"))[1:-KEEP]:
        shutil.rmtree(old)


def save_model(folder: Path, model, tokenizer) -> None:
    weights = {name: getattr(p, "master", p).detach()
               for name, p in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def newest_checkpoint(run: Path) -> Path | None:
    """None if there is none yet. A folder under its final name is whole: see `whole_folder`."""
    return max((run / "checkpoints").glob("step-*"), default=None)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill. It gets its final name when it is full, so nobody sees it half-written."""
    partial_folder = final.with_name(f"partial-{final.name}")
    with writing(final):
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        try:
            yield partial_folder
            for path in [*partial_folder.rglob("*"), partial_folder]:
                sync(path)
            shutil.rmtree(final, ignore_errors=True)  # the run did not get to its summary
            os.replace(partial_folder, final)
            for parent in (final.parent, final.parent.parent):  # the names, too; both may be new
                sync(parent)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)  # if it failed: the disk may be full


def write_json(path: Path, value: dict) -> None:
    partial_file = path.with_name(f"partial-{path.name}")
    with writing(path):
        partial_file.write_text(json.dumps(value, indent=2))
        sync(partial_file)
        os.replace(partial_file, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk holds it, so that a power failure does not lose it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one clear line. torch and safetensors raise their own errors."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
        raise UserError(f"cannot write {path}: {e} ({free / 1e6:.0f} MB are free). What was saved "
                        "before is whole; once there is room, --resume goes on from there") from e


def forget_after(run: Path, written: dict[str, int]) -> None:
    """Cut the files that grow to their sizes at the checkpoint. Later steps will be made again."""
    for path in (run / METRICS, run / EPISODES):
        if path.exists():
            size = written.get(path.name, 0)
            os.truncate(path, min(size, path.stat().st_size))  # somebody may have moved it away


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


class UserError(ValueError):
    """Something the user can mend. Shown as one line."""


def join(config: Config) -> None:
    """Meet the other processes, if torchrun has started several.

    torchrun ends all of them when one has died. So nobody needs to give up waiting, however long
    the tools of another take.
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
    """End this process at once: tools in other threads must not keep it alive."""
    sys.stderr.write(f"train.py: process {os.environ['RANK']} stops with the run ({reason}); "
                     "torchrun's report says who was the first. "
                     "To go on: torchrun ... train.py --resume RUN\n")
    os._exit(1)


def command_line() -> None:
    config, = HfArgumentParser(Config).parse_args_into_dataclasses()
    try:
        check_options(config)
        join(config)
        if config.eval_only:
            score(config)
        else:
            train(config)
        if dist.is_initialized():
            dist.destroy_process_group()
    except ProcessLost as e:
        lost(e)
    except (UserError, EnvError, FloatingPointError) as e:  # the last: the run has diverged
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
