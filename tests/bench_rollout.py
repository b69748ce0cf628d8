"""Rollouts alone: sampled tokens per second of the engine, and of transformers' own generation.

    python tests/bench_rollout.py                     # the default model
    python tests/bench_rollout.py --model MODEL       # a causal language model (--dtype bfloat16)
    python tests/bench_rollout.py --part growth       # one of: slow, peers, reuse, growth, hanging

64 episodes of 4 turns. Each turn samples 50 tokens and observes 20. Groups of 8 share a prompt of
200 tokens; "peers" also runs with 64 different prompts. There are no stop tokens, so all contexts
have the same length and no peer has to pad. The peers are called turn by turn with the whole batch:
`generate`, and `generate_batch` (continuous batching, paged). All run in one process, each round in
another order. Printed are medians, and ratios within rounds.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, logging  # noqa: E402

import rollout  # noqa: E402
from rollout import Engine, PrefixCache, batched_generate, play, small_model  # noqa: E402
from tools import Call, run_calls  # noqa: E402

EPISODES, GROUP, TURNS, PROMPT, SAMPLED, OBSERVED = 64, 8, 4, 200, 50, 20


def random_tokens(vocab: int, seed: str, count: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


def observation(vocab: int, episode: int, turn: int) -> list[int]:
    return random_tokens(vocab, f"observation {episode} {turn}", OBSERVED)


def prompts(vocab: int, group: int) -> list[list[int]]:
    return [random_tokens(vocab, f"prompt {n // group}", PROMPT) for n in range(EPISODES)]


# ---- Who generates: contexts at the start -> contexts at the end ----


def make_engine(model, count: int, turns: int = TURNS, window: float = 0.0) -> Engine:
    context = PROMPT + turns * (2 * SAMPLED + OBSERVED)
    return Engine(model, set(), slots=count, context=context, rejoin_window=window)


def here(engine: Engine, contexts: list[list[int]], turns: int = TURNS) -> list[list[int]]:
    """One engine that has forgotten what it knew, and an agent per episode."""
    vocab = engine.model.config.vocab_size
    engine.forget()

    async def episode(n: int, ids: list[int]) -> list[int]:
        rng = Random(n)
        for turn in range(turns):
            message = await engine.generate(ids, SAMPLED, rng=rng)
            ids = ids + message.ids + observation(vocab, n, turn)
        return ids

    return play([partial(episode, n, ids) for n, ids in enumerate(contexts)], len(contexts))


def observe(vocab: int, contexts: list[list[int]], turn: int) -> list[list[int]]:
    return [ids + observation(vocab, n, turn) for n, ids in enumerate(contexts)]


def static_batch(model, contexts: list[list[int]], turns: int = TURNS) -> list[list[int]]:
    """`batched_generate` on the whole batch, once per turn: no reuse of keys and values."""
    rngs = [Random(n) for n in range(len(contexts))]
    for turn in range(turns):
        messages = batched_generate(model, contexts, SAMPLED, set(), rngs)
        longer = [ids + message.ids for ids, message in zip(contexts, messages, strict=True)]
        contexts = observe(model.config.vocab_size, longer, turn)
    return contexts


def generate(model, contexts: list[list[int]], turns: int = TURNS) -> list[list[int]]:
    """transformers.generate on the whole batch, once per turn."""
    for turn in range(turns):
        ids = torch.tensor(contexts, device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                             min_new_tokens=SAMPLED, max_new_tokens=SAMPLED, pad_token_id=0)
        contexts = observe(model.config.vocab_size, out.tolist(), turn)
    return contexts


def request_number(key: str) -> int:
    return int(key.rpartition("_")[2])


def generate_batch(model, contexts: list[list[int]], turns: int = TURNS) -> list[list[int]]:
    """transformers' continuous batching, once per turn."""
    # Its own choice of sizes would take all the memory of a CPU.
    pages = 1 + (PROMPT + turns * (SAMPLED + OBSERVED)) // 256
    batching = ContinuousBatchingConfig(num_blocks=len(contexts) * pages, max_batch_tokens=4096)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=SAMPLED, eos_token_id=-1,
                              pad_token_id=0)
    for turn in range(turns):
        found = model.generate_batch(contexts, generation_config=config, progress_bar=False,
                                     continuous_batching_config=batching)
        new = [found[key].generated_tokens for key in sorted(found, key=request_number)]
        longer = [ids + ids_new for ids, ids_new in zip(contexts, new, strict=True)]
        contexts = observe(model.config.vocab_size, longer, turn)
    return contexts


# ---- What is measured ----


