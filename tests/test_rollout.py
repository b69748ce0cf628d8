"""rollout.py: whatever shares a pass, a slot or a prefix, each episode gets the tokens and log-probs it would get alone.

The oracle is `plain`: one context, no cache, the whole context through the model for each token.
"""

import asyncio
import math
import time
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,  # fmt: skip
    Qwen3Config,
)

import rollout
from grpo import GRPOConfig, Row, hidden_states, make_packs
from kernels import linear_logps
from rollout import Engine, SlotCache, check_model, plain_generate, play, sample, small_model

V = 60
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None}


def tiny(seed=0, kind=LlamaConfig, **options):
    """In float64: what is exact must be exact on every CPU, whatever the order in which it adds."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**{**SIZES, "initializer_range": 0.2, **options})).eval().double()


MODEL = tiny()


def plain(ids, new, seed=None, temperature=1.0, model=None, rng=None, stop=()):
    """Sample without a cache or a batch: (ids, logps)."""
    out = plain_generate(model or MODEL, list(ids), new, set(stop), rng or Random(seed), temperature)
    return out.ids, out.logps


def engine(model=None, stop=(), **options):
    return Engine(model or MODEL, set(stop), **{"slots": 8, "context": 128, **options})


def tokens(n, seed=0):
    rng = Random(seed)
    return [rng.randrange(V) for _ in range(n)]


async def talk(eng, prompt, seed, turns=3, new=6, world=4, temperature=1.0):
    """An agent in miniature: sampled tokens, then tokens of the world, several times. Gives a segment."""
    rng, s = Random(seed), SimpleNamespace(ids=list(prompt), sampled=[False] * len(prompt), logps=[0.0] * len(prompt))
    for _ in range(turns):
        out = await eng.generate(s.ids, new, rng=rng, temperature=temperature)
        observed = [rng.randrange(V) for _ in range(world)]
        s.ids += out.ids + observed
        s.sampled += [True] * len(out.ids) + [False] * world
        s.logps += out.logps + [0.0] * world
    return s


@torch.no_grad()
def recomputed(segment, temperature, model=None):
    """Log-probs of the sampled tokens from one plain pass over the whole segment."""
    logps = ((model or MODEL)(input_ids=torch.tensor([segment.ids])).logits[0] / temperature).log_softmax(-1)
    return {p: logps[p - 1, segment.ids[p]].item() for p, sampled in enumerate(segment.sampled) if sampled}


def gap(segments, temperature, model=None):
    return max(abs(s.logps[p] - x) for s in segments for p, x in recomputed(s, temperature, model).items())


# ---- Sampling ------------------------------------------------------------------------------------------------------------------

def test_sample_inverts_the_cumulative_distribution():
    """The token drawn is the first whose cumulative probability exceeds the uniform number; its logp is at the temperature."""
    logits, rng = torch.randn(40, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3, Random(1)
    temperature = torch.tensor([rng.choice([0.5, 1.0, 1.7]) for _ in range(40)], dtype=torch.float64)
    uniform = torch.tensor([rng.random() for _ in range(40)], dtype=torch.float64)
    drawn, logps = sample(logits, temperature, uniform)
    for row in range(40):
        p, total, expected = (logits[row].double() / temperature[row].double()).softmax(-1).tolist(), 0.0, None
        for token, x in enumerate(p):
            total += x
            if expected is None and total > uniform[row]:
                expected = token
        assert drawn[row] == expected
        assert logps[row].item() == pytest.approx(math.log(p[expected]), abs=1e-9)


def test_sample_has_the_right_frequencies():
    """Chi-square over 40,000 draws (10 degrees of freedom: above 35 once in 10,000 tries)."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(2))
    rng, n = Random(0), 40_000
    uniform = torch.tensor([rng.random() for _ in range(n)], dtype=torch.float64)
    counts = sample(logits.expand(n, -1), torch.full((n,), 0.7), uniform)[0].bincount(minlength=11)
    expected = n * (logits / 0.7).softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 35


