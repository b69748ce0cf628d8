"""What an agent still knows when its context window is full.

An agent has two memories. *Working memory* is the context window: the tokens that the model reads
before it writes. Its size is limited. When it is full, `turns_to_drop` says how many old turns
leave. *Long-term memory* is `Notes`: texts that the agent writes down and searches later. They
outlast the window, not the episode. An agent that takes no notes loses what leaves the window.

The search compares words. SQLite's index FTS5 finds the texts with a word of the query, and BM25
ranks them: more of the query's words count more, so do rarer ones, and of texts with the same words
the shorter one wins (`Lookup` in env.py depends on this).

`Search` is the same search over given documents. The environments of env.py use `Notes` and
`Search` inside their tools, and agent.py asks `turns_to_drop`. Nothing here knows about models.

Left out: embeddings (BM25 needs no model and is easy to explain), summaries (a policy can write one
as a note), forgetting, and notes in a file.

Run it alone: `python memory.py`. Copy it alone: it needs the standard library, with SQLite's FTS5.
"""

import re
import sqlite3
import threading
from collections.abc import Sequence


def turns_to_drop(fixed: int, turns: Sequence[int], window: int, reserved: int = 0) -> int:
    """How many of the oldest turns to drop from a context window that is full.

    fixed: tokens of the part that always stays (system message, tools, task).
    turns: tokens of each turn, the oldest first. A turn is a message and its observations.
    window: tokens that the model can read at once.
    reserved: of these, tokens for the next message.

    Only whole turns are dropped, so a call and its result stay together. The fixed part and the
    turns that stay fill at most half of the window. With more, the window would soon be full again,
    and each time the model must read all of the new segment. An exception is the newest turn: it
    stays whenever it fits, because it holds what the agent asked for last.
    Raises ValueError if `fixed` does not fit.

    >>> turns_to_drop(fixed=10, turns=[40, 30, 20, 20], window=100)  # 10 + 20 + 20 stay
    2
    >>> turns_to_drop(fixed=10, turns=[15, 15, 70], window=100)  # the newest fits
    2
    >>> turns_to_drop(fixed=10, turns=[15, 15, 70], window=100, reserved=30)  # 10 + 70 > 100 - 30
    3
    """
    limit = window - reserved
    if fixed > limit:
        raise ValueError(f"the fixed part has {fixed} tokens, and there is room for {limit}")
    used, leaving = fixed, len(turns)
    for turn in reversed(turns):
        is_newest = leaving == len(turns)
        room = limit if is_newest else min(limit, window // 2)
        if used + turn > room:
            break
        used += turn
        leaving -= 1
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
    """Texts that can be searched. Threads may share one object: each call of a tool has its own.

    >>> notes = Notes()
    >>> notes.add("The door code is 4711.", "Anna has the key.", "Tea is at five.")
    >>> notes.search("who has the key?", top=1)
    ['Anna has the key.']
    >>> len(notes)
    3
    """

    def __init__(self):
        self._lock = threading.Lock()  # one thread at a time may use the connection
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.execute("CREATE VIRTUAL TABLE notes USING fts5(text)")

    def add(self, *texts: str) -> None:
        """Write notes down, in one transaction: if this raises, none of them is kept."""
        # SQLite refuses half a character, such as "\\ud800".
        rows = [(text.encode("utf-8", "replace").decode("utf-8"),) for text in texts]
        with self._lock, self._db:  # commits, or takes all back
            self._db.executemany("INSERT INTO notes (text) VALUES (?)", rows)

    def search(self, query: str, top: int = 3) -> list[str]:
        """The notes that hold a word of the query, the best first. Any text is a query.

        >>> Notes().search('NEAR(" OR *')
        []
        """
        match = fts_query(query)
        if not match:
            return []
        ranked = "SELECT text FROM notes WHERE notes MATCH ? ORDER BY bm25(notes), rowid LIMIT ?"
        return self._select(ranked, match, max(top, 0))

    def __len__(self) -> int:
        return self._select("SELECT count(*) FROM notes")[0]

    def _select(self, statement: str, *values: str | int) -> list:
        with self._lock:
            return [row[0] for row in self._db.execute(statement, values)]


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
