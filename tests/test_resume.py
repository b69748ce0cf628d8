"""train.py --resume: a run that is killed, again and again, at any instant, ends as the one that never was.

Runs are children of a process that has torch loaded already (a fork server), on a disk that is slow on purpose, so that many kills
fall into a save. The environment rewards letters, so that even an untrained model finds a gradient to follow.
"""

import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train

VOWELS = '''
class Vowels:
    """The more of the answer's letters are vowels, the better."""

    def reset(self, seed: int) -> str:
        self._answer = None
        return f"Vowels, please. Number {seed}."

    def final_answer(self, answer: str) -> str:
        """Answer.

        Args:
            answer: Letters
        """
        self._answer = answer

    def get_reward(self) -> float:
        return sum(c in "aeiou" for c in self._answer or "") / max(len(self._answer or ""), 1)

    @property
    def done(self) -> bool:
        return self._answer is not None

    @property
    def state(self) -> str:
        return ""


def demonstrate_vowels(env, rng):
    yield "".join(rng.choices("abcdefgh", k=4))
'''
OPTIONS = ["--env", "vowels.py:Vowels", "--warmup-steps", "10", "--warmup-lr", "0.02", "--steps", "6", "--save-every", "1",
           "--eval-tasks", "4", "--group-size", "4", "--tasks-per-step", "2", "--max-turns", "2", "--max-new-tokens", "8",
           "--context", "240",
           "--rejoin-window", "60"]  # the contract is for tools that keep within it, and this machine may be busy
TIMES = ("seconds", "tokens_per_second")


# ---- runs that can be killed ----