def test_sample_never_draws_the_impossible_and_is_greedy_at_temperature_zero():
    """A uniform number of exactly 0 must not draw a first token of probability 0, nor must one next to 1 draw such a last."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 0.0, -inf]] * 3)
    uniform = torch.tensor([0.0, 0.4, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample(logits, torch.ones(3), uniform)[0].tolist() == [1, 1, 2]
    drawn, logps = sample(torch.tensor([[0.0, 3.0, 1.0]]), torch.zeros(1), torch.tensor([0.999], dtype=torch.float64))
    assert drawn.item() == 1 and logps.item() == pytest.approx(torch.tensor([0.0, 3.0, 1.0]).log_softmax(-1)[1].item())


def test_greedy_is_what_transformers_generates():
    """Outside oracle: `generate(do_sample=False)` of transformers, several contexts of different lengths in one batch of ours."""
    prompts = [tokens(n, n) for n in (3, 9, 17, 30)]
    eng = engine()
    ours = play([lambda p=p: eng.generate(p, 12, rng=Random(0), temperature=0.0) for p in prompts], 4)
    for prompt, out in zip(prompts, ours):
        ids = torch.tensor([prompt])
        theirs = MODEL.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert out.ids == theirs[0, len(prompt):].tolist() and out.finish == "length"


def test_stop_tokens_end_a_message_and_belong_to_it():
    """The stop token was sampled, so it is in the completion, with its log-prob, and nothing comes after it."""
    stop, eng = range(0, V, 3), engine(stop=range(0, V, 3))
    outs = play([lambda s=s: eng.generate(tokens(5), 10, rng=Random(s)) for s in range(20)], 20)
    for seed, out in enumerate(outs):
        ids, logps = plain(tokens(5), 10, seed, stop=stop)
        assert out.ids == ids and out.logps == pytest.approx(logps, abs=1e-9)
        assert out.finish == ("stop" if ids[-1] in stop else "length")
    assert "stop" in {out.finish for out in outs}


# ---- The contract --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("slots", [3, 8, 20])
def test_contract_04_sampling_logps_are_those_of_a_plain_pass(slots):
    """Temperature 0.7; groups that share prompts, groups that share half of one, several turns, more agents than slots."""
    common = tokens(20)
    prompts = [common + tokens(n, n) for n in (5, 25, 40)] + [tokens(30, 9)]
    eng = engine(slots=slots)
    segments = play([lambda p=p, m=m: talk(eng, p, m, temperature=0.7) for p in prompts for m in range(5)], 20)
    assert gap(segments, 0.7) < 1e-9


@pytest.mark.parametrize("pack_tokens", [1, 150, 100_000])
def test_contract_04_packed_logps_are_those_of_sampling(pack_tokens):
    """What the update computes for rows in trees is what the engine sampled with: the ratio is 1."""
    eng = engine(slots=6)
    prompts = [tokens(20) + tokens(n, n) for n in (5, 30)]
    segments = play([lambda p=p, m=m: talk(eng, p, m, temperature=0.7) for p in prompts for m in range(4)], 8)
    rows = []
    for i, s in enumerate(segments):
        trained = [p for p, sampled in enumerate(s.sampled) if sampled]
        rows.append(Row(s.ids, trained, [1.0] * len(trained), [s.logps[p] for p in trained], i))
    packs = make_packs(rows, GRPOConfig(pack_tokens=pack_tokens))
    for pack in packs:
        logps, _ = linear_logps(hidden_states(MODEL, pack), MODEL.get_output_embeddings().weight, pack.targets, temperature=0.7)
        assert (logps - pack.behavior_logps).abs().max() < 1e-9
    assert sum(len(p.targets) for p in packs) == sum(sum(s.sampled) for s in segments)


def test_contract_04_holds_in_float32_for_the_default_model():
    """The bound: some 20 roundings of 6e-8 on the way to a logit of this model, whose logits stay below 8: 20 * 6e-8 * 8 = 1e-5."""
    model = small_model(V)
    eng = engine(model, slots=6)
    segments = play([lambda n=n: talk(eng, tokens(20) + tokens(5, n % 3), n) for n in range(9)], 9)
    assert max(x.abs().max() for x in [model(input_ids=torch.tensor([s.ids])).logits for s in segments]) < 8
    assert gap(segments, 1.0, model) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_contract_13_the_engine_gives_what_plain_generate_gives(temperature):
    """Tokens, log-probs and reason to stop, for contexts that share prompts, in fewer slots than requests, prefill in pieces."""
    prompts, stops = [tokens(20) + tokens(n % 4, n % 3) for n in range(12)], {3, 4, 5}
    eng = engine(stop=stops, slots=5)
    outs = play([lambda n=n: eng.generate(prompts[n], 9, rng=Random(n), temperature=temperature) for n in range(12)], 12)
    for n, out in enumerate(outs):
        expected = plain_generate(MODEL, prompts[n], 9, stops, Random(n), temperature)
        assert (out.ids, out.finish) == (expected.ids, expected.finish)
        assert out.logps == pytest.approx(expected.logps, abs=1e-9)


def test_contract_05_an_episode_does_not_depend_on_its_neighbours():
    """The same seed gives the same tokens alone, among 64, in any order, in few slots or many, and in a used engine."""
    prompts = [tokens(24, n % 4) + tokens(n % 7, 100) for n in range(64)]

    def tokens_of(numbers, at_once=64, eng=None, **options):
        eng = eng or engine(**options)
        segments = play([lambda n=n: talk(eng, prompts[n], n, turns=2) for n in numbers], at_once)
        return {n: s.ids for n, s in zip(numbers, segments)}

    together = tokens_of(range(64), slots=64)
    backwards, used = list(reversed(range(64))), engine(slots=64)
    assert tokens_of(backwards, slots=64, eng=used) == together
    assert tokens_of(backwards, slots=64, eng=used) == together
    assert tokens_of(range(64), slots=5) == together
    assert tokens_of(range(64), at_once=3, slots=4) == together
    for n in (0, 17, 63):
        assert tokens_of([n], slots=1)[n] == together[n]


# ---- Slots ---------------------------------------------------------------------------------------------------------------------

def test_every_context_goes_through_the_model_once():
    """Eight attempts at one task: their prompt is read once, and what several of them sample alike is computed for one of them."""
    eng = engine()
    outs = play([lambda m=m: eng.generate(tokens(40), 5, rng=Random(m), temperature=0.3) for m in range(8)], 8)
    fed = {tuple(out.ids[:n]) for out in outs for n in range(5)}
    counts = {name: eng.stats[name] for name in ("steps", "passes", "context", "read", "sampled")}
    assert counts == {"steps": 5, "passes": 5, "context": 8 * 40, "read": 40 + len(fed) - 1, "sampled": 8 * 5}
    assert 5 + 1 < len(fed) < 1 + 8 * 4, "some went together, some parted"


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("limits", [[9] * 8, [1, 9, 4, 9, 9, 2, 6, 9]], ids=["one limit", "many"])
def test_duplicate_requests_get_what_each_would_get_alone(temperature, limits):
    """They part when they sample differently, when one may write less, when it has met a stop token. The first is the leader."""
    stops, limit = {3, 4}, dict(enumerate(limits))
    eng = engine(stop=stops)
    outs = play([lambda m=m: eng.generate(tokens(30), limit[m], rng=Random(m), temperature=temperature) for m in range(8)], 8)
    for m, out in enumerate(outs):
        ids, logps = plain(tokens(30), limit[m], m, temperature, stop=stops)
        assert out.ids == ids and out.logps == pytest.approx(logps, abs=1e-9)


def test_a_duplicate_goes_on_when_its_leader_is_cancelled():
    """The leader's agent gives up in the middle of a message: its slot is inherited by those that went along with it."""
    eng = engine()

    async def scenario():
        leader, *others = [asyncio.ensure_future(eng.generate(tokens(30), 12, rng=Random(m), temperature=0.0)) for m in range(4)]
        while eng.stats["sampled"] < 8:
            await asyncio.sleep(0)
        assert [r.leader is None for r in eng.active] == [True, False, False, False]
        leader.cancel()
        return await asyncio.gather(*others)

    ids = {tuple(out.ids) for out in asyncio.run(scenario())}
    assert ids == {tuple(asyncio.run(engine().generate(tokens(30), 12, rng=Random(0), temperature=0.0)).ids)}
    assert eng.stats["read"] == 30 + 11


