"""Functions as tools: describe them to a model, read the calls it writes, run the calls under limits.

    schema     a function with type hints and a Google docstring -> the JSON description that goes into the prompt
    tools_of   an object, such as an environment -> its public methods, as tools
    parse      the text of a message that the policy sampled (from agent.py) -> its thinking, its text and its calls
    run_calls  calls -> observations: text that agent.py appends for the policy to read

The idea to take away: a policy that explores writes broken calls, so *nothing it writes may raise*. What is wrong with a call,
and how to write it right, becomes its observation; the episode goes on, and the policy can learn from it. Three tools that
environments share stand at the end: `calculator`, `Search` and `python`.

Left out: killing. A time limit here abandons a thread, it cannot kill one: it may still change what it holds. A tool that may hang
for ever or crash the interpreter belongs in a child process, as `python` shows. And an `async def` tool must await, not block.

Threads share one interpreter, and only one of them runs Python at a time (the GIL). Most code lets
the others have a turn, but a single call into C may not: `re.search("(a+)+$", "a" * 40 + "b")`
holds the interpreter for hours. Nothing else runs, so nobody notices that its time is over.
A tool that matches a pattern the policy wrote therefore belongs in a process of its own. `python`
shows how: a thread waits for the process (`_run_program`), a time limit inside ends it
(`_supervise`), and so does cancelling the call.

Run it alone: `python tools.py`. Copy it alone: it needs the standard library (SQLite with FTS5) and one helper of transformers.
"""

import _thread
import ast
import asyncio
import collections
import contextlib
import contextvars
import copy
import functools
import inspect
import json
import math
import operator
import os
import platform
import queue
import re
import select
import shutil
import signal
import sqlite3
import struct
import subprocess
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from transformers.utils import get_json_schema

# ---- describe --------------------------------------------------------------------------------------------


def schema(function: Callable) -> dict:
    """The description of a tool, in the form that chat templates and APIs take. Raises if a type hint or a docstring is missing.

    >>> schema(calculator)["function"]["parameters"]["required"]
    ['expression']
    """
    # Cached by the function of a bound method: by the method, each environment ever made would stay alive.
    return copy.deepcopy(_schema(getattr(function, "__func__", function)))


@functools.lru_cache(maxsize=1024)
def _schema(function: Callable) -> dict:
    described = get_json_schema(function)
    described["function"].pop("return", None)  # APIs refuse this key
    return described


def tools_of(obj: object, reserved: Sequence[str] = ("reset", "get_reward")) -> dict[str, Callable]:
    """The public methods of an object, base classes first, in the order of their definition.

    >>> list(tools_of(Search(["a document"])))
    ['search']
    """
    methods = {}
    for name in [name for cls in reversed(type(obj).__mro__[:-1]) for name in vars(cls)]:  # the last class is `object`
        kind = type(inspect.getattr_static(type(obj), name))  # asked of the class: on the object a property would run
        if kind in (types.FunctionType, staticmethod, classmethod) and not name.startswith("_") and name not in reserved:
            methods[name] = getattr(obj, name)
    return methods


# ---- read a message --------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call that may be run: its tool exists and its arguments fit the tool's schema."""

    name: str  # of the tool; not an identifier of this call, for observations come in call order
    arguments: dict[str, Any]  # by name, as JSON gave them; not converted, and not a JSON text


@dataclass
class CallError:
    """A call that must not be run. It keeps its place among the calls."""

    message: str  # what is wrong and how to write it right, for the policy to read; not a Python traceback


@dataclass
class Message:
    """A sampled message, taken apart to act on. What is trained on is its ids, which stay as they were sampled."""

    thinking: str  # inside <think>; never executed, and no part of an answer
    text: str  # outside <think> and <tool_call>, stripped; not the whole message
    calls: list[Call | CallError]  # in the order written, the broken ones among them


