"""rollout.py: what shares a pass, a slot or a prefix changes no episode's tokens and log-probs.

The reference is `plain_generate`: one context, no cache.
"""

import asyncio
import copy
import math
import time
from functools import partial
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
)

import rollout
from grpo import GRPOConfig, Row, hidden_states, make_packs
from kernels import linear_logps
from rollout import (
    Engine,
    KVCache,
    Prefix,
    PrefixCache,
    batched_generate,
    cached_generate,
    check_model,
    plain_generate,
    play,
    sample,
    small_model,
)

V = 60
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8,
         "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None}


def tiny(seed=0, kind=LlamaConfig, **options):
    """In float64: what must be equal is equal on every CPU, in whatever order it adds."""
    torch.manual_seed(seed)
    config = kind(**{**SIZES, "initializer_range": 0.2, **options})
    return AutoModelForCausalLM.from_config(config).eval().double()


MODEL = tiny()


def plain(ids, new, seed, temperature=1.0, model=MODEL, stop=()):
    return plain_generate(model, list(ids), new, set(stop), Random(seed), temperature)


def engine(model=MODEL, stop=(), **options):
    return Engine(model, set(stop), **{"slots": 8, "context": 128, **options})


def tokens(n, seed=0):
    rng = Random(seed)
    return [rng.randrange(V) for _ in range(n)]


def ask(eng, ids, new, seed, temperature=1.0):
    """A start for `play`: one message."""
    return partial(eng.generate, ids, new, rng=Random(seed), temperature=temperature)


def same(out, expected):
    """Are two completions equal? Log-probs up to rounding in float64."""
    return (out.ids, out.finish) == (expected.ids, expected.finish) and \
        out.logps == pytest.approx(expected.logps, abs=1e-9)


async def talk(eng, prompt, seed, turns=3, new=6, observed=4, temperature=1.0, pause=0.0):
    """An agent in miniature: sampled tokens, then observed ones, several times. Gives a segment."""
    rng, ids = Random(seed), list(prompt)
    sampled, logps = [False] * len(ids), [0.0] * len(ids)
    for _ in range(turns):
        out = await eng.generate(ids, new, rng=rng, temperature=temperature)
        ids = ids + out.ids + [rng.randrange(V) for _ in range(observed)]
        sampled += [True] * len(out.ids) + [False] * observed
        logps += out.logps + [0.0] * observed
        await asyncio.sleep(pause)
    return SimpleNamespace(ids=ids, sampled=sampled, logps=logps)


@torch.no_grad()
def largest_gap(segments, temperature, model=MODEL):
    """Between log-probs noted while sampling and those of one plain pass over the whole segment."""
    gaps = []
    for s in segments:
        logits = model(input_ids=torch.tensor([s.ids])).logits[0] / temperature
        logps = logits.log_softmax(-1)
        for position, sampled in enumerate(s.sampled):
            if sampled:
                gaps.append(abs(s.logps[position] - logps[position - 1, s.ids[position]].item()))
    return max(gaps)


# ---- Sampling ----

def test_sample_inverts_the_cumulative_distribution():
    """It draws the first token whose cumulative probability exceeds the uniform number."""
    generator, rng = torch.Generator().manual_seed(0), Random(1)
    logits = torch.randn(40, 11, generator=generator, dtype=torch.float64) * 3
    temperature = torch.tensor([rng.choice([0.5, 1.0, 1.7]) for _ in range(40)]).double()
    uniform = torch.tensor([rng.random() for _ in range(40)], dtype=torch.float64)
    drawn, logps = sample(logits, temperature, uniform)
    for row in range(40):
        p, token = (logits[row] / temperature[row]).softmax(-1).tolist(), 0
        while sum(p[: token + 1]) <= uniform[row]:
            token += 1
        assert drawn[row] == token
        assert logps[row].item() == pytest.approx(math.log(p[token]), abs=1e-9)


