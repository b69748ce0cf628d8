"""The whole run: a model, a warm start, the loop, evaluation on tasks it never saw.

    python train.py                                  # about 1M parameters, made here, learns all six tasks
    python train.py --env calculator                 # one of them
    python train.py --model MODEL                    # a folder or hub id: any causal language model of transformers
    python train.py --env my_env.py:MyEnv            # an environment of yours
    python train.py --resume runs/0                  # go on after a crash or Ctrl-C
    python train.py --eval-only runs/0               # score a finished run
    torchrun --nproc-per-node 2 train.py             # several processes, one for each GPU

A run leaves a folder runs/NAME: run.json, metrics.jsonl (a line per step), episodes.jsonl.gz (every episode, token by token),
checkpoints/, model/ (a Hugging Face folder), scores.json (held-out successes, task by task) and, last of all, summary.json. It may
be killed at any instant: resumed, it ends with the same bits as a run that never was. Left out here: a learning-rate search,
dashboards (metrics.jsonl is one `json.loads` per line away from any plot).

Several processes do the same things in the same order, with two exceptions: each plays its share of the episodes and computes
its share of an update, and the first one alone writes. After both they have the same episodes and the same weights.
"""

import errno
import fcntl
import gzip
import hashlib
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
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
from env import ENVIRONMENTS, EnvError, check_env, demonstrator, make_env, seeds, task_hash, tasks_of
from grpo import (
    GRPOConfig,
    ProcessLost,
    assemble,
    compute_in,
    episode_rows,
    gather,
    make_rows,
    masters,
    own_part,
    ranks,
    recompute_layers,
    sharded,
    spread,
    update,
)
from rollout import Engine, play, small_model
from tools import schema, tools_of

RUNS = Path("runs")
METRICS, EPISODES = "metrics.jsonl", "episodes.jsonl.gz"  # files of a run that grow with every step
TIMED_UPDATES = 10  # after these the run says how long it will take
# How long an RL step, and an episode of evaluation, takes: in updates of the warm start. Measured with the default run.
UPDATES_PER_STEP, UPDATES_PER_EPISODE = 8, 0.04
WARM_BATCH = 40  # demonstrations per update of the warm start
KEEP = 3  # newest checkpoints that stay, beside the first
MOST_DEMONSTRATIONS = 16000  # distinct ones; beyond that they are shown again
# Environments shown more often than the length of their messages asks for: what is learned late.
EXTRA = {"maze": 4.5, "chain": 2.5}


# Options whose best value depends on the model, which may begin with random weights or know language.
SMALL_MODEL = {"lr": 2.5e-4, "epochs": 3, "temperature": 1.1, "warmup_lr": 6e-3, "warmup_steps": 110, "context": 448}
GIVEN_MODEL = {"lr": 5e-5, "epochs": 1, "temperature": 1.0, "warmup_lr": 1e-4, "warmup_steps": 12, "context": 700}


def option(default, text):
    return field(default_factory=lambda: default, metadata={"help": text})


def by_model(name, text):
    values = f"{SMALL_MODEL[name]}; with --model {GIVEN_MODEL[name]}"
    return field(default=None, metadata={"help": f"{text} ({values})"})


@dataclass
class Config(GRPOConfig):
    """Every option of a run, with those of the update (grpo.py)."""

    env: list[str] = option([*ENVIRONMENTS], "environments: NAME, NAME:argument=value,..., or FILE.py:Class")
    model: str = option("", "folder or hub id of a causal language model; empty: a small one is made here")
    name: str = option("", "name of the run's folder under runs/; empty: the next number")
    seed: int = option(0, "of weights, tasks and sampling")
    steps: int = option(12, "updates by reinforcement learning, times the number of environments")
    tasks_per_step: int = option(18, "tasks per update, shared out among the environments")
    group_size: int = option(8, "attempts at each task")
    lr: float | None = by_model("lr", "learning rate of these updates; it falls to 0")
    epochs: int | None = by_model("epochs", "updates per batch of episodes")
    negative_weight: float | None = option(None, "factor of advantages below 0 (1, as in GRPO; 0.1 where "
                                                 "the small model learns built-in environments)")
    warmup_steps: int | None = by_model(
        "warmup_steps", "updates by imitation before that, times the number of environments")
    warmup_lr: float | None = by_model("warmup_lr", "learning rate at the peak of those; it falls to a tenth")
    max_turns: int = option(10, "messages the model may write in an episode")
    max_new_tokens: int = option(64, "tokens in one message")
    context: int | None = by_model("context", "tokens in one segment: prompt, messages and observations")
    slots: int | None = option(None, "contexts decoded at once (all of a step, but at most 128)")
    rejoin_window: float | None = option(None, "seconds to wait for quick tools after each message, so that a run repeats bit by bit "
                                               "(0.25 for built-in environments, else 0)")
    tool_timeout: float = option(10.0, "seconds a tool call may take")
    temperature: float | None = by_model("temperature", "of sampling in training; above 1 rare slips are seen")
    eval_tasks: int = option(200, "held-out tasks per environment, before and after")
    eval_only: str = option("", "RUN: only score the model of this run")
    resume: str = option("", "RUN: go on where its newest checkpoint stands; the run's own options hold")
    save_every: int = option(20, "updates between checkpoints")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: Literal["float32", "bfloat16", "float64"] = field(default="float32", metadata={
        "help": "to compute in; the weights that are trained are float32 at least"})
    recompute: bool = option(False, "keep only each layer's input for the backward pass: less memory, a third more products")
    shard: bool = option(False, "several processes: each keeps a part of the optimizer's averages (for --model)")

    @property
    def updates(self) -> int:
        """By reinforcement learning, in all."""
        return self.steps * len(self.env)

    @property
    def warmup_updates(self) -> int:
        """By imitation, in all."""
        return self.warmup_steps * len(self.env)


