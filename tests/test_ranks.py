"""Several processes, on the CPU: the gradient, the run and the files of one; and what happens when
one of them dies.

The quick tests start two processes once, the way torchrun starts them: `python tests/test_ranks.py`
is what they run. Everything compared here is computed in float64. Another order of summation shows
in the last of 16 digits there, and a wrong factor in the first.
"""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_grpo import batch, tiny

import train
from grpo import GRPOConfig, gather, make_packs, make_rows, ranks, share_weights, update

ROOT = Path(__file__).parent.parent
WAITING = 1  # seconds a process waits for another unless told otherwise; torch: 30 minutes
TOOL = 3  # seconds one tool call takes

ENVIRONMENT = f"""
import os, time

class Lengths:
    state = ""

    def reset(self, seed: int) -> str:
        self.seed, self.done, self.reward = seed, False, 0.0
        return f"Task {{seed}}."

    def final_answer(self, answer: str) -> str:
        '''Answer. Any length is worth something, so every group has signal.

        Args:
            answer: Any text
        '''
        # In the loop, in one process.
        first = 10**6 <= self.seed < 10**9 and "SLEPT" not in os.environ
        if first and os.environ.get("RANK") == "1":
            os.environ["SLEPT"] = "once"
            time.sleep({TOOL})
        self.done, self.reward = True, len(answer) % 5 / 5
        return "thanks"

    def get_reward(self) -> float:
        return self.reward

def demonstrate_lengths(env, random):
    yield "x" * random.randint(1, 5)
"""
RUN = dict(env=["lengths.py:Lengths"], model="model", dtype="float64", device="cpu", lr=1e-3,
           warmup_lr=3e-2, steps=3, warmup_steps=16,
           save_every=2, tasks_per_step=3, group_size=4, eval_tasks=3, max_new_tokens=8,
           max_turns=2, context=256, pack_tokens=300,
           kl_coef=0.05, temperature=1.0, epochs=3, negative_weight=0.1)
WORDS = []
for key, value in RUN.items():
    values = value if isinstance(value, list) else [value]
    WORDS += [f"--{key}", *map(str, values)]