def test_sample_has_the_right_frequencies():
    """Chi-square over 40,000 draws (10 degrees of freedom: above 35 once in 10,000 tries)."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(2))
    rng, n = Random(0), 40_000
    uniform = torch.tensor([rng.random() for _ in range(n)], dtype=torch.float64)
    drawn, _ = sample(logits.expand(n, -1), torch.full((n,), 0.7), uniform)
    expected = n * (logits / 0.7).softmax(-1)
    assert ((drawn.bincount(minlength=11) - expected) ** 2 / expected).sum() < 35


def test_sample_never_draws_a_token_of_probability_zero():
    """Not the first token with a uniform number of 0, and not the last with one just below 1."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 0.0, -inf]] * 3)
    uniform = torch.tensor([0.0, 0.4, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample(logits, torch.ones(3), uniform)[0].tolist() == [1, 1, 2]


def test_sample_is_greedy_at_temperature_zero():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    drawn, logps = sample(logits, torch.zeros(1), torch.tensor([0.999], dtype=torch.float64))
    assert drawn.item() == 1
    assert logps.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())


def test_greedy_is_what_transformers_generates():
    """Outside oracle: `generate(do_sample=False)`. Ours: different lengths in one batch."""
    prompts, eng = [tokens(n, n) for n in (3, 9, 17, 30)], engine()
    outs = play([ask(eng, prompt, 12, 0, temperature=0.0) for prompt in prompts], 4)
    for prompt, out in zip(prompts, outs):
        ids = torch.tensor([prompt])
        theirs = MODEL.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                max_new_tokens=12, pad_token_id=0)
        assert out.ids == theirs[0, len(prompt):].tolist() and out.finish == "length"


def test_stop_tokens_end_a_message_and_belong_to_it():
    """The stop token was sampled, so it is in the completion, and nothing comes after it."""
    stop = range(0, V, 3)
    eng = engine(stop=stop)
    outs = play([ask(eng, tokens(5), 10, seed) for seed in range(20)], 20)
    for seed, out in enumerate(outs):
        assert same(out, plain(tokens(5), 10, seed, stop=stop))
        assert out.finish == ("stop" if out.ids[-1] in stop else "length")
        assert not set(out.ids[:-1]) & set(stop)
    assert "stop" in {out.finish for out in outs}


# ---- The contract ----

@pytest.mark.parametrize("slots", [3, 8, 20])
def test_contract_04_sampling_logps_are_those_of_a_plain_pass(slots):
    """Temperature 0.7, whole and partly shared prompts, several turns, more agents than slots."""
    prompts = [tokens(20) + tokens(n, n) for n in (5, 25, 40)] + [tokens(30, 9)]
    eng = engine(slots=slots)
    starts = [partial(talk, eng, p, m, temperature=0.7) for p in prompts for m in range(5)]
    assert largest_gap(play(starts, 20), 0.7) < 1e-9


@pytest.mark.parametrize("pack_tokens", [1, 150, 100_000])
def test_contract_04_packed_logps_are_those_of_sampling(pack_tokens):
    """The update computes the log-probs that the engine sampled with: the ratio is 1."""
    eng = engine(slots=6)
    prompts = [tokens(20) + tokens(n, n) for n in (5, 30)]
    starts = [partial(talk, eng, p, m, temperature=0.7) for p in prompts for m in range(4)]
    rows = []
    for i, s in enumerate(play(starts, 8)):
        trained = [p for p, sampled in enumerate(s.sampled) if sampled]
        rows.append(Row(s.ids, trained, [1.0] * len(trained), [s.logps[p] for p in trained], i))
    packs = make_packs(rows, GRPOConfig(pack_tokens=pack_tokens))
    head = MODEL.get_output_embeddings().weight
    for pack in packs:
        logps, _ = linear_logps(hidden_states(MODEL, pack), head, pack.targets, temperature=0.7)
        assert (logps - pack.behavior_logps).abs().max() < 1e-9
    assert sum(len(p.targets) for p in packs) == sum(len(row.trained) for row in rows)


