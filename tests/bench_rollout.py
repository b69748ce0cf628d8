"""Rollouts alone: sampled tokens per second here and of what transformers has, what hanging tools cost, how time grows with turns.

    python tests/bench_rollout.py                     # the default model
    python tests/bench_rollout.py --model MODEL       # a folder with a causal language model, in float32 (--dtype bfloat16)
    python tests/bench_rollout.py --part growth       # one of: slow, peers, reuse, growth, hanging

64 episodes of 4 turns, 50 sampled tokens a turn, each answered by 20 tokens of a world, behind a prompt of 200 tokens that groups
of 8 have in common; then the same with a prompt of its own for each. No stop tokens: everybody samples as much. All contexts have
the same length, so that no peer has to pad. The peers are called turn by turn, with the whole batch: `generate`, and `generate_batch`
(continuous batching, paged). Everybody takes turns in one process, each round in another order; medians, and ratios within rounds.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, logging  # noqa: E402

from rollout import Engine, play, small_model  # noqa: E402
from tools import Call, run_calls  # noqa: E402

EPISODES, GROUP, TURNS, PROMPT, SAMPLED, WORLD = 64, 8, 4, 200, 50, 20


def world(vocab: int, seed: int | str, tokens: int) -> list[int]:
    rng = Random(f"world {seed}")
    return [rng.randrange(vocab) for _ in range(tokens)]


def prompts(vocab: int, group: int) -> list[list[int]]:
    return [world(vocab, f"prompt {n // group}", PROMPT) for n in range(EPISODES)]


# ---- who runs: contexts -> contexts at the end ----


def make_engine(model, count: int, turns=TURNS, kind=Engine) -> Engine:
    return kind(model, set(), slots=count, context=PROMPT + turns * (2 * SAMPLED + WORLD))


def here(engine: Engine, contexts, turns=TURNS):
    """One engine that has forgotten what it knew, an agent per episode."""
    vocab = engine.model.config.vocab_size
    engine.forget()

    async def episode(ids: list[int], n: int) -> list[int]:
        rng = Random(n)
        for turn in range(turns):
            ids = ids + (await engine.generate(ids, SAMPLED, rng=rng)).ids + world(vocab, f"{n} {turn}", WORLD)
        return ids

    return play([lambda n=n, ids=ids: episode(ids, n) for n, ids in enumerate(contexts)], len(contexts))


def generate(model, contexts, turns=TURNS):
    """transformers.generate on the whole batch, once per turn."""
    vocab, device = model.config.vocab_size, model.device
    for turn in range(turns):
        ids = torch.tensor(contexts, device=device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=SAMPLED,
                             max_new_tokens=SAMPLED, pad_token_id=0)
        contexts = [row + world(vocab, f"{n} {turn}", WORLD) for n, row in enumerate(out.tolist())]
    return contexts


def generate_batch(model, contexts, turns=TURNS):
    """transformers' continuous batching, once per turn. Its own choice of sizes would take all memory of a CPU."""
    vocab = model.config.vocab_size
    pages = ContinuousBatchingConfig(num_blocks=len(contexts) * (1 + (PROMPT + turns * (SAMPLED + WORLD)) // 256), max_batch_tokens=4096)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=SAMPLED, eos_token_id=-1, pad_token_id=0)
    for turn in range(turns):
        found = model.generate_batch(contexts, generation_config=config, continuous_batching_config=pages, progress_bar=False)
        tokens = [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]
        contexts = [ids + new + world(vocab, f"{n} {turn}", WORLD) for n, (ids, new) in enumerate(zip(contexts, tokens, strict=True))]
    return contexts


# ---- what is measured ----


def clock(step) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(steps: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, after one round to warm up; of that round itself if there are no others."""
    seconds = {name: [] for name in steps}
    for r in range(rounds + 1):
        for name in [*list(steps)[r % len(steps) :], *list(steps)[: r % len(steps)]]:
            seconds[name].append(clock(steps[name]))
    return {name: s[1:] or s for name, s in seconds.items()}


def against(seconds: dict[str, list[float]], first: str, tokens: int) -> None:
    for name, s in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds[first], s))
        print(f"    {name:28} {tokens / statistics.median(s):9,.0f} sampled tokens/s   takes {ratio:5.2f} times as long", flush=True)


def peers(model, rounds: int) -> None:
    tokens = EPISODES * TURNS * SAMPLED
    for title, group in (("groups of 8 share a prompt", GROUP), ("every episode has a prompt of its own", 1)):
        contexts, engine = prompts(model.config.vocab_size, group), make_engine(model, EPISODES)
        steps = {"this engine": lambda: here(engine, contexts), "generate": lambda: generate(model, contexts)}
        try:
            ends = {len(ids) for ids in generate_batch(model, contexts[:2], turns=1)}
            assert ends == {PROMPT + SAMPLED + WORLD}, ends
            steps["generate_batch"] = lambda: generate_batch(model, contexts)
        except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, ValueError) as e:
            print(f"    generate_batch does not run here: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
        print(f"  {title}: {EPISODES} episodes of {TURNS} turns")
        against(race(steps, rounds), "this engine", tokens)


def reuse(model, rounds: int) -> None:
    """What the KV cache buys between turns: the same episodes with an engine that forgets everything after each turn."""

    class Forgetful(Engine):
        def _admit(self):
            self.length[[s for s in range(self.slots) if s not in {r.slot for r in self.active}]] = 0
            self.held[self.length == 0] = -1
            return super()._admit()

    contexts = prompts(model.config.vocab_size, GROUP)
    print("  keys and values kept between turns")
    kinds = {"kept": Engine, "forgotten": Forgetful}
    engines = {name: make_engine(model, EPISODES, kind=kind) for name, kind in kinds.items()}
    steps = {name: lambda engine=engine: here(engine, contexts) for name, engine in engines.items()}
    against(race(steps, rounds), "kept", EPISODES * TURNS * SAMPLED)


def growth(model, rounds: int) -> None:
    """An episode of 16 turns may cost at most 5 times one of 4 turns: its tokens are 4 times as many."""
    for count in (1, 8):
        contexts = prompts(model.config.vocab_size, 1)[:count]
        engine = make_engine(model, count, 16)
        seconds = race({f"{turns} turns": lambda turns=turns: here(engine, contexts, turns) for turns in (4, 16)}, rounds)
        ratio = statistics.median(b / a for a, b in zip(*seconds.values()))
        print(f"  {count} at once: 16 turns cost {ratio:.2f} times as much as 4 turns", flush=True)


def hanging(model, rounds: int, limit: float = 1.0, share: float = 0.1) -> None:
    """A tool call after each turn, of which one in ten hangs until its limit. Nobody but its own episode waits for it."""
    vocab, contexts = model.config.vocab_size, prompts(model.config.vocab_size, GROUP)
    toolbox = {"work": lambda: "done", "hang": lambda: time.sleep(2 * limit)}
    hangs = set(Random(0).sample(range(EPISODES * TURNS), round(share * EPISODES * TURNS)))
    calls = [[Call("hang" if n * TURNS + turn in hangs else "work", {}) for turn in range(TURNS)] for n in range(EPISODES)]

    engine = make_engine(model, EPISODES)

    async def episode(n: int, hang: bool) -> None:
        rng, ids = Random(n), list(contexts[n])
        for turn in range(TURNS):
            ids += (await engine.generate(ids, SAMPLED, rng=rng)).ids
            await run_calls([calls[n][turn] if hang else Call("work", {})], toolbox, timeout=limit)
            ids += world(vocab, f"{n} {turn}", WORLD)

    def batch(hang: bool) -> None:
        engine.forget()
        play([lambda n=n: episode(n, hang) for n in range(EPISODES)], EPISODES)

    seconds = race({"no tool hangs": lambda: batch(False), "one in ten": lambda: batch(True)}, rounds)
    hung = [sum(call.name == "hang" for call in episode) for episode in calls]
    print(f"  {sum(hung)} of {EPISODES * TURNS} calls hang for {limit:.0f} s, at most {max(hung)} of an episode; one after the other "
          f"that is {sum(hung) * limit:.0f} s")
    against(seconds, "no tool hangs", EPISODES * TURNS * SAMPLED)
    late = statistics.median(b - a for a, b in zip(*seconds.values()))
    print(f"    the batch ends {late:.2f} s later", flush=True)


def slow(model, rounds: int, agents: int = 32) -> None:
    """Agents whose tools take a while, out of step with one another: what a rejoin window costs."""
    vocab, contexts = model.config.vocab_size, prompts(model.config.vocab_size, GROUP)[:agents]

    async def episode(engine: Engine, n: int, seconds: float) -> None:
        rng, ids = Random(n), list(contexts[n])
        for turn in range(TURNS):
            sampled = SAMPLED // 2 + n % SAMPLED  # so that agents finish at different steps
            ids += (await engine.generate(ids, sampled, rng=rng)).ids
            await asyncio.sleep(seconds)
            ids += world(vocab, f"{n} {turn}", WORLD)

    def batch(engine: Engine, seconds: float) -> None:
        engine.forget()
        play([lambda n=n: episode(engine, n, seconds) for n in range(agents)], agents)

    engines = {f"window {window} s": make_engine(model, agents) for window in (0.0, 0.25)}
    for name, engine in engines.items():
        engine.rejoin_window = float(name.split()[1])
    for seconds in (0.5, 0.1):
        print(f"  {agents} agents, tools of {seconds} s")
        steps = {name: lambda engine=engine: batch(engine, seconds) for name, engine in engines.items()}
        against(race(steps, rounds), "window 0.0 s", sum(TURNS * (SAMPLED // 2 + n % SAMPLED) for n in range(agents)))


PARTS = {"slow": slow, "peers": peers, "reuse": reuse, "growth": growth, "hanging": hanging}


def main() -> None:
    global EPISODES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a causal language model; empty: the default one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--part", choices=PARTS, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=EPISODES, help="at once, for all parts but growth")
    options = parser.parse_args()
    EPISODES = options.episodes
    logging.set_verbosity_error()
    dtype, device = getattr(torch, options.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype) if options.model else small_model(1024).to(dtype)
    model.to(device).eval()
    model.generation_config.eos_token_id = None
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.model or 'the default model'}: {size:.2f}M parameters, {options.dtype}, {device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    for part in [options.part] if options.part else PARTS:
        PARTS[part](model, options.rounds)


if __name__ == "__main__":
    main()