def test_a_turn_costs_its_new_tokens_only():
    """The next turn goes on in the slot of the last: its last sampled token (never fed so far) and the observation are read."""
    eng = engine()
    play([lambda: talk(eng, tokens(40), 0, turns=3, new=5, world=4)], 1)
    assert eng.stats["read"] == 40 + 4 + 2 * (1 + 4 + 4)


def test_the_context_of_an_agent_at_its_tool_is_left_alone():
    """Who begins with the same prompt copies it. Going on in the slot itself would cost the absent agent all it had."""
    eng = engine(rejoin_window=0.0)

    async def late():
        await asyncio.sleep(0.1)
        await eng.generate(tokens(40), 5, rng=Random(1))

    play([lambda: errand(eng, 0.3, turns=2, prompt=40), late], 2)
    assert eng.stats["read"] == (40 + 3) + (1 + 4) + (1 + 3)  # the first turn, the other agent, the second turn


def test_a_short_turn_is_not_padded_to_a_long_prompt(monkeypatch):
    """A batch is cut by length: seven rows of 5 tokens beside one of 90 would otherwise be 720 tokens of work."""
    eng, shapes = engine(slots=16), []
    forward = eng.backbone.forward
    monkeypatch.setattr(eng.backbone, "forward", lambda **kw: shapes.append(tuple(kw["input_ids"].shape)) or forward(**kw))
    play([lambda n=n: eng.generate(tokens(5 if n else 90, n), 1, rng=Random(n)) for n in range(8)], 8)
    assert sorted(shapes) == [(1, 90), (7, 5)]