def test_contract_04_holds_in_float32_for_the_default_model():
    """The bound: about 20 roundings of 6e-8 on the way to a logit below 8: 20 * 6e-8 * 8 = 1e-5."""
    model = small_model(V)
    eng = engine(model, slots=6)
    segments = play([partial(talk, eng, tokens(20) + tokens(5, n % 3), n) for n in range(9)], 9)
    for s in segments:
        assert model(input_ids=torch.tensor([s.ids])).logits.abs().max() < 8
    assert largest_gap(segments, 1.0, model) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_contract_13_the_engine_gives_what_plain_generate_gives(temperature):
    """Tokens, log-probs and reason to stop. Shared prompts, fewer slots than requests."""
    prompts, stops = [tokens(20) + tokens(n % 4, n % 3) for n in range(12)], {3, 4, 5}
    eng = engine(stop=stops, slots=5)
    outs = play([ask(eng, p, 9, n, temperature) for n, p in enumerate(prompts)], 12)
    for n, out in enumerate(outs):
        assert same(out, plain(prompts[n], 9, n, temperature, stop=stops))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_contract_13_cached_generate_gives_what_plain_generate_gives(temperature):
    """A KV cache changes the cost and nothing else."""
    stops, reasons = {3, 4, 5}, set()
    for n in range(8):
        out = cached_generate(MODEL, tokens(10 + n, n), 9, stops, Random(n), temperature)
        assert same(out, plain(tokens(10 + n, n), 9, n, temperature, stop=stops))
        reasons.add(out.finish)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_contract_13_batched_generate_gives_what_plain_generate_gives(temperature, attention,
                                                                      monkeypatch):
    """Neither padding nor a row whose message has ended changes the others. Nor an own stream."""
    monkeypatch.setattr(torch.nn.functional, "softmax", float64_softmax)
    model, stops = tiny(attn_implementation=attention), {3, 4, 5}
    prompts = [tokens(3 + 4 * n, n) for n in range(8)]
    rngs, alone = [Random(n) for n in range(8)], [Random(n) for n in range(8)]
    outs = batched_generate(model, prompts, 9, stops, rngs, temperature)
    for prompt, out, rng in zip(prompts, outs, alone):
        assert same(out, plain_generate(model, prompt, 9, stops, rng, temperature))
    assert {out.finish for out in outs} == {"stop", "length"}
    assert [rng.random() for rng in rngs] == [rng.random() for rng in alone]


def test_contract_05_an_episode_does_not_depend_on_its_neighbours():
    """The same tokens alone, among 64, in any order, in few slots or many, in a used engine."""
    prompts = [tokens(24, n % 4) + tokens(n % 7, 100) for n in range(64)]

    def tokens_of(numbers, eng, at_once=64):
        segments = play([partial(talk, eng, prompts[n], n, turns=2) for n in numbers], at_once)
        return {n: s.ids for n, s in zip(numbers, segments)}

    used = engine(slots=64)
    together = tokens_of(range(64), used)
    assert tokens_of(range(63, -1, -1), used) == together
    assert tokens_of(range(64), engine(slots=5)) == together
    assert tokens_of(range(64), engine(slots=4), at_once=3) == together
    for n in (0, 17, 63):
        assert tokens_of([n], engine(slots=1))[n] == together[n]


# ---- The prefix cache ----

def test_duplicate_requests_are_computed_once():
    """Eight attempts at one task share a row for as long as they sample the same tokens."""
    eng = engine()
    outs = play([ask(eng, tokens(40), 5, seed, temperature=0.3) for seed in range(8)], 8)
    computed = {tuple(out.ids[:n]) for out in outs for n in range(1, 5)}
    assert dict(eng.stats) == {
        "steps": 5, "passes": 5, "prompt_tokens": 8 * 40, "prefill_tokens": 40,
        "computed_tokens": 40 + len(computed), "sampled_tokens": 8 * 5}
    assert 4 < len(computed) < 8 * 4, "some sampled the same tokens, some did not"


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("limits", [[9] * 8, [1, 9, 4, 9, 9, 2, 6, 9]], ids=["one limit", "many"])
def test_duplicate_requests_get_what_each_would_get_alone(temperature, limits):
    """They part when they sample different tokens. Some end earlier, at a limit or a stop token."""
    stops = {3, 4}
    eng = engine(stop=stops)
    starts = [ask(eng, tokens(30), limit, m, temperature) for m, limit in enumerate(limits)]
    for m, out in enumerate(play(starts, 8)):
        assert same(out, plain(tokens(30), limits[m], m, temperature, stop=stops))


def test_duplicate_requests_go_on_when_one_of_them_is_cancelled():
    """An agent gives up in the middle of a message. The others keep the row that they share."""
    eng = engine()

    async def scene():
        generate = partial(eng.generate, tokens(30), 12, temperature=0.0)
        first, *others = [asyncio.ensure_future(generate(rng=Random(m))) for m in range(4)]
        while eng.stats["sampled_tokens"] < 8:
            await asyncio.sleep(0)
        first.cancel()
        return await asyncio.gather(*others)

    for out in asyncio.run(scene()):
        assert same(out, plain(tokens(30), 12, 0, temperature=0.0))
    assert eng.stats["computed_tokens"] == 30 + 11 and eng.stats["sampled_tokens"] < 4 * 12


