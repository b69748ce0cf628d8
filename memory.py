"""What stays when the context window is full: the rule of the window, and notes that outlive it.

An agent has two memories. *Working memory* is the context window: tokens, paid for at every step, and bounded. `keep_turns` is
the rule by which it is emptied. *Long-term memory* is `Notes`: text that the agent wrote down itself, found again by full text
search (SQLite FTS5, ranked by BM25). Emptying the window is only safe for an agent that has learned what to write down.

agent.py counts the tokens and asks `keep_turns` when its window is full; an environment such as `recall` gives its agent
`Notes` as tools. Nothing here knows about models.

Left out: embeddings (BM25 needs no model and can be explained), summaries (a summary is one more thing the policy writes: let it
add a note), forgetting, and access by a network.

Run it alone: `python memory.py`. Copy it alone: it needs the standard library (SQLite with FTS5).
"""

import re
import sqlite3
import threading
import time
from collections.abc import Sequence
from os import PathLike


def keep_turns(fixed: int, turns: Sequence[int], budget: int) -> int:
    """How many of the oldest turns leave the window, so that what stays is within a budget. All numbers are counts of tokens.

    The rule: what is fixed (system message, task, notes) stays. Whole turns leave, oldest first; a turn is a message of the
    assistant and all observations it caused, so no call is ever left without its result, nor a result without its call. The
    newest turn leaves only if it does not fit on its own. Raises ValueError if the fixed part is over the budget.

    An agent asks with half its window as the budget: with the whole of it, each turn after the first time would be one too many
    again, and every turn would cost a new prompt.

    >>> keep_turns(fixed=10, turns=[30, 20, 20], budget=50)   # 10 + 20 + 20 fit
    1
    >>> keep_turns(fixed=10, turns=[5, 5, 90], budget=50)     # the newest does not, and without it the older ones make no sense
    3
    """
    if fixed > budget:
        raise ValueError(f"the fixed part alone has {fixed} tokens, more than the budget of {budget}: enlarge the window")
    room, leaving = budget - fixed, len(turns)
    while leaving and turns[leaving - 1] <= room:
        leaving -= 1
        room -= turns[leaving]
    return leaving


class Notes:
    """Notes that can be searched: in memory, or in a file that outlives the process.

    Threads may share one object, and processes may share one file: open it in each of them, not before a fork. In a file, a note
    is on the disk when `add` returns, whatever happens to the process after. An empty one is false, as an empty list is.

    >>> notes = Notes()
    >>> for text in ["The door code is 4711.", "Anna has the key.", "Tea is at five."]: notes.add(text)
    >>> notes.search("who has the key?", top=1), len(notes)
    (['Anna has the key.'], 3)
    """

    def __init__(self, path: str | PathLike | None = None):
        # Threads take turns by the lock; processes by SQLite, which waits up to `timeout` seconds for another's write.
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path or ":memory:", timeout=60, check_same_thread=False, isolation_level=None)
        if path:
            self._use_wal()
            self._db.execute("PRAGMA synchronous = full")  # WAL alone may lose the last commits with the power
        # IMMEDIATE takes the write lock at once: two new processes that first read, then write, would refuse each other.
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("CREATE VIRTUAL TABLE IF NOT EXISTS notes USING fts5(text)")
        self._db.execute("COMMIT")

    def add(self, text: str) -> None:
        """Write a note down. It is one transaction: all of it is kept, or (when this raises) nothing."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a character ("\\ud800") is refused by SQLite
        self._run("INSERT INTO notes (text) VALUES (?)", text)

    def search(self, query: str, top: int = 3) -> list[str]:
        """The notes that hold a word of the query, best first: more of the words, and rarer ones, win. Any text is a query.

        >>> Notes().search('NEAR(" OR *')
        []
        """
        # Words, quoted and joined by OR: all else is FTS5 syntax to a hostile query. Bounded, for it may be a megabyte.
        words = list(dict.fromkeys(re.findall(r"\w+", query[:5000].lower())))[:64]
        match = " OR ".join(f'"{word}"' for word in words)
        if not match:
            return []
        return self._run("SELECT text FROM notes WHERE notes MATCH ? ORDER BY bm25(notes), rowid LIMIT ?", match, max(top, 0))

    def all(self) -> list[str]:
        """Every note, in the order of writing."""
        return self._run("SELECT text FROM notes ORDER BY rowid")

    def __len__(self) -> int:
        return self._run("SELECT count(*) FROM notes")[0]

    def _run(self, statement: str, *values: str | int) -> list:
        with self._lock:
            return [row[0] for row in self._db.execute(statement, values).fetchall()]

    def _use_wal(self) -> None:
        """The write-ahead log, with which readers and a writer do not block each other."""
        for attempt in range(6000):
            try:
                self._db.execute("PRAGMA journal_mode = wal")
                return
            except sqlite3.OperationalError:  # of two processes that open a new file at once, SQLite lets one wait, one fail
                if attempt == 5999:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        """Close the file; happens by itself when the object goes."""
        self._db.close()

    def __del__(self):
        if hasattr(self, "_db"):  # not, if the file could not be opened
            self.close()


def _demo() -> None:
    """A long conversation in a window of 60 tokens (here: words): what left the window is found in the notes."""
    window, fixed, turns, notes = 60, 14, [], Notes()
    facts = ["the code of the door is 4711", "it rains today", "Anna lives in Rome", "the train leaves at nine", "tea is at five"]
    for number, fact in enumerate(facts + facts[1:] + facts[1:]):
        turns.append(f"assistant: look around. observation {number}: {fact}".split())
        if number < len(facts):
            notes.add(fact)
        used = fixed + sum(map(len, turns))
        if used > window:
            leaving = keep_turns(fixed, list(map(len, turns)), window // 2)
            turns = turns[leaving:]
            print(f"turn {number:2}: {used} words do not fit {window}: the {leaving} oldest turns leave, {len(turns)} stay")
    print("\nin the window: ", *(" ".join(turn) for turn in turns), sep="\n  ")
    print("\nthe notes, asked for the code of the door:", *notes.search("code of the door"), sep="\n  ")


if __name__ == "__main__":
    _demo()