@pytest.mark.parametrize("most", [1, 7, 40])
def test_long_contexts_are_read_in_pieces(most, monkeypatch):
    """One pass over a whole batch of long contexts needs memory for rows times length squared; pieces give the same tokens."""
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", most)
    eng, sizes, forward = engine(), [], MODEL.base_model.forward
    expected = [plain(tokens(50 + n, n), 4, n)[0] for n in range(3)]
    monkeypatch.setattr(eng.backbone, "forward", lambda **kw: sizes.append(kw["input_ids"].shape) or forward(**kw))
    outs = play([lambda n=n: eng.generate(tokens(50 + n, n), 4, rng=Random(n)) for n in range(3)], 3)
    assert [out.ids for out in outs] == expected
    assert max(rows * length for rows, length in sizes) <= max(most, 3)


def test_a_lost_slot_is_computed_again_never_wrong():
    """Six agents take turns in two slots: each finds its slot gone, and still gets what it would get alone."""
    eng = engine(slots=2)
    segments = play([lambda n=n: talk(eng, tokens(10, n), n) for n in range(6)], 6)
    for n, s in enumerate(segments):
        rng, ids = Random(n), tokens(10, n)
        for _ in range(3):
            ids += plain(ids, 6, rng=rng)[0]
            ids += [rng.randrange(V) for _ in range(4)]
        assert s.ids == ids


@pytest.mark.parametrize("seed", range(4))
def test_slots_survive_any_traffic(seed):
    """Random contexts out of a tree of prefixes, in 4 slots: copies from copies, from slots being overwritten, into oneself."""
    rng, eng = Random(seed), engine(slots=4)
    stems = [tokens(18, s) for s in range(3)]
    contexts = []
    for _ in range(40):
        stem = rng.choice(stems + contexts[-6:])
        contexts.append(stem[: rng.randint(1, len(stem))] + [rng.randrange(V) for _ in range(rng.choice([0, 0, 1, 9, 20]))])
        contexts[-1] = contexts[-1][:100]
    starts = [lambda n=n: eng.generate(contexts[n], 1 + n % 3, rng=Random(n), temperature=0.7) for n in range(40)]
    outs = play(starts, rng.choice([3, 9, 40]))
    segments = [SimpleNamespace(ids=c + o.ids, sampled=[False] * len(c) + [True] * len(o.ids), logps=[0.0] * len(c) + o.logps)
                for c, o in zip(contexts, outs)]
    assert gap(segments, 0.7) < 1e-9


def test_copies_of_one_batch_read_before_they_write():
    """A chain or ring of copies: a slot that is overwritten in a batch may be the source of another copy in it."""
    cache = SlotCache(4, 6)
    keys = torch.arange(4.0)[:, None, None, None].expand(4, 2, 6, 3).clone()
    cache.layers = [(keys.clone(), keys.clone() + 10)]
    cache.copy([(0, 1, 4), (1, 2, 4), (2, 0, 4), (0, 3, 2)])
    assert cache.layers[0][0][:, 0, 0, 0].tolist() == [2, 0, 1, 0]
    assert cache.layers[0][1][:, 1, 3, 2].tolist() == [12, 10, 11, 10]