def test_a_common_beginning_is_computed_once():
    """Four prompts begin with the same 30 tokens and go on differently."""
    eng = engine()
    play([ask(eng, tokens(30) + tokens(10, 1 + n), 1, n) for n in range(4)], 4)
    assert eng.stats["computed_tokens"] == 40 + 3 * 10


def test_a_turn_costs_its_new_tokens_only():
    """It goes on in its slot. The last sampled token has not been in a pass before: 1 + 4 + 4."""
    eng = engine()
    play([partial(talk, eng, tokens(40), 0, turns=3, new=5, observed=4)], 1)
    assert eng.stats["computed_tokens"] == 40 + 4 + 2 * (1 + 4 + 4)


def test_the_context_of_an_agent_at_its_tool_is_left_alone():
    """An agent with the same prompt copies it, or the absent agent would lose its own context."""
    eng = engine()

    async def late():
        await asyncio.sleep(0.1)
        await eng.generate(tokens(40), 5, rng=Random(1))

    play([partial(errand, eng, 0.3, turns=2, prompt=40), late], 2)
    first_turn, other_agent, second_turn = 40 + 3, 1 + 4, 1 + 3
    assert eng.stats["computed_tokens"] == first_turn + other_agent + second_turn


def test_a_search_for_a_prefix_changes_nothing():
    """Admission reads first (find), then it writes (take)."""
    prefixes = PrefixCache(3, 8)
    prefixes.take(1, [5, 6, 7, 8], 4)
    prefixes.release(1)
    prefixes.take(0, [5, 6], 2)
    before = copy.deepcopy(vars(prefixes))
    prefix = prefixes.find([5, 6, 7, 9])
    assert (prefix.source, prefix.length) == (1, 3)
    assert prefix.target == 2, "slot 1 also holds token 8, which another agent may need"
    assert prefixes.find([5, 6, 7, 8, 9]) == Prefix(source=1, length=4, target=1)
    assert all(np.array_equal(vars(prefixes)[name], value) for name, value in before.items())


def test_a_request_waits_for_a_prefix_that_another_prefill_computes():
    """If it saves enough tokens. A short prefix is not worth a pass."""
    prefixes = PrefixCache(2, 64)
    prefixes.take(0, tokens(40), 0)
    assert prefixes.find(tokens(20)) is None
    assert prefixes.find(tokens(10)).length == 0
    prefixes.extend(0, tokens(40))
    assert prefixes.find(tokens(20)).length == 19


@pytest.mark.parametrize("most", [1, 7, 40])
def test_a_long_prefill_is_cut_into_pieces(most, monkeypatch):
    """One pass over a batch of long contexts needs memory for rows times length squared."""
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", most)
    expected = [plain(tokens(50 + n, n), 4, n) for n in range(3)]
    eng, sizes, forward = engine(), [], MODEL.base_model.forward

    def seen(**kwargs):
        sizes.append(kwargs["input_ids"].numel())
        return forward(**kwargs)

    monkeypatch.setattr(MODEL.base_model, "forward", seen)
    outs = play([ask(eng, tokens(50 + n, n), 4, n) for n in range(3)], 3)
    assert all(same(*pair) for pair in zip(outs, expected))
    assert max(sizes) <= max(most, 3)


def test_a_lost_slot_is_computed_again():
    """Six agents take turns in two slots. Each finds its slot taken, and samples the same."""
    crowded, roomy = engine(slots=2), engine(slots=6)
    found = play([partial(talk, crowded, tokens(10, n), n, pause=0.02) for n in range(6)], 6)
    expected = play([partial(talk, roomy, tokens(10, n), n) for n in range(6)], 6)
    assert [s.ids for s in found] == [s.ids for s in expected]
    assert crowded.stats["computed_tokens"] > roomy.stats["computed_tokens"]


@pytest.mark.parametrize("seed", range(4))
def test_slots_survive_any_traffic(seed):
    """Random contexts from a tree of prefixes, in 4 slots: copies of copies, copies to oneself."""
    rng, eng = Random(seed), engine(slots=4)
    contexts = [tokens(18, s) for s in range(3)]
    for _ in range(40):
        begin = rng.choice(contexts[:3] + contexts[-6:])
        begin = begin[: rng.randint(1, len(begin))]
        contexts.append((begin + tokens(rng.choice([0, 0, 1, 9, 20]), rng.random()))[:100])
    starts = [ask(eng, ids, 1 + n % 3, n, temperature=0.7) for n, ids in enumerate(contexts)]
    for n, out in enumerate(play(starts, rng.choice([3, 9, 40]))):
        assert same(out, plain(contexts[n], 1 + n % 3, n, temperature=0.7))