def format_call(name: str, **arguments: Any) -> str:
    """A call as Qwen, Hermes and many others write it; `parse` reads it back.

    >>> print(format_call("search", query="rivers"))
    <tool_call>
    {"name": "search", "arguments": {"query": "rivers"}}
    </tool_call>
    """
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    # A tag inside an argument would end the block early. JSON may write "/" as "\/", which is no tag.
    for tag in ("tool_call>", "think>"):
        text = text.replace("</" + tag, "<\\/" + tag).replace("<" + tag, "\\u003c" + tag)
    return f"<tool_call>\n{text}\n</tool_call>"


def parse(text: str, tools: Mapping[str, Callable] | Sequence[dict]) -> Message:
    r"""Take a sampled message apart. Never raises, whatever the text; takes time linear in its length.

    `tools` is what `tools_of` gives, or a list of schemas. An unclosed <think> or <tool_call> reaches to the end of the text.
    A </think> with no <think> before it closes one that the prompt opened, as Qwen's does. A call inside <think> is no call.

    >>> parse("<think>7*6?</think>So: " + format_call("calculator", expression="7*6"), [schema(calculator)])
    Message(thinking='7*6?', text='So:', calls=[Call(name='calculator', arguments={'expression': '7*6'})])
    >>> parse(format_call("calculator", expression=42), {"calculator": calculator}).calls[0].message
    'argument "expression" of "calculator" must be string, not 42. Its arguments: expression (string)'
    """
    schemas = map(schema, tools.values()) if isinstance(tools, Mapping) else tools
    parameters = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in schemas}
    thoughts, outside, blocks, unclosed = _split(text)
    calls = [_read_call(block.strip(), parameters) for block in blocks]
    if unclosed:
        calls[-1] = CallError("<tool_call> was opened but never closed: end the call with </tool_call>")
    return Message("\n".join(thoughts).strip(), outside.strip(), calls)


def _split(text: str) -> tuple[list[str], str, list[str], bool]:
    """The inside of each <think>, the text outside, the inside of each <tool_call>, and whether the last of these was left open.

    >>> _split("<think>a<tool_call></think>b<tool_call>c</tool_call>d<tool_call>e")
    (['a<tool_call>'], 'bd', ['c', 'e'], True)
    """
    head, close, tail = text.partition("</think>")
    opened_by_prompt = close and "<think>" not in head
    thoughts, outside, blocks = [[head]] if opened_by_prompt else [], [], []
    here, end = outside, None
    # One pass over literal tags: a search for the *next* <think> at each step would read the rest of the text each time.
    for piece in re.split("(</?think>|</?tool_call>)", tail if opened_by_prompt else text):
        if here is outside and piece == "<think>":
            thoughts.append([])
            here, end = thoughts[-1], "</think>"
        elif here is outside and piece == "<tool_call>":
            blocks.append([])
            here, end = blocks[-1], "</tool_call>"
        elif piece == end:
            here, end = outside, None
        else:
            here.append(piece)
    return ["".join(t) for t in thoughts], "".join(outside), ["".join(block) for block in blocks], end == "</tool_call>"


_FORM = 'Write {"name": ..., "arguments": {...}}'


class _Wrong(ValueError):
    """What is wrong with a call, and how to write it right."""


def _read_call(block: str, parameters: dict[str, dict]) -> Call | CallError:
    try:
        # Python would also read NaN, Infinity, 1e999 and a key given twice: each would be a guess at what the policy meant.
        found = json.loads(block, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_no_key_twice)
        return _check_call(found, parameters)
    except json.JSONDecodeError as error:
        near = _show(block[max(error.pos - 10, 0) : error.pos + 10])
        hint = "End each call with </tool_call>" if "<tool_call>" in block else _FORM
        return CallError(f"not valid JSON: {error.msg} at character {error.pos}, near {near}. {hint}")
    except RecursionError:
        return CallError("the JSON of the call is nested too deeply")
    except ValueError as error:  # a _Wrong, or a number of thousands of digits
        return CallError(str(error))


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise _Wrong(f"{number[:40]} is not a number in JSON: write a finite one, or a string")
    return float(number)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    twice = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise _Wrong(f"the key {_show(twice[0])} stands twice in one object: give it once")
    return dict(pairs)