@pytest.mark.parametrize("how", ["in place", "fused", "load_state_dict"])
def test_new_weights_make_the_engine_forget(how):
    """Keys of the old weights are worthless after an update. Fused optimizers do not count the versions of what they change."""
    model = tiny(seed=1)
    eng = engine(model)
    play([lambda: eng.generate(tokens(20), 4, rng=Random(0))], 1)
    if how == "in place":
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    elif how == "fused":
        model(input_ids=torch.tensor([tokens(20)])).logits.sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    else:
        model.load_state_dict(tiny(seed=2).state_dict())
    [out] = play([lambda: eng.generate(tokens(20), 4, rng=Random(0))], 1)
    assert eng.stats["read"] == 2 * (20 + 3)
    assert out.logps == pytest.approx(plain(tokens(20), 4, 0, model=model)[1], abs=1e-9)


def test_a_trained_engine_is_as_good_as_a_new_one():
    """After an update, slots are handed out as by a fresh engine: a resumed run must go on as one that was never stopped."""
    model = tiny(seed=1)

    def slots_of(eng):
        seen, advance = [], eng._advance
        eng._advance = lambda requests: seen.extend(r.slot for r in requests) or advance(requests)
        play([lambda n=n: talk(eng, tokens(20) + tokens(5, n), n) for n in range(6)], 4)
        return seen

    used = engine(model, slots=3)
    play([lambda n=n: used.generate(tokens(9, n), 9 - n, rng=Random(n)) for n in range(3)], 3)  # slot 0 is the last to be used
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    assert slots_of(used) == slots_of(engine(model, slots=3))


# ---- Time ----------------------------------------------------------------------------------------------------------------------

def test_a_finished_row_gives_its_place_to_the_next_at_once():
    """2 slots, messages of 6, 2, 2, 2 tokens: 6 steps. Batches that wait for their longest would take 8."""
    eng = engine(slots=2)
    play([lambda n=n: eng.generate(tokens(5, n), n, rng=Random(0)) for n in (6, 2, 2, 2)], 4)
    assert eng.stats["steps"] == 6


async def errand(eng, seconds, turns=3, log=None, name="", prompt=5):
    """An agent whose tool takes a while."""
    ids, rng = tokens(prompt), Random(0)
    for turn in range(turns):
        ids += (await eng.generate(ids, 4, rng=rng)).ids
        if turn < turns - 1:
            await asyncio.sleep(seconds)
    if log is not None:
        log.append(name)


def test_quick_tools_rejoin_at_the_same_step():
    """Tools of different, short duration: all three turns of all agents are decoded together, 3 times 4 steps."""
    eng = engine(rejoin_window=2.0)
    play([lambda s=s: errand(eng, s) for s in (0, 0.001, 0.02, 0.04)], 4)
    assert eng.stats["steps"] == 12


def test_a_slow_tool_holds_nobody_up():
    """By default nobody is waited for: an agent with quick tools ends all its turns while another's tool runs."""
    eng, log = engine(), []
    quick = [lambda: errand(eng, 0, turns=4, log=log, name="quick")]
    play(quick + [lambda: errand(eng, 3.0, turns=2, log=log, name="slow")], 2)
    assert log == ["quick", "slow"] and not eng.stats["waiting"]


def test_a_slow_tool_costs_the_others_at_most_the_window():
    """With a rejoin window the others pay it once for each slow call, not once for each step of its duration."""
    eng, log = engine(rejoin_window=0.05), []
    quick = [lambda: errand(eng, 0, turns=4, log=log, name="quick")]
    play(quick + [lambda: errand(eng, 3.0, turns=2, log=log, name="slow")], 2)
    assert log == ["quick", "slow"] and 0.04 < eng.stats["waiting"] < 1.0


def test_the_event_loop_turns_while_the_engine_decodes(monkeypatch):
    """An async tool of many short awaits got one turn per decoding step, and was abandoned at its time limit."""
    eng, log = engine(), []
    step = eng._step

    def slow_step():
        time.sleep(1.0)
        log.append("step")
        return step()

    async def tool():
        for _ in range(50):
            await asyncio.sleep(0.001)
        log.append("tool")

    monkeypatch.setattr(eng, "_step", slow_step)
    play([lambda: eng.generate(tokens(5), 1, rng=Random(0)), tool], 2)
    assert log == ["tool", "step"]