def test_a_copy_takes_the_first_positions_of_keys_and_values():
    """Of all layers, and no more than asked for: the rest of the target stays."""
    cache = KVCache(2, 6)
    slot_numbers = torch.arange(2.0)[:, None, None, None].expand(2, 7, 2, 3)
    cache.layers = [[slot_numbers + 0, slot_numbers + 10], [slot_numbers + 20, slot_numbers + 30]]
    cache.copy(0, 1, 4)
    for layer, first in zip(cache.layers, (0, 20)):
        for stored, number in zip(layer, (first, first + 10)):
            assert stored[1, :, 0, 2].tolist() == [number] * 4 + [number + 1] * 3


@pytest.mark.parametrize("how", ["in place", "fused", "load_state_dict"])
def test_new_weights_make_the_engine_forget(how):
    """Fused optimizers do not count the versions of what they change."""
    model = tiny(seed=1)
    eng = engine(model)
    play([ask(eng, tokens(20), 4, 0)], 1)
    if how == "in place":
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    elif how == "fused":
        model(input_ids=torch.tensor([tokens(20)])).logits.sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    else:
        model.load_state_dict(tiny(seed=2).state_dict())
    [out] = play([ask(eng, tokens(20), 4, 0)], 1)
    assert eng.stats["computed_tokens"] == 2 * (20 + 3)
    assert same(out, plain(tokens(20), 4, 0, model=model))


def test_forget_forgets_all_keys_and_values():
    """A resumed run has none of the step before, so no step may start with any."""
    eng = engine()
    for _ in range(2):
        play([ask(eng, tokens(20), 4, 0)], 1)
        eng.forget()
    assert eng.stats["prefill_tokens"] == eng.stats["prompt_tokens"] == 2 * 20


def test_after_an_update_slots_are_chosen_as_in_a_new_engine(monkeypatch):
    """A resumed run must repeat bit by bit what a run that was never stopped does."""
    model, taken, take = tiny(seed=1), [], PrefixCache.take

    def noted(self, slot, ids, length):
        taken.append(slot)
        take(self, slot, ids, length)

    def slots_of(eng):
        taken.clear()
        play([partial(talk, eng, tokens(20) + tokens(5, n), n) for n in range(6)], 4)
        return list(taken)

    monkeypatch.setattr(PrefixCache, "take", noted)
    used = engine(model, slots=3)
    play([ask(used, tokens(9, n), 9 - n, n) for n in range(3)], 3)  # slot 0 is released last
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    assert slots_of(used) == slots_of(engine(model, slots=3))


# ---- Time ----

def test_a_finished_message_frees_its_slot_at_once():
    """2 slots, messages of 6, 2, 2, 2 tokens: 6 steps. Batches that wait for their longest: 8."""
    eng = engine(slots=2)
    play([ask(eng, tokens(5, n), n, 0) for n in (6, 2, 2, 2)], 4)
    assert eng.stats["steps"] == 6


def test_a_batch_waits_for_its_longest_message_and_the_engine_does_not(monkeypatch):
    """Why the engine exists: 12 messages, 3 at a time, in batches and with continuous batching."""
    stops, passes, forward = set(range(0, V, 5)), [], MODEL.base_model.forward

    def counted(**kwargs):
        passes.append(len(kwargs["input_ids"]))
        return forward(**kwargs)

    monkeypatch.setattr(MODEL.base_model, "forward", counted)
    prompts, outs = [tokens(5 + n, n) for n in range(12)], []
    for first in range(0, 12, 3):
        numbers = range(first, first + 3)
        outs += batched_generate(MODEL, [prompts[n] for n in numbers], 20, stops,
                                 [Random(n) for n in numbers])
    lengths = [len(out.ids) for out in outs]
    assert passes == [3] * sum(max(lengths[n : n + 3]) for n in range(0, 12, 3))
    eng = engine(stop=stops, slots=3)
    assert all(same(*pair) for pair in
               zip(play([ask(eng, ids, 20, n) for n, ids in enumerate(prompts)], 12), outs))
    assert eng.stats["steps"] < 0.8 * len(passes)