def _check_call(found: Any, parameters: dict[str, dict]) -> Call:
    """Raises _Wrong with the first thing that is wrong."""
    if not isinstance(found, dict):
        raise _Wrong(f"a call must be a JSON object, not {_show(found)}. {_FORM}")
    for key in ("name", "arguments"):
        if key not in found:
            raise _Wrong(f'the call has no "{key}". {_FORM}')
    name, arguments = found["name"], found["arguments"]
    if not isinstance(name, str) or name not in parameters:
        raise _Wrong(f"there is no tool {_show(name)}. The tools: {', '.join(parameters) or 'none'}")
    if not isinstance(arguments, dict):
        raise _Wrong(f'"arguments" of "{name}" must be a JSON object, not {_show(arguments)}')
    _check_arguments(name, arguments, parameters[name])
    return Call(name, arguments)


def _check_arguments(name: str, arguments: dict, parameters: dict) -> None:
    specs = parameters.get("properties", {})
    usage = "Its arguments: " + (", ".join(f"{key} ({_kind(spec)})" for key, spec in specs.items()) or "none")
    for key in parameters.get("required", []):
        if key not in arguments:
            raise _Wrong(f'"{name}" needs the argument "{key}". {usage}')
    for key, value in arguments.items():
        if key not in specs:
            raise _Wrong(f'"{name}" has no argument {_show(key)}. {usage}')
        wrong = _misfit(value, specs[key], f'argument "{key}" of "{name}"')
        if wrong:
            raise _Wrong(f"{wrong}. {usage}")


_TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}
_TYPES["null"] = type(None)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("integer", "number"):  # True is an int in Python, not in JSON
        return False
    return isinstance(value, _TYPES.get(kind, object))


def _misfit(value: Any, spec: dict, what: str) -> str | None:
    """What is wrong with a value, or None: the part of JSON schema that type hints can express."""
    if value is None and spec.get("nullable"):
        return None
    kinds = [spec["type"]] if isinstance(spec.get("type"), str) else spec.get("type", [])
    fits = not kinds or any(_is(value, kind) for kind in kinds)
    # True == 1 in Python, so the type is compared too.
    fits = fits and ("enum" not in spec or any(type(value) is type(one) and value == one for one in spec["enum"]))
    fits = fits and ("anyOf" not in spec or any(_misfit(value, option, what) is None for option in spec["anyOf"]))
    if not fits:
        return f"{what} must be {_kind(spec)}, not {_show(value)}"
    items = enumerate(value) if isinstance(value, list) and "items" in spec else ()
    wrongs = (_misfit(item, spec["items"], f"item {place} of {what}") for place, item in items)
    return next((wrong for wrong in wrongs if wrong), None)


def _kind(spec: dict) -> str:
    """A schema in words: 'integer', 'array of string or null', 'one of "a", "b"'."""
    kinds = [spec["type"]] if isinstance(spec.get("type"), str) else spec.get("type", ["anything"])
    words = " or ".join(map(_kind, spec["anyOf"])) if "anyOf" in spec else " or ".join(kinds)
    words = f"one of {', '.join(map(_show, spec['enum']))}" if "enum" in spec else words
    words += f" of {_kind(spec['items'])}" if "items" in spec else ""
    return words + " or null" * bool(spec.get("nullable"))


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."


# ---- run calls -------------------------------------------------------------------------------------------


@dataclass
class Observation:
    """What one call gave, for the policy to read."""

    text: str  # clipped and valid UTF-8; still untrusted: agent.py encodes it so that no control token can come of it
    error: bool  # nothing useful was done: a broken call, an exception, the time limit; not "the answer is wrong"