def test_agents_that_are_slow_to_begin_are_waited_for_within_the_window():
    """Resets take different times. With the window all first messages are decoded together, so the run repeats bit by bit."""
    eng = engine(rejoin_window=2.0)

    async def late(seconds):
        await asyncio.sleep(seconds)
        await eng.generate(tokens(9), 4, rng=Random(0))

    play([lambda s=s: late(s) for s in (0, 0.001, 0.02, 0.04)], 4, eng)
    assert eng.stats["steps"] == 4


def test_an_agent_that_ends_or_fails_is_not_waited_for():
    """The window is for agents on their way back; one whose episode is over must not cost it."""
    eng = engine(rejoin_window=60.0)
    play([lambda n=n: errand(eng, 0, turns=n) for n in (1, 2, 3, 1)], 2)
    assert eng.stats["waiting"] < 30


# ---- Trouble -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("when", [1, 3])
def test_a_failing_model_is_heard_by_everybody_and_the_engine_lives_on(when, monkeypatch):
    """One exception in a pass: each waiter gets it, nobody hangs, and what was half written is not believed afterwards."""
    eng = engine()
    forward, calls = eng.backbone.forward, []

    def broken(**kwargs):
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("out of memory")
        return forward(**kwargs)

    async def heard(n):
        with pytest.raises(RuntimeError, match="out of memory"):
            await eng.generate(tokens(30), 5, rng=Random(n))
        return "heard"

    monkeypatch.setattr(eng.backbone, "forward", broken)
    assert play([lambda n=n: heard(n) for n in range(12)], 12) == ["heard"] * 12
    outs = play([lambda n=n: eng.generate(tokens(30), 5, rng=Random(n)) for n in range(3)], 3)
    assert [o.ids for o in outs] == [plain(tokens(30), 5, n)[0] for n in range(3)]


def test_logits_that_are_not_finite_are_an_error():
    """A NaN compares false with everything, so sampling from it would quietly give token 0 for ever."""
    model = tiny(seed=3)
    eng = engine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        play([lambda: eng.generate(tokens(5), 5, rng=Random(0))], 1)


def test_after_a_divergence_no_nan_stays_in_the_kv_cache():
    """A masked key counts 0 times its value, and 0 times NaN is NaN: old values behind a shorter row's end must be gone."""
    model = tiny(seed=3)
    eng, healthy = engine(model, slots=2), model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        play([lambda n=n: eng.generate(tokens(40, n), 5, rng=Random(0)) for n in range(2)], 2)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(healthy)
    outs = play([lambda n=n: eng.generate(tokens(8 + 9 * n, n), 5, rng=Random(0)) for n in range(2)], 2)
    assert [out.ids for out in outs] == [plain(tokens(8 + 9 * n, n), 5, 0, model=model)[0] for n in range(2)]


def test_a_head_in_16_bits_is_multiplied_in_32():
    """Logits rounded to bfloat16 before the softmax moved log-probs by 4e-4 on a trained checkpoint."""
    model = tiny(seed=3).bfloat16()
    eng, hidden = engine(model), torch.randn(3, 32).bfloat16()
    play([lambda: eng.generate(tokens(5), 1, rng=Random(0))], 1)
    with torch.inference_mode():
        expected = hidden.double() @ model.lm_head.weight.double().T
        assert (eng._logits(hidden) - expected).abs().max() < 1e-5 < (model.lm_head(hidden) - expected).abs().max()


def test_a_cancelled_request_frees_its_slot_and_hurts_nobody():
    """One slot, a long message, cancelled after a while: the next gets the slot and its own tokens."""
    eng = engine(slots=1)

    async def scene():
        long = asyncio.ensure_future(eng.generate(tokens(5), 100, rng=Random(0)))
        queued = asyncio.ensure_future(eng.generate(tokens(6, 3), 5, rng=Random(1)))
        gone = asyncio.ensure_future(eng.generate(tokens(7, 4), 5, rng=Random(2)))
        while eng.stats["sampled"] < 5:
            await asyncio.sleep(0)
        long.cancel()
        gone.cancel()
        return await asyncio.wait_for(queued, 10)

    out = asyncio.run(scene())
    assert out.ids == plain(tokens(6, 3), 5, 1)[0]
    assert not eng.active and not eng.waiting and eng.stats["sampled"] < 5 + 5 + 3