async def errand(eng, seconds, turns=3, log=None, name="", prompt=5):
    """An agent whose tool takes a while."""
    ids, rng = tokens(prompt), Random(0)
    for turn in range(turns):
        ids += (await eng.generate(ids, 4, rng=rng)).ids
        if turn < turns - 1:
            await asyncio.sleep(seconds)
    if log is not None:
        log.append(name)


def test_agents_with_quick_tools_rejoin_at_the_same_step():
    """Tools of different, short duration: all three turns of all agents are decoded together."""
    eng = engine(rejoin_window=2.0)
    play([partial(errand, eng, seconds) for seconds in (0, 0.001, 0.02, 0.04)], 4)
    assert eng.stats["steps"] == 3 * 4


def test_a_slow_tool_holds_nobody_up():
    """Without a window an agent with quick tools ends all its turns while another's tool runs."""
    eng, log = engine(), []
    quick = partial(errand, eng, 0, turns=4, log=log, name="quick")
    slow = partial(errand, eng, 1.0, turns=2, log=log, name="slow")
    play([quick, slow], 2)
    assert log == ["quick", "slow"] and not eng.window.waited


def test_a_slow_tool_costs_the_others_one_window():
    """The others pay it once for each slow call, not once for each step of its duration."""
    eng, log = engine(rejoin_window=0.05), []
    quick = partial(errand, eng, 0, turns=4, log=log, name="quick")
    slow = partial(errand, eng, 2.0, turns=2, log=log, name="slow")
    play([quick, slow], 2)
    assert log == ["quick", "slow"] and 0.04 < eng.window.waited < 1.0


def test_the_event_loop_turns_while_the_engine_decodes(monkeypatch):
    """An async tool of many short awaits got one turn per step, and ran into its time limit."""
    eng, log = engine(), []
    step = eng.decoder.step

    def slow_step():
        time.sleep(1.0)
        log.append("step")
        step()

    async def tool():
        for _ in range(50):
            await asyncio.sleep(0.001)
        log.append("tool")

    monkeypatch.setattr(eng.decoder, "step", slow_step)
    play([ask(eng, tokens(5), 1, 0), tool], 2)
    assert log == ["tool", "step"]


def test_agents_that_are_slow_to_begin_are_waited_for_within_the_window():
    """Resets take different times. `play` tells the engine of each agent that begins."""
    eng = engine(rejoin_window=2.0)

    async def late(seconds):
        await asyncio.sleep(seconds)
        await eng.generate(tokens(9), 4, rng=Random(0))

    play([partial(late, seconds) for seconds in (0, 0.001, 0.02, 0.04)], 4, eng)
    assert eng.stats["steps"] == 4


def test_requests_are_admitted_in_the_order_of_their_agents(monkeypatch):
    """Tools return in any order. Rounding depends on the slot, so slots must not depend on that."""
    eng, admitted, take = engine(rejoin_window=2.0), [], PrefixCache.take

    def noted(self, slot, ids, length):
        admitted.append(ids[0])
        take(self, slot, ids, length)

    async def late(first_token, seconds):
        await asyncio.sleep(seconds)
        await eng.generate([first_token, 7, 8], 2, rng=Random(0))

    monkeypatch.setattr(PrefixCache, "take", noted)
    play([partial(late, n, seconds) for n, seconds in enumerate((0.04, 0.001, 0.02, 0))], 4, eng)
    assert admitted == [0, 1, 2, 3]


def test_an_agent_that_ends_is_not_waited_for():
    """The window is for agents on their way back. One whose episode is over must not cost it."""
    eng = engine(rejoin_window=60.0)
    play([partial(errand, eng, 0, turns=turns) for turns in (1, 2, 3, 1)], 2)
    assert eng.window.waited < 30


# ---- Trouble ----

@pytest.mark.parametrize("when", [1, 3])
def test_every_agent_that_waits_hears_of_a_failing_pass(when, monkeypatch):
    """Nobody hangs, the engine goes on, and it does not use what was half written."""
    eng = engine()
    forward, calls = MODEL.base_model.forward, []

    def broken(**kwargs):
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("out of memory")
        return forward(**kwargs)

    async def heard(seed):
        with pytest.raises(RuntimeError, match="out of memory"):
            await eng.generate(tokens(30), 5, rng=Random(seed))
        return "heard"

    monkeypatch.setattr(MODEL.base_model, "forward", broken)
    assert play([partial(heard, seed) for seed in range(12)], 12) == ["heard"] * 12
    for seed, out in enumerate(play([ask(eng, tokens(30), 5, seed) for seed in range(3)], 3)):
        assert same(out, plain(tokens(30), 5, seed))