def start(words, cwd, environment):
    common = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
              "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**common, **environment})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(words, cwd, n=2):
    """Start Python n times, as torchrun does."""
    meet = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(words, cwd, {**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(n)]


# ---- what is computed by one process, and by two ----

# For seven groups: seven packs, or three, so two processes never have the same number.
GRADIENTS = {"seven packs": {"pack_tokens": 21},
             "every episode the same": {"pack_tokens": 100, "normaliser": "episode"},
             "one ratio per episode": {"pack_tokens": 21, "sequence_ratio": True},
             "cispo and entropy": {"pack_tokens": 21, "kind": "cispo", "entropy_coef": 0.1}}
GRADIENTS = {case: {"epochs": 3, **options} for case, options in GRADIENTS.items()}
ALONE = "one pack, so one process has none"


def updated(config, rows, dtype=torch.float64):
    """(the gradient of each of three epochs, the report, the weights) of one update.

    Each process has all rows. The second begins with other weights, and gets those of the first.
    """
    model = tiny(ranks()[0], dtype)
    share_weights(model)
    optimizer, gradients = torch.optim.SGD(model.parameters(), lr=0.3), []

    def note(*_):
        gradients.append([p.grad.clone() for p in model.parameters()])

    optimizer.register_step_pre_hook(note)
    report = update(model, optimizer, rows, config)
    return gradients, report, {name: p.detach().clone() for name, p in model.state_dict().items()}


def updates(dtype=torch.float64):
    """{case: what `updated` gives}"""
    many = make_rows(batch(5, groups=7, size=2), GRPOConfig())[0]
    if dtype == torch.float32:
        return {"seven packs": updated(GRPOConfig(**GRADIENTS["seven packs"]), many, dtype)}
    out = {name: updated(GRPOConfig(**options), many) for name, options in GRADIENTS.items()}
    out[ALONE] = updated(GRPOConfig(epochs=3, kind="reinforce"), many[:1])
    first = replace(many[0], advantages=[float("nan")] * len(many[0].trained))
    broken = [first, *many[1:]]
    return out | {"not finite": updated(GRPOConfig(epochs=3, pack_tokens=1), broken)}


def two_processes():
    """What each of the two runs: all updates, and a whole run."""
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=WAITING)
    train.join(train.Config(device="cpu"))
    results = {dtype: updates(dtype) for dtype in (torch.float64, torch.float32)}
    for of_dtype in results.values():
        for _, report, _ in of_dtype.values():
            reports = {json.dumps(r) for r in gather(report)}
            assert len(reports) == 1, "they must not even report different things"
    if ranks()[0] == 0:
        torch.save(results, "updates.pt")
    train.train(train.Config(**RUN, name="two"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an environment, a model, and the same run by one process and by two."""
    folder, before = tmp_path_factory.mktemp("ranks"), Path.cwd()
    (folder / "lengths.py").write_text(ENVIRONMENT)
    os.chdir(folder)
    handler = signal.getsignal(signal.SIGINT)
    try:
        config = train.Config(**RUN, name="one")
        tokenizer = train.learn_tokenizer(train.Setup(config, train.make_envs(config)))
        train.save_model(folder / "model", tiny(0, vocab=len(tokenizer)), tokenizer)
        two = processes([__file__], folder)
        train.train(config)
        for process in two:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        os.chdir(before)
        signal.signal(signal.SIGINT, handler)
    return folder


@pytest.fixture(scope="module")
def computed(folder):
    """{(processes, dtype): updates}, by two processes and by this one."""
    two = torch.load(folder / "updates.pt", weights_only=True)
    dtypes = torch.float64, torch.float32
    one = {(1, dtype): updates(dtype) for dtype in dtypes}
    return one | {(2, dtype): two[dtype] for dtype in dtypes}


def distance(a, b):
    """(largest difference, the same relative to the largest number)"""
    a, b = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in (a, b))
    return (a - b).abs().max().item(), ((a - b).abs().max() / b.abs().max()).item()


# ---- the update ----


@pytest.mark.parametrize("case", [*GRADIENTS, ALONE])
def test_contract_06_two_processes_make_the_gradient_of_one(computed, case):
    """Gradients, report and weights of three epochs, after clipping.

    They may differ by the rounding of sums.
    """
    gradients, report, weights = computed[2, torch.float64][case]
    expected, expected_report, expected_weights = computed[1, torch.float64][case]
    assert len(gradients) == len(expected) == 3
    for g, e in zip(gradients, expected):
        assert distance(g, e)[1] < 1e-12 and sum(x.abs().max() for x in e) > 0
    assert report == pytest.approx(expected_report, rel=1e-6)  # it is made in float32
    assert weights.keys() == expected_weights.keys()
    assert distance(weights.values(), expected_weights.values())[1] < 1e-12


def test_contract_06_in_float32_they_differ_by_rounding(computed):
    """Sums of twenty rows, in another order: some units in the last of seven digits.

    `-s` shows the figures.
    """
    for dtype, most in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        (g, *_), (e, *_) = (computed[key]["seven packs"][0] for key in ((2, dtype), (1, dtype)))
        largest, relative = distance(g, e)
        print(f"\n{dtype}: gradients differ by {largest:.1e}, {relative:.1e} of the largest entry")
        assert relative < most


def test_the_cases_are_what_they_are_called():
    rows = make_rows(batch(5, groups=7, size=2), GRPOConfig())[0]
    packs = [len(make_packs(rows, GRPOConfig(**options))) for options in GRADIENTS.values()]
    assert packs == [7, 3, 7, 7]
    assert len(make_packs(rows[:1], GRPOConfig())) == 1


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_in_all(computed):
    """Else their weights part for ever."""
    gradients, report, weights = computed[2, torch.float64]["not finite"]
    assert gradients == [] and report["skipped"] == 3 and report["trained_tokens"] == 0
    expected = computed[1, torch.float64]["seven packs"][1]["trained_tokens"]
    assert report["skipped_tokens"] == expected > 0  # those of both processes
    assert distance(weights.values(), tiny().state_dict().values()) == (0.0, 0.0)


def test_one_process_needs_no_other():
    """No process group is made, and what is gathered is what was brought."""
    assert not dist.is_initialized() and ranks() == (0, 1) and gather({"a": 1}) == [{"a": 1}]


# ---- the run ----


def files(run):
    return sorted(str(p.relative_to(run)) for p in run.rglob("*"))


def shapes(state):
    """A checkpoint's content, tensors as their type and shape."""
    if isinstance(state, dict):
        return {key: shapes(value) for key, value in state.items() if key != "warmup_seconds"}
    if isinstance(state, list):
        return [shapes(x) for x in state]
    return (state.dtype, state.shape) if isinstance(state, torch.Tensor) else type(state)


def weights_of(run, what="model"):
    return load_file(run / what / "model.safetensors")


def lines(path):
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


def same_weights(a, b, what="model"):
    """Of AdamW in float64 after some steps.

    Rounding of 1e-16, divided by Adam's epsilon of 1e-8, times learning rate and steps.
    """
    a, b = weights_of(a, what), weights_of(b, what)
    return a.keys() == b.keys() and max(distance([a[key]], [b[key]])[0] for key in a) < 1e-9


def test_contract_06_a_run_of_two_processes_is_that_of_one(folder):
    """Warm start and three steps of three groups.

    Episodes token by token and in order, metrics, scores, weights, file by file.
    """
    one, two = folder / "runs" / "one", folder / "runs" / "two"
    assert files(two) == files(one)
    episodes, expected = lines(two / "episodes.jsonl.gz"), lines(one / "episodes.jsonl.gz")
    assert len(episodes) == len(expected) == 3 * 3 * 4
    for e, x in zip(episodes, expected):
        for a, b in zip(e.pop("segments"), x.pop("segments"), strict=True):
            assert a.pop("logps") == pytest.approx(b.pop("logps"), abs=1e-5) and a == b
        assert e == x
    metrics, expected = lines(two / "metrics.jsonl"), lines(one / "metrics.jsonl")
    for m, x in zip(metrics, expected, strict=True):
        assert m["no_signal"] < 1 and m["grad_norm"] > 0 and m.keys() == x.keys()
        for key in m.keys() - {"seconds", "tokens_per_second"}:
            assert m[key] == pytest.approx(x[key], rel=1e-4, abs=1e-6)
    assert (two / "scores.json").read_text() == (one / "scores.json").read_text()
    config = "model/config.json"
    assert (two / config).read_text() == (one / config).read_text()
    assert same_weights(two, one)
    for what in ("checkpoints/step-000000", "checkpoints/step-000002"):
        assert same_weights(two, one, what)


def test_checkpoints_are_the_same_files_for_any_number_of_processes(folder):
    """Names, types and shapes; and Adam's averages."""
    for step in ("step-000000", "step-000002", "step-000003"):
        path = f"checkpoints/{step}/trainer.pt"
        one, two = (torch.load(folder / "runs" / run / path, weights_only=True)
                    for run in ("one", "two"))
        assert shapes(one) == shapes(two)
        progress = [saved["progress"] for saved in (one, two)]
        assert all(p.pop("warmup_seconds") > 0 for p in progress) and progress[0] == progress[1]
        assert progress[0].keys() == {"before", "next_seed", "step"}
        states = one["optimizer"]["state"].values(), two["optimizer"]["state"].values()
        for a, b in zip(*states, strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.allclose(a[key], b[key], rtol=1e-6, atol=1e-12)


def test_a_long_tool_call_of_one_process_does_not_trip_the_others(folder):
    """They wait for it: twice as long as they would if they had not been told to.

    The first process may begin the step a little after the other, so it may wait less than TOOL.
    """
    waited = lines(folder / "runs" / "two" / "metrics.jsonl")[0]["seconds"]
    assert waited > 2 * WAITING and TOOL > 2 * WAITING


# ---- the processes of torchrun ----


def torchrun(*words, cwd):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(free_port()), ROOT / "train.py", *words]
    return start(command, cwd, {})


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 120
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= step):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_and_it_can_be_resumed(folder, rank):
    """kill -9 in mid-run: nobody hangs, and one line says what to do.

    The resumed run ends with the bits of the one left alone.
    """
    words = [*WORDS, "--steps", "12", "--save-every", "3"]
    whole, killed = folder / "runs" / "whole", folder / "runs" / f"killed-{rank}"
    if not whole.exists():
        process = torchrun(*words, "--name", whole.name, cwd=folder)
        assert process.communicate(timeout=300)[1] is not None and process.returncode == 0
    process = torchrun(*words, "--name", killed.name, cwd=folder)
    wait_for_step(killed, 4, process)
    os.kill(children(process)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume RUN" in errors
    assert f"train.py: process {1 - rank} stops with the run" in errors
    assert "SIGKILL" in errors, "torchrun says which"
    process = torchrun("--resume", f"runs/{killed.name}", cwd=folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [m["step"] for m in lines(killed / "metrics.jsonl")] == list(range(1, 13))
    a, b = weights_of(whole), weights_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_ctrl_c_stops_all_after_the_same_step(folder):
    """torchrun passes it on, to each at another moment."""
    run = folder / "runs" / "stopped"
    process = torchrun(*WORDS, "--steps", "1000", "--name", run.name, cwd=folder)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    last = lines(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}. To go on: " in errors and "train.py: process" not in errors
    assert (run / "checkpoints" / f"step-{last:06d}" / "trainer.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_run_is_resumed_by_another_number_of_processes(folder, name):
    """From step 2 of three, by one process and by two.

    The weights are those of the run that was not stopped.
    """
    for number in (1, 2):
        again = folder / "runs" / f"{name}-again-by-{number}"
        shutil.copytree(folder / "runs" / name, again)
        for later in ("checkpoints/step-000003", "model"):
            shutil.rmtree(again / later)
        (again / "summary.json").unlink()  # it would say that the run is finished
        words = [ROOT / "train.py", "--resume", f"runs/{again.name}"]
        for process in processes(words, folder, number):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        assert files(again) == files(folder / "runs" / name)
        assert same_weights(again, folder / "runs" / "one")
        assert [m["step"] for m in lines(again / "metrics.jsonl")] == [1, 2, 3]


if __name__ == "__main__":
    two_processes()