async def run_calls(
    calls: Sequence[Call | CallError],
    tools: Mapping[str, Callable],
    *,
    timeout: float = 10.0,
    max_chars: int = 2000,
    max_calls: int = 16,
) -> list[Observation]:
    """Run the calls of one message at once; observations come back in call order, one for each call.

    Whatever a tool does, its call alone sees it: an exception (SystemExit too) or a result without text is an error observation,
    a call longer than `timeout` seconds is abandoned, a text over `max_chars` loses its middle, calls after the first
    `max_calls` do not run. Plain methods of one object take turns in call order: two moves in a maze must not race.
    Raises only when it is cancelled itself, or at Ctrl-C. A plain tool that holds the interpreter
    does hurt the others: see the top of this file.

    >>> calls = [Call("calculator", {"expression": "6*7"}), CallError("not JSON"), Call("calculator", {"expression": "1/0"})]
    >>> [observation.text for observation in asyncio.run(run_calls(calls, {"calculator": calculator}))]
    ['42', 'error: not JSON', 'error: ValueError: division by zero']
    """
    turns = collections.defaultdict(asyncio.Lock)  # first come, first served

    async def run(call: Call | CallError) -> Observation:
        if isinstance(call, CallError) or call.name not in tools:
            return _failed(getattr(call, "message", "there is no such tool"))
        function = tools[call.name]
        if inspect.iscoroutinefunction(function):
            coroutine = functools.partial(_await, function, call.arguments)
            return await _limit(call.name, timeout, lambda: asyncio.ensure_future(coroutine()))
        work = functools.partial(_observe, functools.partial(function, **call.arguments))
        async with turns[id(getattr(function, "__self__", call))]:
            return await _limit(call.name, timeout, lambda: in_thread(work))

    too_many = CallError(f"only the first {max_calls} calls of a message are run")
    calls = [*calls[:max_calls], *[too_many] * len(calls[max_calls:])]
    observations = await asyncio.gather(*map(run, calls))
    return [Observation(clip(observation.text, max_chars), observation.error) for observation in observations]


# The time limit of the call that runs here.
_clock: contextvars.ContextVar[asyncio.Timeout] = contextvars.ContextVar("clock")


async def _limit(name: str, timeout: float, start: Callable[[], asyncio.Future]) -> Observation:
    """What the future of a call gives, if it does so in time."""
    future = None
    try:
        async with asyncio.timeout(timeout) as clock:
            _clock.set(clock)  # before the start: a task takes over the variables of this moment
            future = start()
            # Not `await future`: that waits for ever for a task that swallows its cancellation.
            await asyncio.wait({future})
    except TimeoutError:
        if not future.done():  # it is, if only the event loop was late
            return _failed(f"{name} took longer than {timeout:g} s and was abandoned")
    finally:
        if future:
            future.cancel()  # does nothing to one that is done
    if future.cancelled():
        return _failed(f"{name} was cancelled")
    return _failed(future.exception()) if future.exception() else future.result()


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """For an `async def` tool that must wait for its turn: `with untimed(): await turn`.

    Meanwhile the time limit of its call stands still.
    """
    clock = _clock.get(None)
    if clock is None or clock.when() is None:  # no limit, or the call waits in another place too
        yield
        return
    left = clock.when() - asyncio.get_running_loop().time()
    clock.reschedule(None)
    yield
    clock.reschedule(asyncio.get_running_loop().time() + left)


async def _await(function: Callable, arguments: dict) -> Observation:
    try:
        result = await function(**arguments)
    except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise  # meant for the event loop, in whose thread this is
    except BaseException as error:  # a SystemExit would end the loop, and every other episode with it
        return _failed(error)
    # In a thread: a __str__ that hangs would stop the loop.
    return await in_thread(lambda: _observe(lambda: result))


def _observe(produce: Callable[[], Any]) -> Observation:
    """To be run in a thread of its own: what `produce` returns, or raises."""
    try:
        return Observation(_as_text(produce()), error=False)
    except BaseException as error:  # sys.exit() too: this thread is the tool's
        return _failed(error)


_idle: list[queue.SimpleQueue] = []  # where threads that have nothing to do wait for their next job
os.register_at_fork(after_in_child=_idle.clear)  # a fork has none of these threads


def in_thread(function: Callable[[], Any]) -> asyncio.Future:
    """Run `function` in a thread. The future gets what it returns, or the Exception it raises.

    Threads are used again: that is four times as quick as starting one. Their number has no limit,
    so a thread that hangs for ever is not missed, as it would be in a pool. And at exit Python
    waits for pools and for other threads, but not for these.
    """
    future = asyncio.get_running_loop().create_future()
    try:
        jobs = _idle.pop()
    except IndexError:
        jobs = queue.SimpleQueue()
        try:
            # Not threading.Thread: its start waits until the thread runs.
            _thread.start_new_thread(_work, (jobs,))
        except RuntimeError as error:  # no more threads: abandoned ones may hold them all
            future.set_exception(error)
            return future
    jobs.put((function, future))
    return future