def child(folder, words, slow=0.0, die_at=(), largest_file=0):
    """A run in a process of its own, which Python tells of each file that is opened or renamed.

    slow: seconds that this takes while something is half-written. die_at: the event, and the end of
    the path, at which the process kills itself.
    """
    os.chdir(folder)
    out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    def watch(event, arguments):
        if event not in ("open", "os.rename"):
            return
        path = str(arguments[0])
        if "partial-" in path:
            time.sleep(slow)
        if die_at and event == die_at[0] and path.endswith(die_at[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = ["train.py", *words]
    train.command_line()


@pytest.fixture(scope="module")
def start():
    """start(folder, words, ...) -> the process of `child`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server finds this project as pytest does
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["train", __name__])

        def begin(folder, words, **options):
            process = server.Process(target=child, args=(str(folder), words), kwargs=options)
            process.start()
            return process

        yield begin


def finish(process, code=0):
    process.join(120)
    assert process.exitcode == code


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "vowels.py").write_text(VOWELS)
    finish(start(folder, ["--name", "whole", *OPTIONS]))
    return folder / "runs" / "whole"


@pytest.fixture
def copy(whole):
    """copy(name) -> the folder of an equal run."""
    made = []

    def another(name):
        made.append(shutil.copytree(whole, whole.with_name(name)))
        return made[-1]

    yield another
    for run in made:
        shutil.rmtree(run)


def lines(path):
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


def metrics(run):
    """What is the same in every run: all but the times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(run / "metrics.jsonl")]


def assert_equal(run, whole):
    """Bit for bit: the weights, the optimizer's averages, every token of every episode, the scores."""
    a, b = (load_file(r / "model" / "model.safetensors") for r in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = newest(whole)
    trainer = f"checkpoints/step-{steps:06d}/trainer.pt"
    a, b = (torch.load(r / trainer, weights_only=True) for r in (run, whole))
    averages = [s["optimizer"]["state"] for s in (a, b)]
    assert all(torch.equal(averages[0][i][k], averages[1][i][k]) for i in averages[1] for k in averages[1][i])
    seen = [m["step"] for m in metrics(run)]
    assert seen == [*range(1, steps + 1)], "neither a gap nor a double line"
    assert metrics(run) == metrics(whole)
    assert lines(run / "episodes.jsonl.gz") == lines(whole / "episodes.jsonl.gz")
    assert (run / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


def newest(run):
    return max((int(p.name.partition("-")[2]) for p in (run / "checkpoints").glob("step-*")), default=-1)


def test_the_run_that_all_others_are_compared_with_learns_something(whole):
    """Without a gradient the weights of any two runs are equal: a test of exact resume passed for months, and compared nothing."""
    assert sum(m["grad_norm"] > 0 for m in metrics(whole)) >= 4
    first, last = (load_file(whole / "checkpoints" / f"step-{n:06d}" / "model.safetensors") for n in (0, 6))
    assert not any(torch.equal(first[k], last[k]) for k in first if k.endswith("proj.weight"))


def test_the_plain_run_is_that_of_the_command(whole, monkeypatch):
    """`plain_train` has neither files nor checkpoints. It ends with the same weights and scores."""
    monkeypatch.chdir(whole.parent.parent)
    threads, (_, config) = torch.get_num_threads(), train.read_run(str(whole))
    setup = train.make_setup(config)
    before, after = train.plain_train(setup)
    torch.set_num_threads(threads)
    assert json.loads((whole / "scores.json").read_text()) == {"before": before, "after": after}
    weights, last = setup.model.state_dict(), load_file(whole / "model" / "model.safetensors")
    assert all(torch.equal(weights[k], last[k]) for k in last)


# ---- killed ----


def left(run):
    """What is there: (newest checkpoint, lines of metrics, lines of episodes, other names)."""
    growing = (run / "metrics.jsonl", run / "episodes.jsonl.gz")
    counts = [len(lines(path)) if path.exists() else 0 for path in growing]
    names = {path.name for path in run.glob("*")}
    return newest(run), *counts, names & {"run.json", "model", "scores.json", "summary.json"}


DEATHS = {  # where it dies: what is left then. A step has 8 episodes
    ("open", "/run.json"): (-1, 0, 0, set()),
    ("open", "partial-step-000000/config.json"): (-1, 0, 0, {"run.json"}),
    ("open", "partial-step-000002/tokenizer_config.json"): (1, 2, 16, {"run.json"}),
    ("os.rename", "partial-step-000003"): (2, 3, 24, {"run.json"}),
    ("open", "metrics.jsonl"): (2, 2, 16, {"run.json"}),
    ("open", "episodes.jsonl.gz"): (2, 3, 16, {"run.json"}),
    ("os.rename", "partial-model"): (6, 6, 48, {"run.json"}),
    ("open", "partial-summary.json"): (6, 6, 48, {"run.json", "model", "scores.json"}),
}


def test_contract_11_killed_wherever_it_writes(start, whole):
    """Eight deaths of one run: before its run.json, in a save, in a record, and at its end."""
    folder, run = whole.parent.parent, whole.with_name("torn")
    for place, expected in DEATHS.items():
        words = ["--resume", "runs/torn"] if run.exists() else ["--name", "torn", *OPTIONS]
        finish(start(folder, words, die_at=place), -signal.SIGKILL)
        assert left(run) == expected, place
    finish(start(folder, ["--resume", "runs/torn"]))
    assert_equal(run, whole)
    assert not list(run.rglob("partial-*")), "what was half-written is gone"


def test_contract_11_in_bfloat16_checkpoints_hold_the_masters(start, whole):
    """Weights saved as they are computed with lose all that was learned in steps too small for them."""
    folder = whole.parent.parent
    words = [*OPTIONS, "--dtype", "bfloat16", "--recompute", "true", "--steps", "3"]
    words += ["--warmup-steps", "3"]
    finish(start(folder, ["--name", "sixteen", *words]))
    death = ("os.rename", "partial-step-000002")
    torn = start(folder, ["--name", "sixteen-torn", *words], die_at=death)
    finish(torn, -signal.SIGKILL)
    finish(start(folder, ["--resume", "runs/sixteen-torn"]))
    assert_equal(whole.with_name("sixteen-torn"), whole.with_name("sixteen"))
    weights = load_file(whole.with_name("sixteen") / "model" / "model.safetensors")
    assert all(x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float()) for x in weights.values())


@pytest.mark.slow
def test_contract_11_killed_at_random_moments(start, whole, capsys):
    """At least 20 kills on a slow disk, some of them in a save. Prints how many steps were lost, and made again."""
    rng, folder = random.Random(0), whole.parent.parent
    kills = in_save = lost = runs = 0
    longest = sum(m["seconds"] for m in lines(whole / "metrics.jsonl")) * 2
    while kills < 20:
        run = whole.with_name(f"killed{runs}")
        while not (run / "summary.json").exists():
            process = start(folder, ["--resume", f"runs/{run.name}"] if run.exists() else ["--name", run.name, *OPTIONS], slow=0.02)
            process.join(rng.uniform(0, longest))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, (folder / "out.txt").read_text()
            kills += 1
            in_save += any(run.rglob("partial-*"))
            done = run / "metrics.jsonl"
            lost += max(0, done.read_text().count("\n") - max(newest(run), 0)) if done.exists() else 0
        assert_equal(run, whole)
        runs += 1
    with capsys.disabled():
        print(f"\n{kills} kills of {runs} runs survived, {in_save} of them in a save; {lost} steps lost and made again")
    assert in_save >= 3, "else no save was tested"


def test_a_run_without_a_model_cannot_be_scored(whole, copy):
    """Killed in its warm start. A model of random weights was scored in its place."""
    run = copy("early")
    for path in ("checkpoints", "model"):
        shutil.rmtree(run / path)
    with pytest.raises(train.UserError, match="runs/early has lost its checkpoints"):
        train.score(train.Config(eval_only=str(run)))
    (run / "metrics.jsonl").unlink()  # as in the warm start
    with pytest.raises(train.UserError, match="runs/early has no model yet: it stopped in its warm start, and --resume"):
        train.score(train.Config(eval_only=str(run)))


# ---- two at once ----


def test_a_run_that_goes_on_is_locked(start, whole, here):
    """A second --resume wrote into the same files: double lines, and a checkpoint of two histories."""
    folder, run = whole.parent.parent, whole.with_name("locked")
    process = start(folder, ["--name", "locked", *OPTIONS, "--steps", "1000"])
    wait_for((run / "checkpoints").exists)
    code, _, errors = here(folder, "--resume", "runs/locked")
    assert process.is_alive()
    process.kill()
    process.join()
    assert code == 2 and errors == "train.py: runs/locked is in use: another process is training it\n"
    with train.locked(run):  # what a killed process held is free
        pass


def test_two_runs_that_start_together_both_end(start, whole):
    """Both took the same number, and the second removed the first's folder."""
    folder = whole.parent.parent
    together = [start(folder, [*OPTIONS, "--steps", "1", "--seed", seed]) for seed in ("1", "2")]
    for process in together:
        finish(process)
    seeds = [json.loads((folder / "runs" / name / "summary.json").read_text())["seed"] for name in "01"]
    assert sorted(seeds) == [1, 2]


# ---- what is left ----


def test_the_first_and_the_newest_checkpoints_stay(whole):
    """A run of a week filled the disk. The first one is "before", and what the KL term is to."""
    kept = [p.name for p in sorted((whole / "checkpoints").iterdir())]
    assert kept == ["step-000000", "step-000004", "step-000005", "step-000006"]


def test_lines_after_the_checkpoint_and_a_half_written_one_are_cut_off(tmp_path):
    for name in ("metrics.jsonl", "episodes.jsonl.gz"):
        path, three = tmp_path / name, [{"step": 1}, {"step": 2}, {"step": 2}]
        train.append(path, three[:1])
        train.append(path, three[1:])
        written = {name: path.stat().st_size}
        train.append(path, [{"step": 3}])
        os.truncate(path, path.stat().st_size - 4)
        train.cut_off(tmp_path, written)
        assert lines(path) == three
        train.append(path, [{"step": 3}])
        assert [line["step"] for line in lines(path)] == [1, 2, 2, 3]
        train.cut_off(tmp_path, {})
        assert lines(path) == [], "at the first checkpoint nothing was written"
        train.cut_off(tmp_path, written)
        assert lines(path) == [], "a file that somebody emptied is not filled with zeros"


def test_a_run_of_an_older_version_is_refused_in_one_line(start, copy):
    """Its run.json has an option that is gone and lacks one: it might go on as another run."""
    run = copy("old")
    stored = json.loads((run / "run.json").read_text())
    del stored["config"]["seed"]
    (run / "run.json").write_text(json.dumps({"config": {**stored["config"], "shard": False}}))
    finish(start(run.parent.parent, ["--resume", "runs/old"]), code=2)
    [line] = (run.parent.parent / "out.txt").read_text().splitlines()
    assert line == ("train.py: runs/old/run.json does not hold the options of a run of "
                    "this version (missing or unknown: seed, shard)")


def test_a_run_that_has_lost_its_checkpoints_is_refused(start, copy):
    """It began again, and cut its own metrics and episodes to nothing."""
    run = copy("lost")
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    finish(start(run.parent.parent, ["--resume", "runs/lost"]), code=2)
    [line] = (run.parent.parent / "out.txt").read_text().splitlines()
    assert line == "train.py: runs/lost has lost its checkpoints: there is nothing to go on from"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_left_as_it_is(start, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    finish(start(whole.parent.parent, ["--resume", "runs/whole"]))
    assert (whole.parent.parent / "out.txt").read_text() == "runs/whole is finished: there is nothing to go on with\n"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize("text", ["", '{"config": {"env"', "[]", "{}", '{"config": {"no such option": 1}}'])
def test_a_run_json_that_is_not_one_gets_one_clear_line(start, whole, copy, text):
    (copy("odd") / "run.json").write_text(text)
    with pytest.raises(train.UserError, match="run.json does not hold the options of a run"):
        train.read_run(str(whole.with_name("odd")))


# ---- a full disk, Ctrl-C ----


@pytest.mark.parametrize("how", ["file too large", "no space left"])
def test_a_full_disk_ends_the_run_with_one_line_and_costs_no_checkpoint(start, whole, copy, how):
    """The last whole checkpoint was overwritten, or half of a new one taken for it. And it goes on once there is room."""
    run = copy("full")
    for n in (5, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{n:06d}")
    for name in ("model/model.safetensors", "summary.json"):
        (run / name).unlink()
    folder, words, disk = run.parent.parent, ["--resume", "runs/full"], run / "checkpoints"
    if how == "no space left":
        content = shutil.copytree(disk, folder / "content")
        size = sum(path.stat().st_size for path in content.rglob("*")) + 10**6  # less than a model needs
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
            shutil.rmtree(content)
            pytest.skip("no right to mount a file system: run the suite as root")
        shutil.copytree(content, disk, dirs_exist_ok=True)
        shutil.rmtree(content)
    try:
        finish(start(folder, words, largest_file=10**6 if how == "file too large" else 0), 2)
        said = [line for line in (folder / "out.txt").read_text().splitlines() if line.startswith("train.py: ")]
        assert len(said) == 1 and "cannot write runs/full/checkpoints/step-000005" in said[0] and "MB are free" in said[0]
        assert how in said[0].lower() and "Traceback" not in (folder / "out.txt").read_text()
        assert sorted(p.name for p in disk.iterdir()) == ["step-000000", "step-000004"]
        assert train.newest_checkpoint(run) == disk / "step-000004"
        if how == "no space left":
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        finish(start(folder, words))
        assert_equal(run, whole)
    finally:
        if how == "no space left":
            subprocess.run(["umount", disk], check=True)


def test_a_second_ctrl_c_stops_at_once(start, whole):
    """In the middle of a step whose tools take their time: one line and no traceback, from none of the many tasks."""
    folder = whole.parent.parent  # tasks of the warm start and of the evaluation have other seeds
    code = VOWELS.replace("self._answer = None", "self._answer, self._wait = None, 9 * (10**6 <= seed < 10**9)")
    code = code.replace("self._answer = answer", "time.sleep(self._wait)\n        self._answer = answer")
    (folder / "slow.py").write_text(f"import time\n{code}")
    process = start(folder, ["--name", "stopped", *OPTIONS, "--env", "slow.py:Vowels"])
    out, run = folder / "out.txt", folder / "runs" / "stopped"
    wait_for(lambda: (run / "checkpoints").exists() and "before" in out.read_text())
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C: finishing this step (again: stop now)" in out.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130 and out.read_text().endswith("train.py: stopped\n") and "Traceback" not in out.read_text()
    assert train.newest_checkpoint(run).name == "step-000000"


def wait_for(event, seconds=60):
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline
        time.sleep(0.02)
