"""What an agent still knows when its context window is full.

An agent has two memories. *Working memory* is the context window: the tokens that the model reads
before it writes. Its size is limited. When it is full, `turns_to_drop` says how many old turns
leave. *Long-term memory* is `Notes`: texts that the agent writes down and searches later. The
search compares words: SQLite's index FTS5 finds the texts, and BM25 puts first those that have more
of the query's words, and rarer ones. An agent that takes no notes loses what leaves the window.

`Search` is the same search over given documents. The environments of env.py use `Notes` and
`Search` inside their tools, and agent.py asks `turns_to_drop`. Nothing here knows about models.

Left out: embeddings (BM25 needs no model and is easy to explain), summaries (a policy can write one
as a note), forgetting, and access over a network.

Run it alone: `python memory.py`. Copy it alone: it needs the standard library, with SQLite's FTS5.
"""

import re
import sqlite3
import threading
from collections.abc import Sequence
from os import PathLike


def turns_to_drop(fixed: int, turns: Sequence[int], window: int, free: int = 0) -> int:
    """How many of the oldest turns to drop from a context window that is full.

    fixed: tokens of the part that always stays (system message, tools, task).
    turns: tokens of each turn, the oldest first. A turn is a message and its observations.
    window: tokens that the model can read at once. free: of these, tokens for the next message.

    Only whole turns are dropped, so a call and its result stay together. The rest fills at most
    half of the window. With more, the window would soon be full again, and each time the model must
    read all of the new segment. The newest turn is an exception: it stays whenever it fits, because
    it holds what the agent asked for last. Raises ValueError if `fixed` does not fit.

    >>> turns_to_drop(fixed=10, turns=[40, 30, 20, 20], window=100)  # 10 + 20 + 20 stay
    2
    >>> turns_to_drop(fixed=10, turns=[15, 15, 70], window=100)  # the newest fits
    2
    >>> turns_to_drop(fixed=10, turns=[15, 15, 70], window=100, free=30)  # 10 + 70 > 100 - 30
    3
    """
    limit = window - free
    if fixed > limit:
        raise ValueError(f"the fixed part has {fixed} tokens, and there is room for {limit}")
    used, leaving = fixed, len(turns)
    while leaving and used + turns[leaving - 1] <= limit:
        leaving -= 1
        used += turns[leaving]
        limit = min(limit, window // 2)  # for all but the newest
    return leaving


def fts_query(text: str) -> str:
    """Any text as a query of FTS5: its words, quoted and joined by OR. "" if it has none.

    FTS5 reads unquoted text as the syntax of a query, and a policy writes anything. Only the first
    64 words of the first 5,000 characters count.

    >>> fts_query('who has "the key"?')
    '"who" OR "has" OR "the" OR "key"'
    """
    words = dict.fromkeys(re.findall(r"\w+", text[:5000].lower()))  # each once, in order
    return " OR ".join(f'"{word}"' for word in list(words)[:64])


class Notes:
    """Texts that can be searched: in memory, or in a file that outlives the process.

    Threads may share one object. Processes may share one file; each must open it itself, not before
    a fork. When `add` returns, the notes are on the disk, even if the process is then killed.

    >>> notes = Notes()
    >>> notes.add("The door code is 4711.", "Anna has the key.", "Tea is at five.")
    >>> notes.search("who has the key?", top=1)
    ['Anna has the key.']
    >>> len(notes)
    3
    """

    def __init__(self, path: str | PathLike | None = None):
        # Threads take turns by the lock. Processes take turns by SQLite, which waits for another's
        # write for up to `timeout` seconds. IMMEDIATE takes the write lock before the first read:
        # two processes that both read first, then write, would refuse each other at once.
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path or ":memory:", timeout=60, check_same_thread=False,
                                   isolation_level="IMMEDIATE")
        with self._db:  # commits
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("CREATE VIRTUAL TABLE IF NOT EXISTS notes USING fts5(text)")

    def add(self, *texts: str) -> None:
        """Write notes down, in one transaction: if this raises, none of them is kept."""
        # SQLite refuses half a character, such as "\\ud800".
        rows = [(text.encode("utf-8", "replace").decode("utf-8"),) for text in texts]
        with self._lock, self._db:
            self._db.executemany("INSERT INTO notes (text) VALUES (?)", rows)

    def search(self, query: str, top: int = 3) -> list[str]:
        """The notes that hold a word of the query. More words, and rarer ones, come first.

        Any text is a query.

        >>> Notes().search('NEAR(" OR *')
        []
        """
        match = fts_query(query)
        if not match:
            return []
        ranked = "SELECT text FROM notes WHERE notes MATCH ? ORDER BY bm25(notes), rowid LIMIT ?"
        return self._select(ranked, match, max(top, 0))

    def all(self) -> list[str]:
        """Every note, in the order of writing."""
        return self._select("SELECT text FROM notes ORDER BY rowid")

    def __len__(self) -> int:
        return self._select("SELECT count(*) FROM notes")[0]

    def _select(self, statement: str, *values: str | int) -> list:
        with self._lock:
            return [row[0] for row in self._db.execute(statement, values)]

    def close(self) -> None:
        """Close the file. Happens by itself when nobody holds the object any more."""
        self._db.close()

    def __del__(self):
        if hasattr(self, "_db"):  # it has none if the file could not be opened
            self.close()


class Search:
    """Full-text search over a few documents, as a tool. It returns at most `top` of them.

    >>> Search(["The Elbe is a river.", "Mount Etna is high."]).search("which river?")
    'The Elbe is a river.'
    """

    def __init__(self, documents: Sequence[str], top: int = 3):
        self._documents, self._top = Notes(), top
        self._documents.add(*[" ".join(document.split()) for document in documents])

    # If this method is a tool, its docstring goes into the prompt: other words, another prompt.
    def search(self, query: str) -> str:
        """Search the documents.

        Args:
            query: Words to look for. Documents with more, and rarer, of them come first.

        Returns:
            The best documents, one per line.
        """
        return "\n".join(self._documents.search(query, self._top)) or "no document matches"


def _demo() -> None:
    """A long conversation in a window of 60 words. The notes still know what left the window."""
    window, fixed, turns, notes = 60, 14, [], Notes()
    facts = ["the code of the door is 4711", "it rains today", "Anna lives in Rome",
             "the train leaves at nine", "tea is at five"]
    notes.add(*facts)
    for number, fact in enumerate(facts + facts[1:] + facts[1:]):
        turns.append(f"assistant: look around. observation {number}: {fact}".split())
        lengths = [len(turn) for turn in turns]
        used = fixed + sum(lengths)
        if used > window:
            leaving = turns_to_drop(fixed, lengths, window)
            turns = turns[leaving:]
            print(f"turn {number:2}: {used} words do not fit into {window}: "
                  f"the {leaving} oldest turns leave, {len(turns)} stay")
    print("\nin the window: ", *[" ".join(turn) for turn in turns], sep="\n  ")
    print("\nthe notes on the code of the door:", *notes.search("code of the door"), sep="\n  ")


if __name__ == "__main__":
    _demo()