def _work(jobs: queue.SimpleQueue) -> None:
    # A function of its own: so an idle thread keeps no environment alive.
    while _work_once(jobs, *jobs.get()):
        pass


def _work_once(jobs: queue.SimpleQueue, function: Callable, future: asyncio.Future) -> bool:
    """Run one job and deliver its result. False if nobody waits for it any more."""
    process, result, error = os.getpid(), None, None
    try:
        result = function()
    except Exception as e:
        error = e
    if os.getpid() != process:  # the function has forked us: the copy ends here
        os._exit(0)
    if future.get_loop().is_closed():
        return False
    _idle.append(jobs)  # before the delivery: whoever gets the result may have the next job at once
    with contextlib.suppress(RuntimeError):  # the loop was closed just now
        future.get_loop().call_soon_threadsafe(_deliver, future, result, error)
    return True


def _deliver(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # the call was abandoned
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _as_text(result: Any) -> str:
    """Text as it is, None as "done", bytes decoded, else JSON (NaN stays NaN), else `str`. May raise, as a __str__ may."""
    if isinstance(result, str):
        return result
    if result is None:
        return "done"
    if isinstance(result, (bytes, bytearray, memoryview)):
        return bytes(result).decode("utf-8", "replace")
    if inspect.isawaitable(result):
        raise TypeError("the tool returned something to await: declare it `async def`")
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def _failed(reason: BaseException | str) -> Observation:
    """An error observation of one line, whatever the exception has to say."""
    reason = describe(reason) if isinstance(reason, BaseException) else reason
    return Observation(" ".join(f"error: {reason}".split()), error=True)


def describe(error: BaseException) -> str:
    """An exception in one line.

    >>> describe(KeyError("x"))
    "KeyError: 'x'"
    """
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # its __str__ may be a tool's code, too
        text = type(error).__name__
    return " ".join(text.split())


def clip(text: str, max_chars: int) -> str:
    """At most `max_chars` of a text, a mark where its middle was, and valid UTF-8.

    >>> clip("a" * 5000 + "end", 8)
    'aaaaaa [... 4,995 characters cut ...] nd'
    """
    if len(text) > max_chars:
        tail = max_chars // 4
        text = f"{text[: max_chars - tail]} [... {len(text) - max_chars:,} characters cut ...] {text[len(text) - tail :]}"
    # A policy can write "\ud800" in JSON, which is half a character: no tokenizer takes it.
    return text.encode("utf-8", "replace").decode("utf-8")


# ---- tool: calculator ------------------------------------------------------------------------------------

_LIMIT = 10**300  # whole numbers below it fit a float, so no operation overflows on the way


def calculator(expression: str) -> str:
    """Work out an arithmetic expression. Whole numbers are exact, however large.

    Args:
        expression: Numbers, + - * / // % ** and parentheses, such as "(12 + 3.5) * 2 ** 4".

    Returns:
        The value.

    Raises:
        ValueError: What is wrong with the expression.

    >>> calculator("3 * (2**64 + 1)"), calculator("0.1 + 0.2"), calculator("7 / 2")
    ('55340232221128654851', '0.3', '3.5')
    """
    if len(expression) > 500:
        raise ValueError(f"the expression has {len(expression):,} characters, more than 500: work it out in parts")
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (RecursionError, MemoryError):  # MemoryError is how the parser says it
        raise ValueError("the expression is nested too deeply") from None
    except OverflowError:
        raise ValueError("a number is too large: the limit is 10**300") from None
    except SyntaxError as error:
        raise ValueError(f"not an arithmetic expression ({error.msg}): {expression[:60]!r}") from None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.12g}"
    return str(value)