def test_an_engine_outlives_its_event_loops():
    """A loop that ended in the middle (Ctrl-C, somebody's exception) leaves nothing behind for the next."""
    eng = engine(slots=2)

    async def bad():
        await eng.generate(tokens(4), 2, rng=Random(0))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        play([bad] + [lambda n=n: talk(eng, tokens(10, n), n, turns=9) for n in range(5)], 6)
    abandoned = asyncio.new_event_loop()
    task = abandoned.create_task(eng.generate(tokens(5), 50, rng=Random(0)))
    abandoned.run_until_complete(asyncio.sleep(0.01))  # and nobody ever finishes it
    for _ in range(2):
        segments = play([lambda n=n: talk(eng, tokens(10, n), n) for n in range(5)], 5)
        assert gap(segments, 1.0) < 1e-9
    task.cancel()
    abandoned.run_until_complete(asyncio.gather(task, return_exceptions=True))
    abandoned.close()


def test_what_cannot_fit_is_refused():
    """One clear error for the asker, before anything runs; also for an empty context."""
    eng = engine(context=16)
    for ids, new in ((tokens(10), 7), ([], 3), (tokens(3), 0)):
        with pytest.raises(ValueError, match="do not fit a context of 16"):
            asyncio.run(eng.generate(ids, new, rng=Random(0)))
    assert len(asyncio.run(eng.generate(tokens(10), 6, rng=Random(0))).ids) == 6


def test_play_keeps_the_order_bounds_the_crowd_and_raises_the_first_failure():
    """Results in the order of the starts, however long each takes; never more than `at_once` at work."""
    here, most = [0], [0]

    async def job(n):
        here[0] += 1
        most[0] = max(most[0], here[0])
        await asyncio.sleep(0.01 * (5 - n % 5))
        here[0] -= 1
        if n == 99:
            raise KeyError(n)
        return n

    assert play([lambda n=n: job(n) for n in range(12)], 3) == list(range(12))
    assert most == [3] and play([], 3) == []
    with pytest.raises(KeyError):
        play([lambda n=n: job(n) for n in (1, 99, 2)], 3)


# ---- Models --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "options"), [(Qwen3Config, {}), (GemmaConfig, {}), (MistralConfig, {"sliding_window": None})])
def test_common_models_are_right(kind, options):
    """Not only Llama: the log-probs of other families through slots are those of a plain pass."""
    model = tiny(kind=kind, **options)
    eng = engine(model, slots=3)
    segments = play([lambda n=n: talk(eng, tokens(12), n) for n in range(5)], 5)
    assert gap(segments, 1.0, model) < 1e-9


@pytest.mark.parametrize(("kind", "options", "why"), [
    (MistralConfig, {"sliding_window": 16}, "sliding_attention"), (PhiConfig, {}, "bias"),
    (MambaConfig, {"state_size": 4}, "linear_attention"), (GraniteConfig, {"logits_scaling": 4.0}, "not its head times"),
    (LlamaConfig, {"attn_implementation": "eager"}, "not its head times")])
def test_other_models_are_refused(kind, options, why):
    """A window, a state, a bias, scaled logits, a mask of booleans that is added: wrong numbers, so they are refused."""
    sizes = {**SIZES, **options}
    attention = {"attn_implementation": sizes.pop("attn_implementation", "sdpa" if kind is not MambaConfig else None)}
    model = AutoModelForCausalLM.from_config(kind(**sizes), **attention)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be used here: .*{why}"):
        check_model(model)


def test_capped_logits_are_refused():
    """Small logits are hardly changed by the cap, so numbers alone would not show it."""
    model = tiny()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="capped"):
        check_model(model)


def test_small_model_is_reproducible_and_leaves_the_random_state_alone():
    """Weights depend on the seed only, and making them does not move the caller's random numbers."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = small_model(100), small_model(100), small_model(100, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_the_heads_of_a_small_model_begin_by_copying():
    """What the heads read comes back as it was, a fifth of it: values, then output, is 0.2 times the identity in every layer."""
    for layer in small_model(100).model.layers:
        through = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        torch.testing.assert_close(through, 0.2 * torch.eye(128), atol=1e-5, rtol=0)


def test_the_demo_keeps_its_promise(capsys):
    """`python rollout.py` says that an episode is the same alone and in company."""
    rollout._demo(small_model(1024), agents=24, alone=17)
    assert "the same tokens" in capsys.readouterr().out
