"""memory.py: the rule of the window, and notes that survive."""

import doctest
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

import memory
from memory import Notes, keep_turns

HERE = pathlib.Path(memory.__file__).parent


def python(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_oldest_turns_leave_and_no_more_than_needed():
    """Against a search over all answers: what stays fits, is a suffix, and one more turn would not fit."""
    rng = random.Random(0)
    for _ in range(2000):
        turns = [rng.randrange(30) for _ in range(rng.randrange(8))]
        fixed, budget = rng.randrange(20), rng.randrange(20, 120)
        fitting = [leave for leave in range(len(turns) + 1) if fixed + sum(turns[leave:]) <= budget]
        assert keep_turns(fixed, turns, budget) == min(fitting)


def test_an_old_turn_never_stays_without_the_newer_ones():
    """Packing what fits ("the big turn leaves, the small old one stays") left answers to questions that had gone."""
    assert keep_turns(0, [1, 100, 1], 50) == 2
    assert keep_turns(0, [1, 1, 100], 50) == 3
    assert keep_turns(0, [], 0) == 0


def test_a_window_too_small_for_the_task_is_an_error_with_numbers():
    """Silently cutting the task itself gave episodes that could not be solved, and rewards that meant nothing."""
    with pytest.raises(ValueError, match="11 .*10"):
        keep_turns(11, [1], 10)


def test_notes_come_back_best_first():
    notes = Notes()
    for text in ["The code of the door is 4711.", "Anna has the key.", "Tea is at five.", "Anna, Anna, Anna!"]:
        notes.add(text)
    assert len(notes) == 4 and notes.all()[0] == "The code of the door is 4711."
    assert notes.search("what is the CODE of the door?", top=1) == ["The code of the door is 4711."]
    assert notes.search("anna") == ["Anna, Anna, Anna!", "Anna has the key."]
    assert notes.search("nobody") == [] and notes.search("anna", top=0) == [] and notes.search("anna", top=-1) == []


QUERIES = ["", '"', "a AND", "NOT", "NEAR(", "a*", "text:a", "-", "(", "\x00", "\U0001f642", "\ud800", "_", "'; DROP TABLE notes"]
QUERIES += ["a " * 100_000, "b" * 10**6]


@pytest.mark.parametrize("text", QUERIES, ids=range(len(QUERIES)))
def test_any_text_is_a_query_and_a_note(text):
    """A policy writes anything at all, half characters among it: none of it may raise, or be an operator of the search."""
    notes = Notes()
    notes.add("a note")
    notes.add(text)
    assert len(notes) == 2 and notes.all()[1] == text.encode("utf-8", "replace").decode()
    assert set(notes.search(text)) <= set(notes.all())


def test_notes_in_memory_are_not_shared():
    """Two episodes that shared one store copied each other's answers."""
    one, other = Notes(), Notes()
    one.add("mine")
    assert other.all() == []


def test_threads_share_one_object():
    notes = Notes()
    threads = [threading.Thread(target=lambda n=n: [notes.add(f"{n} {k}") for k in range(50)]) for n in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(notes.all()) == sorted(f"{n} {k}" for n in range(4) for k in range(50))


def test_a_file_outlives_the_object(tmp_path):
    path = tmp_path / "notes.db"
    Notes(path).add("kept")
    again = Notes(str(path))
    assert again.all() == ["kept"] and again.search("kept") == ["kept"]
    assert again._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert again._db.execute("PRAGMA synchronous").fetchone() == (2,)
    with pytest.raises(sqlite3.OperationalError):
        Notes(tmp_path / "no" / "such" / "folder.db")


def test_opening_waits_for_another_that_writes(tmp_path):
    """SQLite's own time-out does not hold for the switch to WAL: "database is locked" at once, and only under load."""
    other = sqlite3.connect(tmp_path / "notes.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE other (x)")
    timer = threading.Timer(0.2, other.close)
    timer.start()
    Notes(tmp_path / "notes.db").add("kept")
    timer.join()
    assert Notes(tmp_path / "notes.db").all() == ["kept"]


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    """Opening at the same moment is the hard part: "database is locked" while both switch to WAL or create the table."""
    script = """
import sys, memory
print("ready", flush=True)
sys.stdin.readline()
notes = memory.Notes(sys.argv[1])
for k in range(50): notes.add(f"{sys.argv[2]} {k}")
"""
    for trial in range(3):  # a new file each time: the race is in its creation
        path = tmp_path / f"{trial}.db"
        writers = [python(script, path, n) for n in range(3)]
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.close()
        assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
        [writer.stdout.close() for writer in writers]
        notes = Notes(path).all()
        for n in range(3):  # each one's notes in the order of its writing
            assert [note for note in notes if note.startswith(f"{n} ")] == [f"{n} {k}" for k in range(50)]
        assert len(notes) == 150


def test_a_note_is_kept_when_its_process_is_killed(tmp_path):
    """kill -9 at any moment after `add` returned: an open transaction, or a commit left to `close`, would lose it."""
    script = """
import sys, memory
notes = memory.Notes(sys.argv[1])
for k in range(10**6):
    notes.add(f"note {k}")
    print(k, flush=True)
"""
    with python(script, tmp_path / "notes.db") as writer:
        acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().split()]
    assert writer.returncode == -signal.SIGKILL
    kept = Notes(tmp_path / "notes.db").all()
    assert len(kept) - len(acknowledged) in (0, 1)  # at most the one whose acknowledgement was not printed any more
    assert kept == [f"note {k}" for k in range(len(kept))]


def test_the_examples_are_true_and_the_file_works_alone(tmp_path):
    assert doctest.testmod(memory).failed == 0
    (tmp_path / "memory.py").write_text((HERE / "memory.py").read_text())
    command = [sys.executable, "memory.py"]
    out = subprocess.run(command, cwd=tmp_path, timeout=30, capture_output=True, text=True, check=True).stdout
    assert "oldest turns leave" in out and "4711" in out.split("notes")[-1]