def _evaluate(node: ast.AST) -> float:
    """Walks what stands here and refuses the rest, so no list of dangerous names is needed."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _evaluate(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    else:
        raise ValueError(f"only numbers, + - * / // % ** and parentheses are allowed, not {ast.unparse(node)[:40]!r}")
    if not abs(value) < _LIMIT:
        raise OverflowError
    return value


def _divide(a: float, b: float) -> float:
    exact = isinstance(a, int) and isinstance(b, int) and a % b == 0  # 10**30 / 10 as floats would lose the last digits
    return a // b if exact else a / b


def _power(base: float, exponent: float) -> float:
    if base < 0 and exponent != int(exponent):
        raise ValueError("a negative number to the power of a fraction is not a real number")
    if abs(base) > 1 and exponent * math.log10(abs(base)) > 300:  # asked before: 9**9**9 has 370 million digits
        raise OverflowError
    return base**exponent


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _divide}
_OPERATIONS |= {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power}


# ---- tool: search ----------------------------------------------------------------------------------------


class Search:
    """Full text search over a few documents: SQLite FTS5 in memory, ranked by BM25.

    >>> Search(["The Elbe is a river.", "Mount Etna is high."]).search("which river?")
    'The Elbe is a river.'
    """

    def __init__(self, documents: Sequence[str], top: int = 3):
        # Tools run in threads, each time another one; the lock is what makes sharing the connection safe.
        self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()
        self._top = top
        self._documents = [" ".join(document.split()) for document in documents]
        self._db.execute("PRAGMA journal_mode = off")
        self._db.execute("CREATE VIRTUAL TABLE docs USING fts5(body, content='')")  # the words only: the text stays here
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO docs (rowid, body) VALUES (?, ?)", enumerate(self._documents))
        self._db.execute("COMMIT")

    def __del__(self):
        self._db.close()

    def search(self, query: str) -> str:
        """Search the documents.

        Args:
            query: Words to look for. Documents with more, and rarer, of them come first.

        Returns:
            The best documents, one per line.
        """
        # Words, quoted and joined by OR: all else is FTS5 syntax to a hostile query. Bounded, for it may be a megabyte.
        words = dict.fromkeys(re.findall(r"\w+", query[:5000].lower()))
        match = " OR ".join(f'"{word}"' for word in list(words)[:64])
        with self._lock:
            ranked = "SELECT rowid FROM docs WHERE docs MATCH ? ORDER BY bm25(docs), rowid LIMIT ?"
            rows = self._db.execute(ranked, (match, self._top)).fetchall() if match else []
        return "\n".join(self._documents[row] for (row,) in rows) or "no document matches"


# ---- tool: python ----------------------------------------------------------------------------------------

_SECONDS = 5  # of processor time, for each process of a program
# By the clock, for a whole one: more, for it shares the processor; run_calls may end it earlier.
_WALL_SECONDS = 8
_OUTPUT = 100_000  # bytes
_SCRATCH = 64 * 2**20  # bytes, held in memory
# Of each process, but for NPROC: that counts the processes and threads of a whole call, two of which are not the program's children.
_LIMITS = {"CPU": _SECONDS, "AS": 512 * 2**20, "FSIZE": 16 * 2**20, "NOFILE": 64, "NPROC": 8, "CORE": 0, "MSGQUEUE": 0}
# How many programs run at once, from whatever event loop. With more, all of them would be late.
_SANDBOXES = ThreadPoolExecutor(os.cpu_count() or 1, "sandbox")


async def python(code: str) -> str:
    """Run a Python program with the standard library, for at most 5 seconds. What it prints comes back. Each run starts afresh.

    Args:
        code: The program; print what you want to know.

    Returns:
        What was printed.

    Raises:
        ChildProcessError: The program failed or was stopped; with the last ten lines it wrote, such as those of an exception.
        RuntimeError: There is no sandbox here. The program was not run.

    The program is a process of its own, in a sandbox that bubblewrap builds anew for each call, also when we are root. It cannot
    read or write files other than those of the system's Python (read only) and a scratch folder, see or signal other processes,
    reach a network or a socket, read our environment, gain rights, take more time, memory, processes or disk than the limits
    above, or outlive the call, however that ends. As many programs run at once as there are
    processors. The others wait for their turn: their time limits begin when they start.

    Not kept from it: bugs of the kernel or of bubblewrap, and what processor caches give away; 8 processes that each take their
    share of time and memory (4 GB in all) and, for a moment, more inside the kernel, for many small files say (only a cgroup
    would bound that); reading what lies under /usr/lib. And what it prints is untrusted, like all text of the world.
    """
    loop, turn, stop = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def run() -> tuple[bytes, int]:
        loop.call_soon_threadsafe(turn.set)  # raises if the loop is closed: nobody waits any more
        return _run_program(code, stop)

    job = _SANDBOXES.submit(run)
    ended = asyncio.wrap_future(job)
    try:
        with untimed():
            await turn.wait()
        await asyncio.wait({ended})
    except asyncio.CancelledError:
        stop.set()
        # If it has begun, wait until nothing is left of it, even when we are cancelled once more.
        while not job.cancel() and not ended.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({ended})
        raise
    return _report(*ended.result())


def _run_program(code: str, stop: threading.Event) -> tuple[bytes, int]:
    """Run a program until it ends or `stop` is set: what it wrote, and its exit code.

    This blocks its thread. When it returns, nothing is left of the program.
    """
    process, printed = _start_sandbox(code), bytearray()
    try:
        while len(printed) <= _OUTPUT and not stop.is_set():
            if _readable(process.stdout, seconds=0.05):
                block = os.read(process.stdout.fileno(), 2**16)
                if not block:
                    break
                printed += block
    finally:
        with contextlib.suppress(BrokenPipeError):  # it has ended
            process.stdin.write(b"end")
        # Until nobody holds the other end: then all that was inside is gone.
        while _readable(process.stdout, seconds=10) and os.read(process.stdout.fileno(), 2**16):
            pass
        process.kill()  # nobody, unless bubblewrap itself hangs
        status = process.wait()
        process.stdin.close()
        process.stdout.close()
    return bytes(printed), status


def _readable(pipe: BinaryIO, seconds: float) -> bool:
    """Wait until there is something to read, or nobody holds the other end."""
    poll = select.poll()  # not select.select, which refuses descriptors above 1023
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _report(printed: bytes, status: int) -> str:
    """What a program printed. Raises if it failed."""
    text = printed[:_OUTPUT].decode("utf-8", "replace")
    if len(printed) > _OUTPUT:
        why = f"stopped, for it wrote more than {_OUTPUT:,} bytes"
    elif status == 0:
        return text or "(nothing was printed)"
    elif text.startswith(("bwrap: ", "setpriv: ")):
        raise RuntimeError(f"no sandbox can be built here (bubblewrap needs user namespaces), so the program was not run: {text}")
    elif status == 124:
        why = f"stopped after {_WALL_SECONDS} s"
    elif status == 128 + signal.SIGKILL:
        why = f"killed, as a program is after {_SECONDS} s of processor time"
    else:
        why = f"exit code {status}"
    raise ChildProcessError(f"{why}. It wrote: " + ("\n".join(text.splitlines()[-10:]) or "nothing"))


def _start_sandbox(code: str) -> subprocess.Popen:
    """Not asyncio's: cancelled while it starts, that one kills bubblewrap, whose inner half then sleeps for ever."""
    programs = [shutil.which(name) for name in ("bwrap", "setpriv")]
    # Not the Python we run on: it may lie in somebody's home, where the user that the program becomes must not read.
    programs.append(shutil.which("python3", path="/usr/bin:/usr/local/bin"))
    if None in programs or platform.machine() not in _MACHINES:
        raise RuntimeError("model-written code runs in a sandbox only, and there is none here; the program was not run. "
                           f"On Debian ({' or '.join(_MACHINES)}): apt-get install bubblewrap python3 util-linux")
    with _nameless(code.encode("utf-8", "replace")) as program, _nameless(_forbid()) as rules:
        files = program.fileno(), rules.fileno()
        return subprocess.Popen(_sandboxed(*programs, *files), bufsize=0, cwd="/", pass_fds=files, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _nameless(content: bytes) -> BinaryIO:
    """An open file in memory, for a child process that is told its number."""
    file = open(os.memfd_create("nameless"), "w+b")
    file.write(content)
    file.seek(0)
    return file


def _supervise(limits: dict[str, int], seconds: float) -> None:
    """Process 1 of the sandbox: with it the kernel ends all others, and the one that waits for it outside learns of it after that.

    Killing from outside would leave a moment in which something inside lives on. This is run there, so it imports for itself.
    """
    import os
    import resource
    import select
    import sys

    program = os.fork()
    if program == 0:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", "-X", "utf8", "/code.py"])
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([0, ended], [], [], seconds)  # 0: we are told to end, or nobody is left to tell us
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) if ended in ready else 124  # as timeout(1) has it
    os._exit(code if code >= 0 else 128 - code)  # as shells have it