def resolve(config: Config) -> Config:
    """A value in place of each None: what the user gave stays.

    A negative_weight below 1 makes learning seek risk. With rewards that are graded or noisy, it may prefer 1
    with probability 0.4 to a sure 0.6. The built-in tasks can all be solved, and the small model learns them
    in fewer steps with 0.1.
    """
    built_in = all(spec.partition(":")[0] in ENVIRONMENTS for spec in config.env)
    defaults = {
        **(GIVEN_MODEL if config.model else SMALL_MODEL),
        "negative_weight": 0.1 if built_in and not config.model else 1.0,
        "slots": min(128, config.tasks_per_step * config.group_size),
        "rejoin_window": 0.25 if built_in else 0.0,  # their tools take microseconds
    }
    return replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})


AT_LEAST = {
    "seed": 0, "steps": 0, "tasks_per_step": 1, "group_size": 2, "epochs": 1, "pack_tokens": 1, "normaliser_tokens": 1,
    "warmup_steps": 0, "max_turns": 1, "max_new_tokens": 1, "context": 1, "slots": 1, "eval_tasks": 1, "save_every": 1, "rejoin_window": 0,
    "lr": 0, "warmup_lr": 0, "negative_weight": 0, "turn_credit": 0, "eps_low": 0, "eps_high": 0, "dual_clip": 1,
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
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise UserError(f"{said}: want at least {AT_LEAST[name]}")
        if name in ABOVE_0 and value <= 0:
            raise UserError(f"{said}: want more than 0")


def train(config: Config) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # The run's folder, the environments, the model

    clock, first = Clock(), ranks()[0] == 0
    run, config = gather(open_run(config))[0]  # one answer: nobody makes the folder before all have looked
    if run and (run / "summary.json").exists():  # it is written last
        print(f"{run} is finished: there is nothing to go on with")
        return
    lock = lock_run(run) if run and first else None  # held until this process ends
    factories = make_envs(config)
    checkpoint = newest_checkpoint(run) if run else None
    model, tokenizer = load_model(config, factories, checkpoint)
    chat, engine = make_engine(model, tokenizer, config)
    check_fit(chat, factories, config)
    if not run:  # only now: bad input leaves no folder behind
        run, lock = make_run(config) if first else (None, None)
        run = gather(run)[0]
    spread(model, config.shard)
    with sharded(model):
        optimizer = torch.optim.AdamW(masters(model), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    print(f"{run}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {config.device}, "
          f"environments {', '.join(factories)}")
    resolved = (*SMALL_MODEL, "negative_weight", "slots", "rejoin_window")
    print("options: " + ", ".join(f"{name} {getattr(config, name)}" for name in resolved))

    # ------------------------------------------------------------------------------------------------------------------
    # Warm start: imitate demonstrations, right ones and wrong ones alike. Then see what imitation is worth

    if checkpoint is None:
        clock.start("warm start")
        imitate(model, chat, factories, config)
        clock.start("evaluation")
        state = {"step": 0, "tokens": 0, "success": dict.fromkeys(factories, 0.0), "written": {},
                 "cursor": {spec: (config.seed + 1) * 10**6 for spec in factories}, "before": evaluate(engine, chat, factories, config)}
        save(run, state, clock, model, tokenizer, optimizer)
    else:
        state = torch.load(checkpoint / "trainer.pt", weights_only=True)
        restore(optimizer, state.pop("optimizer"))
        clock.seconds.update(state.pop("seconds"))
    if first:
        forget_after(run, state["written"])
    print_scores(state["before"], "before")
    reference = load_reference(config, model, run) if config.kl_coef else None

    # ------------------------------------------------------------------------------------------------------------------
    # The loop: roll out, compare within groups, update

    ctrl_c = CtrlC()
    steps = range(state["step"] + 1, config.updates + 1)
    for step in tqdm(steps, desc="RL", initial=state["step"], total=config.updates, leave=False, disable=not first):
        began = time.perf_counter()
        clock.start("rollouts")
        specs = share_out(state["success"], config.tasks_per_step)
        tasks = [(spec, next_seed(factories[spec], state["cursor"], spec)) for spec in specs]
        episodes = roll_out(engine, chat, factories, config, tasks, step)

        clock.start("update")
        rows, advantages, signal_report = make_rows(episodes, config)
        optimizer.param_groups[0]["lr"] = config.lr * (1 - (step - 1) / config.updates) ** 2
        report = update(model, optimizer, rows, config, config.temperature, reference)

        clock.start("log")
        metrics = {"step": step, "seconds": time.perf_counter() - began, **measure(episodes), **signal_report, **report,
                   "lr": optimizer.param_groups[0]["lr"]}
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / metrics["seconds"]
        state |= {"step": step, "tokens": state["tokens"] + metrics["sampled_tokens"]}
        for spec, success in state["success"].items():  # of the last few steps; a step in which all attempts crashed says nothing
            state["success"][spec] = success + 0.5 * (metrics.get(f"success/{spec}", success) - success)
        if first:
            append(run / METRICS, [metrics])
            append(run / EPISODES, [record(e, a, step) for e, a in zip(episodes, advantages)])
        tqdm.write(metric_line(metrics))
        if step % 20 == 0:
            tqdm.write(transcript(max(episodes, key=lambda e: (e.success, e.turns)), tokenizer))
        stop = any(gather(ctrl_c.pressed))
        if step % config.save_every == 0 or step == config.updates or stop:
            save(run, state, clock, model, tokenizer, optimizer)
        if stop:
            sys.exit(f"stopped after step {step}. To go on: python train.py --resume {run}" if first else 1)

    # ------------------------------------------------------------------------------------------------------------------
    # What it learned: evaluation and summary

    clock.start("evaluation")
    after = evaluate(engine, chat, factories, config)
    weights = model_state(model)
    if not first:
        return
    with whole_folder(run / "model") as folder:
        save_model(folder, model, tokenizer, weights)
    clock.start("end")
    print_scores(state["before"], "before")
    print_scores(after, "after")
    write_json(run / "scores.json", {"before": state["before"], "after": after})
    write_json(run / "summary.json", summarise(state, after, clock, config))
    print(f"{run}: {clock.total():.0f} s: " + ", ".join(f"{phase} {s:.0f}" for phase, s in clock.seconds.items()))
    lock.close()


def score(config: Config) -> None:
    """--eval-only: score a run's model on the held-out tasks."""
    run, stored = read_run(config.eval_only)
    folder = run / "model" if (run / "model").is_dir() else newest_checkpoint(run)
    if folder is None:
        raise UserError(f"{run} has no model yet: it stopped in its warm start, and --resume {run} begins that again")
    factories = make_envs(stored)
    stored = replace(stored, eval_tasks=config.eval_tasks, device=config.device)
    chat, engine = make_engine(*load_model(stored, factories, folder), stored)
    print_scores(evaluate(engine, chat, factories, stored), "score")


def make_envs(config: Config) -> dict:
    """{name: factory}, each checked against the interface."""
    twice = [spec for spec, count in Counter(config.env).items() if count > 1]
    if twice:
        raise UserError(f"--env names {twice[0]} twice: each has its share of the tasks already")
    factories = {spec: make_env(spec) for spec in config.env}
    for factory in factories.values():
        check_env(factory)
    return factories


def make_engine(model, tokenizer, config: Config) -> tuple[Chat, Engine]:
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):  # the other way round is common: vocabularies are rounded up
        raise UserError(f"the model knows {known} tokens and its tokenizer has {len(tokenizer)}: they do not belong together")
    try:
        ends = model.generation_config.eos_token_id  # Llama 3 has several, its tokenizer knows one
        chat = Chat(tokenizer, set(ends if isinstance(ends, list) else [ends]) - {None})
        return chat, Engine(model, chat.stop_ids, slots=config.slots, context=config.context,
                            rejoin_window=config.rejoin_window)
    except ValueError as e:
        raise UserError(str(e)) from e


def load_reference(config: Config, model, run: Path):
    """The model before RL, frozen: what the KL term keeps close to."""
    gather(None)  # the first process has written it by then
    start = run / "checkpoints" / "step-000000"
    if damage(start):
        raise UserError(f"{start} is damaged ({', '.join(damage(start))}), and the KL term is to it: begin anew under another name")
    reference = AutoModelForCausalLM.from_pretrained(start, dtype=model.dtype)
    return reference.to(model.device).requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Rolling out


def roll_out(llm, chat: Chat, factories: dict, config: Config, tasks: list[tuple[str, int]], step: int | str, size: int = 0,
             temperature: float | None = None) -> list[Episode]:
    """`size` attempts at each (environment, seed), in that order. Every attempt has a random stream of its own.

    So there is no random state to save: what a step does follows from its number, the weights and the cursor.
    """
    size = size or config.group_size
    llm.forget()  # what it read in the step before, a resumed run has never read

    def start(group: int, spec: str, seed: int, member: int):
        async def attempt() -> Episode:
            agent = Agent(llm, chat, max_turns=config.max_turns, max_new_tokens=config.max_new_tokens, context=config.context,
                          temperature=config.temperature if temperature is None else temperature,
                          tool_timeout=config.tool_timeout)
            episode = await agent.run(factories[spec], seed, Random(f"{config.seed} {step} {spec} {seed} {member}"))
            episode.env, episode.group, episode.member = spec, group, member
            return episode

        return attempt

    starts = [start(group, spec, seed, member) for group, (spec, seed) in enumerate(tasks) for member in range(size)]
    episodes = play_together(starts, llm.slots, size, llm)
    if all(e.error for e in episodes):  # or a run would go on like this, learning nothing, until its steps are spent
        raise UserError(f"the environment failed in every episode of step {step}: {episodes[0].error}")
    return episodes


def play_together(starts: list, at_once: int, size: int = 1, engine: Engine | None = None) -> list[Episode]:
    """`play`, of which each process does its share, by groups of `size`; all get all episodes, in the order of `starts`."""
    rank, world = ranks()
    players = [i // size % world for i in range(len(starts))]
    own = [start for start, player in zip(starts, players) if player == rank]
    shares = [iter(share) for share in gather(play(own, at_once, engine))]
    return [next(shares[p]) for p in players]


def share_out(success: dict[str, float], tasks: int) -> list[str]:
    """Which environments the tasks of a step are of: one task each, the others where most attempts still fail.

    None gets more than twice its even share. Where every attempt fails, groups have no spread and teach nothing:
    without a bound, an environment that is too hard takes most of every step.

    >>> share_out({"easy": 1.0, "hard": 0.5, "hopeless": 0.0}, 7)
    ['easy', 'hard', 'hard', 'hopeless', 'hopeless', 'hopeless', 'hopeless']
    """
    most = math.ceil(2 * tasks / len(success))
    counts = Counter(list(success) if tasks >= len(success) else ())
    while counts.total() < tasks:
        open_to_more = [spec for spec in success if counts[spec] < most]
        counts[max(open_to_more, key=lambda spec: (1.05 - success[spec]) / (counts[spec] + 1))] += 1
    return [spec for spec in success for _ in range(counts[spec])]


def next_seed(factory, cursor: dict[str, int], spec: str) -> int:
    """The next training task of an environment; `cursor` remembers how far we are."""
    seed = next(seeds(factory, evaluation=False, start=cursor[spec]))
    cursor[spec] = seed + 1
    return seed


def evaluate(engine: Engine, chat: Chat, factories: dict, config: Config, final: bool = False) -> dict[str, dict[str, list[int]]]:
    """Successes on held-out tasks: {environment: {"sampled": [0 or 1 per task], "greedy": [...]}}. The same tasks in every run.

    final: on those that no setting was chosen on (tests/evidence.py).
    """
    tasks = []
    for spec, factory in factories.items():
        held_out = seeds(factory, evaluation=True, final=final)
        tasks += [(spec, seed) for seed in islice(held_out, config.eval_tasks)]
    scores = {spec: {} for spec in factories}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        episodes = roll_out(engine, chat, factories, config, tasks, "evaluation", size=1, temperature=temperature)
        for spec in factories:
            scores[spec][how] = [int(e.success) for e in episodes if e.env == spec]
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# Warm start


def demonstrations(chat: Chat, factories: dict, config: Config, counts: dict[str, int], start: int,
                   keep=lambda episode: True) -> list[Episode]:
    """So many demonstrations of each environment, evenly mixed. `keep` says which ones are wanted."""
    columns = []
    for spec, wished in counts.items():
        factory, demonstrate = factories[spec], demonstrator(factories[spec])

        def show(seed: int, factory=factory, demonstrate=demonstrate):
            async def attempt() -> Episode:
                env, rng = factory(), Random(f"demonstration {config.seed} {seed}")
                agent = Agent(Script(chat, demonstrate(env, rng)), chat, max_turns=config.max_turns,
                              max_new_tokens=config.max_new_tokens, context=config.context)
                return await agent.run(env, seed)

            return attempt

        column, cursor = [], {spec: start}
        while len(column) < wished:
            wanted = [next_seed(factory, cursor, spec) for _ in range(wished - len(column))]
            column += [e for e in play_together([show(seed) for seed in wanted], 64) if keep(e)]
        columns.append(column)
    places = [(i / len(column), number, i) for number, column in enumerate(columns) for i in range(len(column))]
    return [columns[number][i] for _, number, i in sorted(places)]


def shares(chat: Chat, factories: dict, config: Config) -> dict[str, float]:
    """How often to show each environment that has a demonstrator: the less, the longer its messages are, for they teach more each.

    Of all demonstrations; EXTRA says which ones need more.
    """
    weights = {}
    for spec in (spec for spec, factory in factories.items() if demonstrator(factory)):
        shown = demonstrations(chat, factories, config, {spec: 20}, start=0)
        weights[spec] = EXTRA.get(spec.partition(":")[0], 1.0) * sum(sum(s.sampled) for e in shown for s in e.segments) ** -0.5
    return {spec: weight / sum(weights.values()) for spec, weight in weights.items()}


def imitate(model, chat: Chat, factories: dict, config: Config, keep=lambda episode: True, seconds: float = math.inf) -> None:
    """Make the demonstrators' messages likelier, right ones and wrong ones: the policy gradient with advantage 1 for all."""
    most = min(config.warmup_updates * WARM_BATCH, MOST_DEMONSTRATIONS)
    counts = {spec: round(most * share) for spec, share in shares(chat, factories, config).items()}
    shown = demonstrations(chat, factories, config, counts, start=(config.seed + 1) * 10**9, keep=keep)
    if not shown:
        print("no demonstrators beside these environments: no warm start")
        return
    options = replace(config, kind="reinforce", epochs=1, normaliser="token", kl_coef=0.0, entropy_coef=0.0, tis_cap=None)
    print(f"warm start: {len(shown)} demonstrations, {sum(e.success for e in shown) / len(shown):.0%} of them right")
    with sharded(model):
        optimizer, began = Imitator(model, config), time.perf_counter()
    for step in tqdm(range(1, config.warmup_updates + 1), desc="warm start", leave=False, disable=ranks()[0] > 0):
        batch = [shown[((step - 1) * WARM_BATCH + i) % len(shown)] for i in range(WARM_BATCH)]
        rows = [row for i, e in enumerate(batch) for row in episode_rows(e, i, [1.0] * e.turns)]
        optimizer.set_lr(step)
        report = update(model, optimizer, rows, options)
        if step == TIMED_UPDATES:
            tqdm.write(estimate((time.perf_counter() - began) / step, config))
        if step % 100 == 0:
            tqdm.write(f"warm start {step}: {report['loss']:.3f} nats per token, entropy {report['entropy']:.3f}")
        if time.perf_counter() - began > seconds:
            return


def estimate(update_seconds: float, config: Config) -> str:
    """How long a run will take, from the seconds of its first updates. What the rest costs in updates was measured once.

    >>> estimate(0.25, resolve(Config()))
    'on this machine the warm start takes about 3 minutes, the whole run about 6'
    """
    evaluations = 4 * config.eval_tasks * len(config.env)  # before and after, sampled and greedy
    updates = config.warmup_updates + UPDATES_PER_STEP * config.updates + UPDATES_PER_EPISODE * evaluations
    minutes = [max(1, round(n * update_seconds / 60)) for n in (config.warmup_updates, updates)]
    return f"on this machine the warm start takes about {minutes[0]} minutes, the whole run about {minutes[1]}"


class Imitator:
    """The optimizer of the warm start.

    For the small model, whose weights begin random: Muon on the layers' matrices, which learn to copy in a third of the
    updates. For all else, and in the loop, AdamW: rewards are noisy, and Muon steps as far along the noise as along the signal.
    Both take the same learning rate.
    """

    def __init__(self, model, config: Config):
        self.config = config
        matrices = [] if config.model else [p for p in masters(model.base_model.layers) if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in masters(model) if id(p) not in chosen]
        self.parts = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]
        if matrices:
            self.parts.append(Muon(matrices))

    def set_lr(self, step: int) -> None:
        """20 steps up to the peak, down to a tenth of it."""
        share = min(1.0, step / 20) * (1 - 0.9 * step / self.config.warmup_updates)
        for part in self.parts:
            part.param_groups[0]["lr"] = self.config.warmup_lr * share

    def step(self) -> None:
        for part in self.parts:
            part.step()


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a matrix moves equally far in all directions (Muon; scaled as in arXiv 2502.16982).

    Not torch.optim.Muon: that one multiplies in bfloat16, which most laptops' CPUs emulate slowly.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float = 0.95):
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        group, by_shape = self.param_groups[0], defaultdict(list)
        for p in group["params"]:
            by_shape[p.shape].append(p)
        for shape, matrices in by_shape.items():
            directions = orthogonal(torch.stack([self._direction(p, group["momentum"]) for p in matrices]))
            size = 0.2 * max(shape) ** 0.5  # an entry moves as far as with Adam
            for p, direction in zip(matrices, directions):
                p.add_(direction, alpha=-group["lr"] * size)

    def _direction(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's momentum of the gradient: keeps the average of p's gradients."""
        average = self.state[p].setdefault("average", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices [K, M, N] with the same singular vectors, and singular values near 1: five Newton-Schulz steps.

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


# ----------------------------------------------------------------------------------------------------------------------
# Models


def load_model(config: Config, factories: dict, checkpoint: Path | None):
    """(model, tokenizer): of a checkpoint, of a folder or hub id, or made here. Remote code is never run."""
    where, dtype = checkpoint or config.model, getattr(torch, config.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if config.shard and (not where or dtype != wide):
        raise UserError("--shard is for a model given by --model, not in 16 bits: the small one fits, and Muon needs its matrices whole")
    if where:
        model, tokenizer = read_model(where, wide)
    else:
        tokenizer = gather(learn_tokenizer(factories, config))[0]
        model = small_model(len(tokenizer), config.seed).to(wide)
    model.to(config.device)
    if not config.model and config.device == "cpu":
        torch.set_num_threads(1)  # its operations are too short to be shared; grpo.py computes packs side by side
    compute_in(model, dtype)
    try:
        config.recompute and recompute_layers(model)
    except ValueError as e:
        raise UserError(f"--recompute: {e}") from e
    return model, tokenizer


def read_model(where: Path | str, dtype: torch.dtype):
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
        choices = "want a Hugging Face folder, a hub id, or nothing for a small one"
        raise UserError(f"no causal language model at '{where}': {choices} ({reason})") from e
    for p in model.parameters():  # tensors of a file begin at odd addresses, where products differ in the last bit
        p.data = p.data.clone()
    return model, tokenizer


def learn_tokenizer(factories: dict, config: Config):
    """A small tokenizer learned from what the environments and their demonstrators say, read byte by byte."""
    spell = Chat(small_tokenizer([]))
    wide = replace(config, context=10**6, max_new_tokens=10**5)
    counts = {spec: 300 for spec, factory in factories.items() if demonstrator(factory)}
    texts = [spell.tokenizer.decode(s.ids, skip_special_tokens=True)
             for e in demonstrations(spell, factories, wide, counts, start=0) for s in e.segments]
    for factory in factories.values():
        schemas = [schema(t) for t in tools_of(factory()).values()]
        for _, task in islice(tasks_of(factory, evaluation=False), 50):
            texts.append(spell.tokenizer.decode(spell.prompt(task, schemas), skip_special_tokens=True))
    return small_tokenizer(texts)


def check_fit(chat: Chat, factories: dict, config: Config) -> None:
    """Raise UserError if a task cannot fit the context, or a demonstrator fails: better now than in an hour."""
    for spec, factory in factories.items():
        schemas = [schema(t) for t in tools_of(factory()).values()]
        for _, task in islice(tasks_of(factory, evaluation=False), 20):
            tokens = len(chat.prompt(task, schemas))
            if tokens + config.max_new_tokens > config.context:
                raise UserError(f"{spec}: a prompt of {tokens} tokens and a message of {config.max_new_tokens} do not fit --context "
                                f"{config.context}; task: {task[:80]!r}")
        if config.warmup_steps and demonstrator(factory):
            try:
                demonstrations(chat, factories, config, {spec: 10}, start=0)
            except ValueError as e:
                raise UserError(f"{spec}: its demonstrator fails: {e}") from e


# ----------------------------------------------------------------------------------------------------------------------
# Records


def measure(episodes: list[Episode]) -> dict[str, float]:
    """A step's episodes as numbers. Means are over episodes, those whose environment failed left out."""
    sound = [e for e in episodes if not e.error]
    mean = lambda values: float(np.mean(values)) if len(values) else math.nan
    by_group = defaultdict(list)
    for e in sound:
        by_group[e.group].append(e.reward)
    numbers = {"reward": mean([e.reward for e in sound]), "success": mean([e.success for e in sound]),
               "reward_std": mean([np.std(r) for r in by_group.values()])}
    numbers |= {name: mean([getattr(e, name) for e in sound]) for name in ("turns", "thinking", "tool_calls", "tool_errors")}
    numbers["sampled_tokens"] = sum(sum(s.sampled) for e in episodes for s in e.segments)
    numbers["context_tokens"] = sum(len(s.ids) for e in episodes for s in e.segments)
    for spec in sorted({e.env for e in sound}):
        own = [e for e in sound if e.env == spec]
        numbers[f"success/{spec}"] = mean([e.success for e in own])
        for name in dict.fromkeys(name for e in own for name in e.behaviour):  # once each
            numbers[f"behaviour/{spec}/{name}"] = mean([e.behaviour[name] for e in own if name in e.behaviour])
    return numbers | {f"finish/{reason}": n / len(episodes) for reason, n in sorted(Counter(e.finish for e in episodes).items())}


def metric_line(m: dict) -> str:
    own = "  ".join(f"{k.partition('/')[2]} {v:4.0%}" for k, v in m.items() if k.startswith("success/"))
    return (f"step {m['step']:3d}  success {m['success']:4.0%}  {own}  no signal {m['no_signal']:4.0%}  turns {m['turns']:.1f}  "
            f"entropy {m['entropy']:.2f}  |g| {m['grad_norm']:.2f}{' SKIPPED' if m['skipped'] else ''}  {m['seconds']:.1f} s")


def record(e: Episode, advantage: float, step: int) -> dict:
    """An episode as a line of episodes.jsonl.gz. What it holds can be read back, token by token:

        tokenizer = AutoTokenizer.from_pretrained("runs/0/checkpoints/step-000000")
        for line in gzip.open("runs/0/episodes.jsonl.gz", "rt"):
            episode = json.loads(line)
            segments = [Segment(**s) for s in episode["segments"]]
            print(episode["reward"], tokenizer.decode(segments[0].ids))
    """
    segments = [asdict(s) for s in e.segments]
    return {"step": step, "env": e.env, "seed": e.seed, "task": task_hash(e.task), "group": e.group, "member": e.member,
            "reward": e.reward, "advantage": advantage, "success": e.success, "finish": e.finish, "error": e.error, "turns": e.turns,
            "segments": segments}


def append(path: Path, lines: list[dict]) -> None:
    """Add lines of JSON. To a .gz file they go as one compressed part; readers see such parts as one file."""
    rows = [json.dumps({name: finite(value) for name, value in line.items()}) + "\n" for line in lines]
    data = "".join(rows).encode()
    with writing(path), path.open("ab") as file:
        file.write(gzip.compress(data) if path.suffix == ".gz" else data)
    sync(path)  # before the checkpoint that counts on these lines


def finite(value):
    """NaN and infinity are not JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(successes: list[int]) -> list[float]:
    """95 % interval of a success rate (Wilson).

    >>> [round(x, 3) for x in interval([1] * 95 + [0] * 5)]
    [0.888, 0.978]
    """
    n, p, z = len(successes), sum(successes) / len(successes), 1.96
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def rate(successes: list[int]) -> float:
    return sum(successes) / len(successes)


def print_scores(scores: dict, when: str) -> None:
    for spec, s in scores.items():
        low, high = interval(s["sampled"])
        tqdm.write(f"{when:>6}  {spec:<16} held-out success: sampled {rate(s['sampled']):6.1%} [{low:.1%}, {high:.1%}]  "
                   f"greedy {rate(s['greedy']):6.1%}  ({len(s['sampled'])} tasks)")


def summarise(state: dict, after: dict, clock: "Clock", config: Config) -> dict:
    before = state["before"]
    environments = {spec: {"before": rate(before[spec]["sampled"]), "after": rate(after[spec]["sampled"]),
                           "before_greedy": rate(before[spec]["greedy"]), "after_greedy": rate(after[spec]["greedy"]),
                           "ci_after": interval(after[spec]["sampled"]), "tasks": len(after[spec]["sampled"])} for spec in after}
    return {"seconds": {"total": clock.total(), **clock.seconds}, "environments": environments, "tokens": state["tokens"],
            "seed": config.seed, "versions": versions()}


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": commit.stdout.strip() or "unknown"}


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


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def open_run(config: Config) -> tuple[Path | None, Config]:
    """The folder of the run to go on with (None: a new run, see `make_run`) and the options that hold in it."""
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
        raise UserError(f"{run / 'run.json'} does not hold the options of a run ({e})") from e
    return run, resolve(replace(options, resume=name))


def make_run(config: Config) -> tuple[Path, IO]:
    """(folder, lock) of a new run. The folder appears with its run.json, whole and locked.

    It is made under another name, then renamed. A folder cannot be renamed onto one that is not empty.
    So of two runs that start together each gets its own.
    """
    wanted = RUNS / (config.name or "new")
    partial = wanted.with_name(f"partial-{wanted.name}-{os.getpid()}")
    with writing(partial):
        partial.mkdir(parents=True)
        try:
            write_json(partial / "run.json", {"config": asdict(config), "versions": versions()})
            lock = lock_run(partial)
            run = rename_to_free(partial, config.name)
            for parent in (run.parent, run.parent.parent):  # the names, too; the parent itself may be new
                sync(parent)
            return run, lock
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # if it failed


def rename_to_free(folder: Path, name: str) -> Path:
    """Move `folder` to runs/NAME; without a name, to the first number that is free behind all others."""
    numbers = [int(p.name) for p in RUNS.glob("*") if p.name.isdigit()]
    for free in [name] if name else map(str, count(max(numbers, default=-1) + 1)):
        try:
            return folder.rename(RUNS / free)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise UserError(taken(name))


def lock_run(run: Path) -> IO:
    """Keep other processes from going on with this run. The kernel lets go when this one ends, however it ends."""
    with writing(run / "run.json"):
        file = (run / "run.json").open("r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{run} is in use: another process is training it") from e
        return file


def save(run: Path, state: dict, clock: Clock, model, tokenizer, optimizer) -> None:
    """A checkpoint: the same files for any number of processes. All bring their parts, the first one writes."""
    written = {name: (run / name).stat().st_size for name in (METRICS, EPISODES) if (run / name).exists()}
    state = {**state, "seconds": dict(clock.seconds), "optimizer": assemble(optimizer.state_dict()), "written": written}
    weights = model_state(model)
    if ranks()[0] == 0:
        save_checkpoint(run, state, model, tokenizer, weights)


def model_state(model) -> dict[str, torch.Tensor]:
    with sharded(model):
        return assemble({name: getattr(p, "master", p) for name, p in model.state_dict(keep_vars=True).items()})


def restore(optimizer, state: dict) -> None:
    """Give an optimizer its averages back: of weights that are sharded, this process's part."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    averages = {i: {name: own_part(x, weights[i]) for name, x in of_weight.items()} for i, of_weight in state["state"].items()}
    optimizer.load_state_dict({**state, "state": averages})


def save_model(folder: Path, model, tokenizer, weights: dict) -> None:
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def save_checkpoint(run: Path, state: dict, model, tokenizer, weights: dict) -> None:
    """All that a run needs to go on, in a folder that is also the model's. Of the older ones the first and the newest stay."""
    checkpoints = run / "checkpoints"
    with whole_folder(checkpoints / f"step-{state['step']:06d}") as folder:
        save_model(folder, model, tokenizer, weights)
        torch.save(state, folder / "trainer.pt")
        (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in checksums(folder)))
    for old in sorted(checkpoints.glob("step-*"))[1:-KEEP]:
        shutil.rmtree(old)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest one that is whole; None if there is none yet."""
    found = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for checkpoint in found:
        damaged = damage(checkpoint)
        if not damaged:
            return checkpoint
        print(f"{checkpoint} is damaged ({', '.join(damaged)}) and passed over")
    if found:
        raise UserError(f"{run} has no checkpoint that is whole: begin anew under another name")
    return None


def checksums(folder: Path) -> list[str]:
    """A line for each file, as `sha256sum` writes it: `sha256sum -c SHA256SUMS` in the folder says what `damage` does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{hashlib.file_digest(path.open('rb'), 'sha256').hexdigest()}  {path.relative_to(folder)}" for path in files]


def damage(checkpoint: Path) -> list[str]:
    """Names of the files that are not as they were written. A flipped bit in the weights would raise nothing when they are loaded."""
    sums = checkpoint / "SHA256SUMS"
    written = sums.read_text(errors="replace").splitlines() if sums.is_file() else []
    there = checksums(checkpoint)
    whole = any(line.endswith("  trainer.pt") for line in written)  # else the list itself was cut
    return [line.partition("  ")[2] or sums.name for line in written if line not in there] + ([] if whole else [sums.name])


@contextmanager
def whole_folder(final: Path):
    """A folder to fill, which then takes its final name: under that name it is never seen half-written, whenever the power fails."""
    partial = final.with_name(f"partial-{final.name}")
    with writing(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            shutil.rmtree(final, ignore_errors=True)  # if there is one, it was damaged, or the run never got to its summary
            os.replace(partial, final)
            for parent in (final.parent, final.parent.parent):  # the names, too; the parent itself may be new
                sync(parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # if it failed: the disk may be full


def write_json(path: Path, value: dict) -> None:
    partial = path.with_name(f"partial-{path.name}")
    with writing(path):
        partial.write_text(json.dumps(value, indent=2))
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk holds it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def writing(path: Path):
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors each have their own way to say that a disk is full
        free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
        raise UserError(f"cannot write {path}: {e} ({free / 1e6:.0f} MB are free). What was saved before is whole; once there is room, "
                        "--resume goes on from there") from e


def forget_after(run: Path, written: dict[str, int]) -> None:
    """Cut the files that grow to their sizes at the checkpoint: the steps after it will be made again."""
    for path in (run / METRICS, run / EPISODES):
        if path.exists():
            size = written.get(path.name, 0)
            os.truncate(path, min(size, path.stat().st_size))  # never longer: somebody may have moved it away


class CtrlC:
    """After the first Ctrl-C the step is finished and saved; a second one ends the program there and then."""

    def __init__(self):
        self.pressed = False
        signal.signal(signal.SIGINT, self.press)

    def press(self, *_) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nCtrl-C: finishing this step (again: stop now)\n")  # not print: it may be what was interrupted


# ----------------------------------------------------------------------------------------------------------------------
# The command


class UserError(ValueError):
    """Something the user can mend; shown as one line."""


def join(config: Config) -> None:
    """Meet the other processes, if torchrun has started several. Otherwise nothing here is in use.

    It ends all of them when one has died. So nobody need give up waiting, however long the tools of another take.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo", timeout=timedelta(days=30))
    signal.signal(signal.SIGTERM, lambda *_: lost("told to by torchrun"))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def lost(reason: object) -> None:
    """The end of this process, at once: tools in other threads must not keep it alive."""
    sys.stderr.write(f"train.py: process {os.environ['RANK']} stops with the run ({reason}); torchrun's report says who was the first. "
                     "To go on: torchrun ... train.py --resume RUN\n")
    os._exit(1)


def command_line() -> None:
    config, = HfArgumentParser(Config).parse_args_into_dataclasses()
    try:
        check_options(config)
        join(config)
        score(config) if config.eval_only else train(config)
        if dist.is_initialized():
            dist.destroy_process_group()
    except ProcessLost as e:
        lost(e)
    except (UserError, EnvError, FloatingPointError) as e:  # the last one: the run has diverged, says the engine
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