def test_an_agent_whose_message_ended_in_a_failing_step_hears_of_it(monkeypatch):
    """Its prefill gave the only token it wanted. Then the decode of the others failed: it hung."""
    eng, prefilled, forward = engine(), [], MODEL.base_model.forward

    def broken(**kwargs):
        if prefilled:
            raise RuntimeError("out of memory")
        if kwargs["input_ids"].shape[1] == 20:
            prefilled.append("the short one")
        return forward(**kwargs)

    async def long():
        await eng.generate(tokens(30), 90, rng=Random(0))

    async def short():
        while not eng.stats["sampled_tokens"]:
            await asyncio.sleep(0)
        await eng.generate(tokens(20, 1), 1, rng=Random(1))

    async def scene():
        return await asyncio.wait_for(asyncio.gather(long(), short(), return_exceptions=True), 20)

    monkeypatch.setattr(MODEL.base_model, "forward", broken)
    assert [str(error) for error in asyncio.run(scene())] == ["out of memory"] * 2


def test_logits_that_are_not_finite_are_an_error():
    """NaN compares false with everything: sampling from it would give token 0 for ever."""
    model = tiny(seed=3)
    eng = engine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        play([ask(eng, tokens(5), 5, 0)], 1)


def test_after_a_divergence_no_nan_stays_in_the_kv_cache():
    """A masked value counts 0 times itself, and 0 times NaN is NaN: old values must be gone."""
    model = tiny(seed=3)
    eng, healthy = engine(model, slots=2), model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        play([ask(eng, tokens(40, n), 5, 0) for n in range(2)], 2)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(healthy)
    short, long = tokens(8), tokens(17, 1)
    outs = play([ask(eng, short, 5, 0), ask(eng, long, 5, 0)], 2)
    assert same(outs[0], plain(short, 5, 0, model=model))
    assert same(outs[1], plain(long, 5, 0, model=model))


def test_a_head_in_16_bits_is_multiplied_in_32():
    """Logits rounded to bfloat16 before the softmax moved log-probs by 4e-4 on a trained model."""
    model = tiny(seed=3).bfloat16()
    eng, hidden = engine(model), torch.randn(3, 32).bfloat16()
    play([ask(eng, tokens(5), 1, 0)], 1)
    with torch.inference_mode():
        exact = hidden.double() @ model.lm_head.weight.double().T
        assert (eng.decoder._logits(hidden) - exact).abs().max() < 1e-5
        assert (model.lm_head(hidden) - exact).abs().max() > 1e-5


def test_a_cancelled_request_frees_its_slot_and_hurts_nobody():
    """One slot, and a long message that is cancelled. The next gets the slot and its own tokens."""
    eng = engine(slots=1)

    async def scene():
        long = asyncio.ensure_future(eng.generate(tokens(5), 100, rng=Random(0)))
        queued = asyncio.ensure_future(eng.generate(tokens(6, 3), 5, rng=Random(1)))
        gone = asyncio.ensure_future(eng.generate(tokens(7, 4), 5, rng=Random(2)))
        while eng.stats["sampled_tokens"] < 5:
            await asyncio.sleep(0)
        long.cancel()
        gone.cancel()
        return await asyncio.wait_for(queued, 10)

    assert same(asyncio.run(scene()), plain(tokens(6, 3), 5, 1))
    assert not eng.decoder.requests() and eng.stats["sampled_tokens"] < 5 + 5 + 3


def test_an_engine_outlives_its_event_loops():
    """A loop that ended in the middle (Ctrl-C, an exception) leaves nothing behind for the next."""
    eng = engine(slots=2)

    async def bad():
        await eng.generate(tokens(4), 2, rng=Random(0))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        play([bad] + [partial(talk, eng, tokens(10, n), n, turns=9) for n in range(5)], 6)
    abandoned = asyncio.new_event_loop()
    task = abandoned.create_task(eng.generate(tokens(5), 50, rng=Random(0)))
    abandoned.run_until_complete(asyncio.sleep(0.01))  # and nobody ever finishes it
    for _ in range(2):
        segments = play([partial(talk, eng, tokens(10, n), n) for n in range(5)], 5)
        assert largest_gap(segments, 1.0) < 1e-9
    task.cancel()
    abandoned.run_until_complete(asyncio.gather(task, return_exceptions=True))
    abandoned.close()