def _sandboxed(bwrap: str, setpriv: str, python: str, program: int, rules: int) -> list[str]:
    """The command that runs the open file `program` under the seccomp `rules`."""
    python = os.path.realpath(python)
    libraries = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache")
    return [
        # The kernel exempts root from the limit on processes, whatever it is called inside: let it be nobody, outside too.
        *([setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []),
        bwrap,
        "--unshare-all",  # processes, network, IPC, host name, cgroups of its own
        "--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns",  # nobody, who cannot become root of a new namespace
        "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv",
        "--new-session",  # no terminal to type into
        "--as-pid-1",  # see _supervise, which also ends when we are killed
        "--seccomp", str(rules),
        # The root is empty: no /proc, no /sys, no home, not a shell. Scratch comes first, for the rest may lie below it.
        "--size", str(_SCRATCH), "--tmpfs", "/tmp", "--chdir", "/tmp",
        *(part for path in libraries for part in ("--ro-bind-try", path, path)),
        "--ro-bind", python, python, "--dev-bind", "/dev/null", "/dev/null",
        "--perms", "0444", "--ro-bind-data", str(program), "/code.py",
        "--remount-ro", "/",  # it is a file system in memory as well, without a size
        python, "-I", "-S", "-B", "-c",
        inspect.getsource(_supervise) + f"_supervise({_LIMITS}, {_WALL_SECONDS})",
    ]  # fmt: skip


_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What namespaces and limits do not cover, by number on x86_64 and aarch64: sockets to a hypervisor; memory that belongs to no process;
# other processes' memory, and their share of the processor (process 1 must get its own to end a call); the keys of our session; and
# large parts of the kernel that no such program needs.
_FORBIDDEN = {
    "socket": (41, 198), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}  # fmt: skip


def _forbid() -> bytes:
    """A seccomp filter, as instructions of the kernel's packet filter: these system calls fail with "Operation not permitted"."""
    machine = list(_MACHINES).index(platform.machine())
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # an instruction: code, lines to skip if true, if false, value
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, _MACHINES[platform.machine()]), (give, 0, 0, kill)]  # 32-bit calls have other numbers
    lines += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # and so have those of x32
    for numbers in _FORBIDDEN.values():
        lines += [(equal, 0, 1, numbers[machine]), (give, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, (give, 0, 0, allow)])


# ---- demo ------------------------------------------------------------------------------------------------


def _demo() -> None:
    def slow() -> str:
        """Never come back."""
        threading.Event().wait()

    tools = {"calculator": calculator, "slow": slow, **tools_of(Search(["Paris is in France.", "Rome is in Italy."]))}
    print("A tool, described:\n" + json.dumps(schema(calculator), indent=2))
    calls = [format_call("calculator", expression="2**100"), format_call("search", query="where is Rome?")]
    calls += [format_call("slow"), format_call("calculator", expression="9**9**9")]
    calls += [format_call("calculator", expression=1), "<tool_call>\n{oops}\n</tool_call>"]
    text = "<think>Let me see.</think>I will call my tools.\n" + "\n".join(calls)
    print(f"\nA message, as a model might write it:\n{text}")
    message = parse(text, tools)
    print(f"\nIts thinking: {message.thinking!r}\nIts text: {message.text!r}\nIts calls, and what came of each:")
    for call, observation in zip(message.calls, asyncio.run(run_calls(message.calls, tools, timeout=0.2))):
        print(f"  {call}\n    -> {observation.text!r}")


if __name__ == "__main__":
    _demo()