def clock(step: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(steps: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, after a round to warm up. Without rounds: of that one."""
    seconds = {name: [] for name in steps}
    for r in range(rounds + 1):
        first = r % len(steps)
        for name in [*list(steps)[first:], *list(steps)[:first]]:
            seconds[name].append(clock(steps[name]))
    return {name: measured[1:] or measured for name, measured in seconds.items()}


def compare(seconds: dict[str, list[float]], first: str, tokens: int) -> None:
    for name, measured in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds[first], measured))
        speed = tokens / statistics.median(measured)
        print(f"    {name:28} {speed:9,.0f} sampled tokens/s   takes {ratio:5.2f} times as long",
              flush=True)


def peers(model, rounds: int) -> None:
    for group in (GROUP, 1):
        print(f"  {EPISODES} episodes of {TURNS} turns, {group} with the same prompt")
        contexts = prompts(model.config.vocab_size, group)
        steps = {"this engine": partial(here, make_engine(model, EPISODES), contexts),
                 "batched_generate, above it": partial(static_batch, model, contexts),
                 "generate": partial(generate, model, contexts)}
        try:
            [ids, *_] = generate_batch(model, contexts[:2], turns=1)
            assert len(ids) == PROMPT + SAMPLED + OBSERVED, len(ids)
            steps["generate_batch"] = partial(generate_batch, model, contexts)
        except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError,
                ValueError) as error:
            print(f"    generate_batch does not run here: {type(error).__name__}: {error}")
        compare(race(steps, rounds), "this engine", EPISODES * TURNS * SAMPLED)


class ForgetfulSlots(PrefixCache):
    """A slot keeps nothing when its message is finished."""

    def release(self, slot: int) -> None:
        super().release(slot)
        self.tokens[slot], self.length[slot] = -1, 0


def reuse(model, rounds: int) -> None:
    """What it saves to keep keys and values between turns."""
    contexts, engine = prompts(model.config.vocab_size, GROUP), make_engine(model, EPISODES)

    def run(kind: type[PrefixCache]) -> None:
        rollout.PrefixCache = kind  # an engine that forgets makes a new one
        here(engine, contexts)
        rollout.PrefixCache = PrefixCache

    print("  keys and values kept between turns")
    steps = {"kept": partial(run, PrefixCache), "forgotten": partial(run, ForgetfulSlots)}
    compare(race(steps, rounds), "kept", EPISODES * TURNS * SAMPLED)


def growth(model, rounds: int) -> None:
    """An episode of 16 turns may cost at most 5 times one of 4 turns: it has 4 times the tokens."""
    for count in (1, 8):
        contexts = prompts(model.config.vocab_size, 1)[:count]
        engine = make_engine(model, count, 16)
        short, long = partial(here, engine, contexts, 4), partial(here, engine, contexts, 16)
        seconds = race({"4 turns": short, "16 turns": long}, rounds)
        ratio = statistics.median(b / a for a, b in zip(*seconds.values()))
        print(f"  {count} at once: 16 turns cost {ratio:.2f} times as much as 4 turns", flush=True)


def hanging(model, rounds: int, limit: float = 1.0, share: float = 0.1) -> None:
    """A tool call after each turn. One in ten hangs until its limit. Only its episode waits."""
    vocab, engine = model.config.vocab_size, make_engine(model, EPISODES)
    contexts = prompts(vocab, GROUP)
    calls = EPISODES * TURNS
    hangs = set(Random(0).sample(range(calls), round(share * calls)))

    def work() -> str:
        return "done"

    def hang() -> None:
        time.sleep(2 * limit)

    async def episode(n: int, may_hang: bool) -> None:
        rng, ids = Random(n), list(contexts[n])
        for turn in range(TURNS):
            ids += (await engine.generate(ids, SAMPLED, rng=rng)).ids
            name = "hang" if may_hang and n * TURNS + turn in hangs else "work"
            await run_calls([Call(name, {})], {"work": work, "hang": hang}, timeout=limit)
            ids += observation(vocab, n, turn)

    def batch(may_hang: bool) -> None:
        engine.forget()
        play([partial(episode, n, may_hang) for n in range(EPISODES)], EPISODES)

    steps = {"no tool hangs": partial(batch, False), "one in ten": partial(batch, True)}
    seconds = race(steps, rounds)
    print(f"  {len(hangs)} of {calls} calls hang for {limit:.0f} s")
    compare(seconds, "no tool hangs", calls * SAMPLED)
    late = statistics.median(b - a for a, b in zip(*seconds.values()))
    print(f"    the batch ends {late:.2f} s later", flush=True)


def slow(model, rounds: int, agents: int = 32) -> None:
    """Agents whose tools take a while, out of step with one another: what a rejoin window costs."""
    vocab, agents = model.config.vocab_size, min(agents, EPISODES)
    contexts = prompts(vocab, GROUP)
    lengths = [SAMPLED // 2 + n % SAMPLED for n in range(agents)]  # they finish at different steps

    async def episode(engine: Engine, n: int, seconds: float) -> None:
        rng, ids = Random(n), list(contexts[n])
        for turn in range(TURNS):
            ids += (await engine.generate(ids, lengths[n], rng=rng)).ids
            await asyncio.sleep(seconds)
            ids += observation(vocab, n, turn)

    def batch(engine: Engine, seconds: float) -> None:
        engine.forget()
        play([partial(episode, engine, n, seconds) for n in range(agents)], agents)

    windows = (0.0, 0.25)
    engines = {f"window {w} s": make_engine(model, agents, window=w) for w in windows}
    for seconds in (0.5, 0.1):
        print(f"  {agents} agents, tools of {seconds} s")
        steps = {name: partial(batch, engine, seconds) for name, engine in engines.items()}
        compare(race(steps, rounds), "window 0.0 s", TURNS * sum(lengths))


PARTS = {"slow": slow, "peers": peers, "reuse": reuse, "growth": growth, "hanging": hanging}


def main() -> None:
    global EPISODES
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder of a model; empty: the default one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--part", choices=PARTS, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=EPISODES,
                        help="at once, for all parts but growth")
    options = parser.parse_args()
    EPISODES = options.episodes
    logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small_model(1024)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    model.to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.model or 'the default model'}: {size:.2f}M parameters, {options.dtype}, "
          f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in [options.part] if options.part else PARTS:
        PARTS[part](model, options.rounds)


if __name__ == "__main__":
    main()