@pytest.mark.parametrize(("length", "new"), [(10, 7), (0, 3), (3, 0)])
def test_a_request_that_cannot_fit_is_refused(length, new):
    """One clear error for the agent that asks, before anything runs."""
    with pytest.raises(ValueError, match="together at most the context of 16"):
        asyncio.run(ask(engine(context=16), tokens(length), new, 0)())


def test_a_request_may_fill_its_context():
    assert len(asyncio.run(ask(engine(context=16), tokens(10), 6, 0)()).ids) == 6


def test_play_keeps_the_order_and_raises_the_first_failure():
    """Results in the order of the starts; never more than `at_once` at work."""
    working, most = [0], [0]

    async def job(n):
        working[0] += 1
        most[0] = max(most[0], working[0])
        await asyncio.sleep(0.01 * (5 - n % 5))
        working[0] -= 1
        if n == 99:
            raise KeyError(n)
        return n

    assert play([partial(job, n) for n in range(12)], 3) == list(range(12))
    assert most == [3] and play([], 3) == []
    with pytest.raises(KeyError):
        play([partial(job, n) for n in (1, 99, 2)], 3)


# ---- Models ----

def float64_softmax(scores, dim, dtype=None):
    """`torch.nn.functional.softmax` that ignores a wish for float32."""
    return scores.double().softmax(dim)


@pytest.mark.parametrize(("kind", "options"), [
    (Qwen3Config, {}), (GemmaConfig, {}), (MistralConfig, {"sliding_window": None}),
    (LlamaConfig, {"attn_implementation": "eager"})])
def test_common_models_are_right(kind, options, monkeypatch):
    """Log-probs by way of slots are those of a plain pass, for other models and attentions, too.

    Eager attention of transformers takes its softmax in float32, where the sum depends on the
    number of columns and on the CPU's vectors: here it stays in float64.
    """
    monkeypatch.setattr(torch.nn.functional, "softmax", float64_softmax)
    model = tiny(kind=kind, **options)
    eng = engine(model, slots=3)
    segments = play([partial(talk, eng, tokens(12), n) for n in range(5)], 5)
    assert largest_gap(segments, 1.0, model) < 1e-9


@pytest.mark.parametrize(("kind", "options", "why"), [
    (MistralConfig, {"sliding_window": 16}, "sliding_attention"),
    (PhiConfig, {}, "bias"),
    (MambaConfig, {"state_size": 4}, "linear_attention"),
    (GraniteConfig, {"logits_scaling": 4.0}, "not its head times")])
def test_other_models_are_refused(kind, options, why):
    """A sliding window, a recurrent state, a bias, scaled logits: log-probs would be wrong."""
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **options}))
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be used here: .*{why}"):
        check_model(model)


def test_capped_logits_are_refused():
    """Small logits are hardly changed by the cap, so numbers alone would not show it."""
    model = tiny()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="capped"):
        check_model(model)


def test_a_model_that_fails_the_check_is_refused_in_one_line(monkeypatch):
    """A model of another make raises something of its own. The person sees which, and no trace."""
    model = tiny()

    def fails(**kwargs):
        raise TypeError("unexpected keyword argument 'past_key_values'")

    monkeypatch.setattr(model.base_model, "forward", fails)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be used here: TypeError: unexp"):
        check_model(model)


def test_small_model_is_reproducible_and_leaves_the_random_state_alone():
    """Weights depend on the seed only. Making them does not move the caller's random numbers."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = small_model(100), small_model(100), small_model(100, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_the_heads_of_a_small_model_begin_by_copying():
    """In every layer, values times output is 0.2 times the identity."""
    for layer in small_model(100).model.layers:
        through = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        torch.testing.assert_close(through, 0.2 * torch.eye(128), atol=1e-5, rtol=0)


def test_the_demo_keeps_its_promise(capsys):
    """`python rollout.py` says that the engine's tokens are those of plain_generate."""
    rollout.demo()
    assert "the same tokens" in capsys.readouterr().out
