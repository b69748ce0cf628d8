"""memory.py: the rule of the window, notes that survive, and search."""

import asyncio
import collections
import doctest
import math
import pathlib
import random
import re
import subprocess
import sys
import threading
import time

import pytest

import memory
from memory import Notes, Search, fts_query, turns_to_drop
from tools import Call, run_calls, schema, tools_of

HERE = pathlib.Path(memory.__file__).parent


def written(notes):
    """Every note, in the order of writing."""
    return [text for (text,) in notes._db.execute("SELECT text FROM notes ORDER BY rowid")]


def test_the_oldest_turns_leave_and_no_more_than_needed():
    """Against a search over all answers: what stays fits, is a suffix, and cannot be longer."""
    rng = random.Random(0)
    for _ in range(2000):
        turns = [rng.randrange(30) for _ in range(rng.randrange(8))]
        fixed, window, reserved = rng.randrange(20), rng.randrange(20, 240), rng.randrange(150)
        limit = window - reserved
        if fixed > limit:
            continue
        fitting = [len(turns)]
        for leave in range(len(turns)):
            newest_only = leave == len(turns) - 1
            most = limit if newest_only else min(limit, window // 2)
            if fixed + sum(turns[leave:]) <= most:
                fitting.append(leave)
        assert turns_to_drop(fixed, turns, window, reserved) == min(fitting)


def test_an_old_turn_never_stays_without_the_newer_ones():
    """With the big turn gone and a small old one kept, answers stood there without questions."""
    assert turns_to_drop(0, [1, 100, 1], 100) == 2
    assert turns_to_drop(0, [1, 1, 101], 100) == 3
    assert turns_to_drop(0, [], 0) == 0


def test_the_newest_turn_may_fill_more_than_half_of_the_window():
    """Else a long observation is gone before the agent reads it, and it asks for the same again."""
    assert turns_to_drop(0, [1, 1, 100], 100) == 2
    assert turns_to_drop(10, [1, 60], 100, reserved=30) == 1
    assert turns_to_drop(10, [1, 61], 100, reserved=30) == 2


def test_a_window_too_small_for_the_task_is_an_error_with_numbers():
    """The task itself was cut in silence: nobody could solve it, and the reward meant nothing."""
    with pytest.raises(ValueError, match="11 .*10"):
        turns_to_drop(11, [1], 10)
    with pytest.raises(ValueError, match="11 .*10"):
        turns_to_drop(11, [1], 40, reserved=30)


def test_notes_come_back_best_first():
    notes = Notes()
    notes.add("The code of the door is 4711.", "Anna has the key.", "Tea is at five.")
    notes.add("Anna, Anna, Anna!")
    assert len(notes) == 4 and written(notes)[0] == "The code of the door is 4711."
    assert notes.search("what is the CODE of the door?", top=1) == ["The code of the door is 4711."]
    assert notes.search("anna") == ["Anna, Anna, Anna!", "Anna has the key."]
    assert notes.search("nobody") == []
    assert notes.search("anna", top=0) == [] and notes.search("anna", top=-1) == []


QUERIES = ["", " ", "?", '"', '""', "'", "a AND", "NOT", "NOT a", "NEAR(", "NEAR(a b)", "a*"]
QUERIES += ["-", "-a", "(", "(a", "a)", "^a", "\x00", "a\x00b", "_", "__", "{a b}", "text:a"]
QUERIES += ["\U0001f642"]
QUERIES += ["'; DROP TABLE notes", "é" * 100, "İ", "a_b", "²", "ﬁ", "%", "\ud800"]
QUERIES += ["a " * 100_000, "b" * 10**6, " ".join(f"w{n}" for n in range(10_000))]
any_text = pytest.mark.parametrize("text", QUERIES, ids=range(len(QUERIES)))


@any_text
def test_any_text_is_a_query_and_a_note(text):
    """A policy writes anything, even half characters. None of it may raise, or be an operator."""
    notes = Notes()
    notes.add("a note")
    notes.add(text)
    assert len(notes) == 2 and written(notes)[1] == text.encode("utf-8", "replace").decode()
    assert set(notes.search(text)) <= set(written(notes))


def test_a_query_holds_each_word_once_and_not_too_many():
    """A query of a megabyte took minutes; one with two thousand words was refused by SQLite."""
    assert fts_query("To be, or not to be") == '"to" OR "be" OR "or" OR "not"'
    assert fts_query("\x00?!") == ""
    assert fts_query(" ".join(f"w{n}" for n in range(100))).count(" OR ") == 63


def test_notes_that_cannot_be_written_leave_none_behind():
    """`add` is one transaction: with half of them kept, a second try would write these twice."""
    notes = Notes()
    with pytest.raises(AttributeError):
        notes.add("first", None)
    assert written(notes) == []


def test_notes_in_memory_are_not_shared():
    """Two episodes that shared one store copied each other's answers."""
    one, other = Notes(), Notes()
    one.add("mine")
    assert written(other) == []


def test_threads_share_one_object():
    notes = Notes()

    def write(n):
        for k in range(50):
            notes.add(f"{n} {k}")

    threads = [threading.Thread(target=write, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written(notes)) == sorted(f"{n} {k}" for n in range(4) for k in range(50))


# ---- search ----


def brute_force_bm25(documents, query, top, k1=1.2, b=0.75):
    """The formula, as SQLite has it, without an index."""
    rows = [re.findall(r"\w+", document.lower()) for document in documents]
    average = sum(map(len, rows)) / len(rows)
    scores = collections.Counter()
    for word in dict.fromkeys(re.findall(r"\w+", query.lower())):
        holding = sum(word in row for row in rows)
        idf = max(math.log((len(rows) - holding + 0.5) / (holding + 0.5)), 1e-6)
        for place, row in enumerate(rows):
            n = row.count(word)
            if n:
                scores[place] += idf * n * (k1 + 1) / (n + k1 * (1 - b + b * len(row) / average))
    ranked = sorted(scores, key=lambda place: (-round(scores[place], 9), place))
    return [documents[place] for place in ranked[:top]]


def test_search_ranks_as_bm25_does():
    rng = random.Random(4)
    words = [f"{a}{b}" for a in "kmrt" for b in "aeiou"]
    documents = [" ".join(rng.choices(words, k=rng.randrange(3, 12))) + "." for _ in range(40)]
    documents += documents[:3]  # equal scores come in document order
    search = Search(documents, top=5)
    for _ in range(300):
        query = " ".join(rng.choices(words, k=rng.randrange(1, 5))) + rng.choice(["", "?", " xyz"])
        assert search.search(query).split("\n") == brute_force_bm25(documents, query, 5), query


@any_text
def test_search_takes_any_query(text):
    """A question mark or a quote in a question was a syntax error, and an error observation."""
    search = Search(["the first", "and a second\nin two lines"])
    found = search.search(text)
    documents = {"the first", "and a second in two lines"}
    assert found == "no document matches" or set(found.split("\n")) <= documents


def test_search_works_from_any_thread_and_is_made_fast():
    """SQLite refuses a connection from another thread, and every call of a tool has its own."""
    search = Search(["Rome is in Italy.", "Paris is in France."])
    calls = [Call("search", {"query": city}) for city in ["Rome", "Paris"] * 8]
    results = asyncio.run(run_calls(calls, tools_of(search)))
    found = [result.text.split("\n")[0] for result in results]
    assert found == ["Rome is in Italy.", "Paris is in France."] * 8
    assert search.search("berlin") == "no document matches"
    assert Search([]).search("a") == "no document matches"
    documents = [f"Document {n} is about thing {n * 7 % 30} and {n}." for n in range(30)]
    start = time.perf_counter()
    for _ in range(100):
        Search(documents)
    assert time.perf_counter() - start < 0.5  # measured: 0.04; a run makes thousands


def test_threads_share_one_search():
    """A connection used by two threads at once gave "bad parameter or other API misuse"."""
    search, found = Search(["Rome is in Italy.", "Paris is in France."]), []

    def look():
        for _ in range(100):
            found.append(search.search("Rome"))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["Rome is in Italy."] * 400


def test_the_prompt_says_what_it_said_to_trained_models():
    """The schema is in every prompt: with other words, a trained model has another task."""
    assert list(tools_of(Search(["a document"]))) == ["search"]
    assert schema(Search([]).search)["function"] == {
        "name": "search", "description": "Search the documents.",
        "parameters": {"type": "object", "required": ["query"], "properties": {"query": {
            "type": "string", "description":
            "Words to look for. Documents with more, and rarer, of them come first."}}}}


# ---- the file ----


def test_the_examples_are_true_and_the_file_works_alone(tmp_path):
    assert doctest.testmod(memory).failed == 0
    (tmp_path / "memory.py").write_text((HERE / "memory.py").read_text())
    command = [sys.executable, "memory.py"]
    run = subprocess.run(command, cwd=tmp_path, timeout=30, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "oldest turns leave" in run.stdout and "4711" in run.stdout.split("notes")[-1]
