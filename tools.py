"""Functions as tools: describe them to a model, read the calls it writes, run them under limits.

    schema     a function with type hints and a docstring -> the JSON description of a tool
    tools_of   an object, such as an environment -> its public methods, as tools
    parse      the text of a sampled message -> its thinking, its text and its calls
    run_calls  calls -> observations: text that the policy reads next

The idea: a policy that explores writes broken calls, so *nothing it writes may raise*. What is
wrong with a call becomes its observation, and says how to write it right. The episode goes on, and
the policy can learn from it. `plain_run` shows this in a few lines. All else here is for the many
ways in which a call can go wrong. Two tools stand at the end: `calculator` and `python`.

A time limit here abandons a thread. It cannot kill one, and the thread may still change what it
holds. A tool that may hang for ever belongs in a child process, as `python` shows. An `async def`
tool must await, not block.

Threads share one interpreter, and only one of them runs Python at a time (the GIL). A single call
into C may keep it for hours: `re.search("(a+)+$", "a" * 40 + "b")` does. Then nothing else runs,
and nobody notices that the call's time is over. So a tool that matches a pattern which the policy
wrote belongs in a child process, too.

agent.py uses this file. `python tools.py` shows a message and what comes of its calls. To use the
file elsewhere, copy it alone: it needs the standard library and one helper of transformers.
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
import re
import select
import shutil
import signal
import struct
import subprocess
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from transformers.utils import get_json_schema

# --------------------------------------------------------------------------------------------------
# The idea


def plain_run(text: str, tools: Mapping[str, Callable]) -> list[str]:
    """Run the calls in a message. Each gives one observation, also if it is broken.

    >>> good = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
    >>> plain_run(good + "<tool_call>oops</tool_call>", {"calculator": calculator})
    ['42', 'error: JSONDecodeError: Expecting value: line 1 column 1 (char 0)']
    """
    observations = []
    for block in re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL):
        try:
            call = json.loads(block)
            observations.append(str(tools[call["name"]](**call["arguments"])))
        except Exception as error:
            observations.append(f"error: {type(error).__name__}: {error}")
    return observations


# ==================================================================================================
# The same for a policy that tries everything: calls in its thoughts, unclosed tags, wrong types,
# tools that hang, flood or exit. On a well-formed message both say the same (a test compares them).
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Describe


def schema(function: Callable) -> dict:
    """The description of a tool, in the form that chat templates and APIs take.

    Raises if a type hint or a docstring is missing.

    >>> schema(calculator)["function"]["parameters"]["required"]
    ['expression']
    """
    # Cached by the function of a bound method. By the method, each environment would stay alive.
    return copy.deepcopy(_schema(getattr(function, "__func__", function)))


@functools.lru_cache(maxsize=1024)
def _schema(function: Callable) -> dict:
    described = get_json_schema(function)
    described["function"].pop("return", None)  # APIs refuse this key
    return described


def tools_of(obj: object,
             reserved: Sequence[str] = ("reset", "get_reward")) -> dict[str, Callable]:
    """The public methods of an object, base classes first, in the order of their definition.

    >>> class Shop:
    ...     def price(self): ...
    ...     def _secret(self): ...
    >>> list(tools_of(Shop()))
    ['price']
    """
    methods = {}
    for cls in reversed(type(obj).__mro__[:-1]):  # the last class is `object`
        for name in vars(cls):
            if not name.startswith("_") and name not in reserved and _is_method(type(obj), name):
                methods[name] = getattr(obj, name)
    return methods


def _is_method(cls: type, name: str) -> bool:
    # Asked of the class: on the object a property would run.
    kind = type(inspect.getattr_static(cls, name))
    return kind in (types.FunctionType, staticmethod, classmethod)


# --------------------------------------------------------------------------------------------------
# Read a message


@dataclass
class Call:
    """A call that may be run: its tool exists and its arguments fit the tool's schema."""

    name: str  # of the tool
    arguments: dict[str, Any]  # by name, as JSON gave them


@dataclass
class CallError:
    """A call that must not be run. It keeps its place among the calls."""

    message: str  # what is wrong and how to write it right, for the policy to read


@dataclass
class Message:
    """A sampled message, taken apart to act on. Its ids, which are trained, stay as they are."""

    thinking: str  # inside <think>: never executed, and no part of an answer
    text: str  # outside <think> and <tool_call>, stripped
    calls: list[Call | CallError]  # in the order written, the broken ones among them


def format_call(name: str, **arguments: Any) -> str:
    """A call as Qwen, Hermes and many others write it. `parse` reads it back.

    >>> print(format_call("search", query="rivers"))
    <tool_call>
    {"name": "search", "arguments": {"query": "rivers"}}
    </tool_call>
    """
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    # A tag inside an argument would end the block early. JSON may write "/" as "\/".
    for tag in ("tool_call>", "think>"):
        text = text.replace("</" + tag, "<\\/" + tag).replace("<" + tag, "\\u003c" + tag)
    return f"<tool_call>\n{text}\n</tool_call>"


def parse(text: str, tools: Mapping[str, Callable] | Sequence[dict]) -> Message:
    """Take a sampled message apart. Never raises; the time is linear in the length of the text.

    `tools` is what `tools_of` gives, or a list of schemas. An unclosed <think> or <tool_call>
    reaches to the end of the text. A </think> without a <think> closes one that the prompt opened,
    as Qwen's does. A call inside <think> is no call.

    >>> text = "<think>7*6?</think>So: " + format_call("calculator", expression="7*6")
    >>> message = parse(text, [schema(calculator)])
    >>> message.thinking, message.text, message.calls
    ('7*6?', 'So:', [Call(name='calculator', arguments={'expression': '7*6'})])
    >>> text = format_call("calculator", expression=42)
    >>> print(parse(text, {"calculator": calculator}).calls[0].message)
    argument "expression" of "calculator" must be string, not 42. Its arguments: expression (string)
    """
    schemas = map(schema, tools.values()) if isinstance(tools, Mapping) else tools
    functions = [tool["function"] for tool in schemas]
    parameters = {function["name"]: function.get("parameters", {}) for function in functions}
    parts = _split(text)
    calls = [_read_call(block.strip(), parameters) for block in parts.blocks]
    if parts.unclosed:
        calls[-1] = CallError("<tool_call> was opened but never closed: "
                              "end the call with </tool_call>")
    return Message("\n".join(parts.thoughts).strip(), parts.outside.strip(), calls)


@dataclass
class _Parts:
    thoughts: list[str]  # the inside of each <think>
    outside: str
    blocks: list[str]  # the inside of each <tool_call>
    unclosed: bool  # was the last <tool_call> left open?


def _split(text: str) -> _Parts:
    """Cut a message at its tags.

    >>> _split("<think>a<tool_call></think>b<tool_call>c</tool_call>d<tool_call>e")
    _Parts(thoughts=['a<tool_call>'], outside='bd', blocks=['c', 'e'], unclosed=True)
    """
    head, close, tail = text.partition("</think>")
    thoughts, outside, blocks = [], [], []
    if close and "<think>" not in head:  # the prompt opened it
        thoughts, text = [[head]], tail
    here, end = outside, ""
    # One pass over all tags. To search for the next tag at each step would take quadratic time.
    for piece in re.split("(</?think>|</?tool_call>)", text):
        if here is outside and piece == "<think>":
            here, end = [], "</think>"
            thoughts.append(here)
        elif here is outside and piece == "<tool_call>":
            here, end = [], "</tool_call>"
            blocks.append(here)
        elif piece == end:
            here, end = outside, ""
        else:
            here.append(piece)
    return _Parts(["".join(thought) for thought in thoughts], "".join(outside),
                  ["".join(block) for block in blocks], end == "</tool_call>")


_FORM = 'Write {"name": ..., "arguments": {...}}'


class _Wrong(ValueError):
    """What is wrong with a call, and how to write it right."""


def _read_call(block: str, parameters: dict[str, dict]) -> Call | CallError:
    try:
        # Python also reads NaN, Infinity, 1e999 and a key given twice. Each would be a guess.
        found = json.loads(block, parse_constant=_finite, parse_float=_finite,
                           object_pairs_hook=_no_key_twice)
        return _check_call(found, parameters)
    except json.JSONDecodeError as error:
        near = _show(block[max(error.pos - 10, 0) : error.pos + 10])
        hint = "End each call with </tool_call>" if "<tool_call>" in block else _FORM
        return CallError(f"not valid JSON: {error.msg} at character {error.pos}, near {near}. "
                         f"{hint}")
    except RecursionError:
        return CallError("the JSON of the call is nested too deeply")
    except ValueError as error:  # a _Wrong, or a number of thousands of digits
        return CallError(str(error))


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise _Wrong(f"{number[:40]} is not a number in JSON: write a finite one, or a string")
    return float(number)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    counts = collections.Counter(key for key, _ in pairs)
    for key, count in counts.items():
        if count > 1:
            raise _Wrong(f"the key {_show(key)} stands twice in one object: give it once")
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
        names = ", ".join(parameters) or "none"
        raise _Wrong(f"there is no tool {_show(name)}. The tools: {names}")
    if not isinstance(arguments, dict):
        raise _Wrong(f'"arguments" of "{name}" must be a JSON object, not {_show(arguments)}')
    _check_arguments(name, arguments, parameters[name])
    return Call(name, arguments)


def _check_arguments(name: str, arguments: dict, parameters: dict) -> None:
    specs = parameters.get("properties", {})
    usage = ", ".join(f"{key} ({_kind(spec)})" for key, spec in specs.items())
    usage = f"Its arguments: {usage or 'none'}"
    for key in parameters.get("required", []):
        if key not in arguments:
            raise _Wrong(f'"{name}" needs the argument "{key}". {usage}')
    for key, value in arguments.items():
        if key not in specs:
            raise _Wrong(f'"{name}" has no argument {_show(key)}. {usage}')
        wrong = _misfit(value, specs[key], f'argument "{key}" of "{name}"')
        if wrong:
            raise _Wrong(f"{wrong}. {usage}")


_TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list,
          "object": dict, "null": type(None)}


def _misfit(value: Any, spec: dict, what: str) -> str:
    """What is wrong with a value, or "": the part of JSON schema that type hints can express."""
    if value is None and spec.get("nullable"):
        return ""
    if not _fits(value, spec):
        return f"{what} must be {_kind(spec)}, not {_show(value)}"
    if isinstance(value, list) and "items" in spec:
        for place, item in enumerate(value):
            wrong = _misfit(item, spec["items"], f"item {place} of {what}")
            if wrong:
                return wrong
    return ""


def _fits(value: Any, spec: dict) -> bool:
    kinds = _kinds(spec)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return False
    # True == 1 in Python, so the type is compared too.
    if "enum" in spec and (type(value), value) not in [(type(one), one) for one in spec["enum"]]:
        return False
    return "anyOf" not in spec or any(not _misfit(value, one, "") for one in spec["anyOf"])


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("integer", "number"):  # an int in Python, not in JSON
        return False
    return isinstance(value, _TYPES.get(kind, object))


def _kinds(spec: dict) -> list[str]:
    kinds = spec.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def _kind(spec: dict) -> str:
    """A schema in words: 'integer', 'array of string or null', 'one of "a", "b"'."""
    if "enum" in spec:
        words = "one of " + ", ".join(map(_show, spec["enum"]))
    elif "anyOf" in spec:
        words = " or ".join(map(_kind, spec["anyOf"]))
    else:
        words = " or ".join(_kinds(spec)) or "anything"
    if "items" in spec:
        words += f" of {_kind(spec['items'])}"
    return words + " or null" if spec.get("nullable") else words


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."


# --------------------------------------------------------------------------------------------------
# Run calls


@dataclass
class Observation:
    """What one call gave, for the policy to read."""

    text: str  # clipped and valid UTF-8. Untrusted: agent.py lets no control token come of it
    error: bool  # nothing useful was done. Not: "the answer is wrong"


async def run_calls(calls: Sequence[Call | CallError], tools: Mapping[str, Callable], *,
                    timeout: float = 10.0, max_chars: int = 2000,
                    max_calls: int = 16) -> list[Observation]:
    """Run the calls of one message at once. One observation for each call, in call order.

    Whatever a tool does, only its own call is affected. An exception (SystemExit too) is an error
    observation. A call that takes more than `timeout` seconds is abandoned. A text over `max_chars`
    loses its middle. Calls after the first `max_calls` do not run. Plain methods of one object take
    turns in call order: two moves in a maze must not race. Raises only when it is cancelled itself,
    or at Ctrl-C.

    >>> good, bad = Call("calculator", {"expression": "6*7"}), CallError("not JSON")
    >>> observations = asyncio.run(run_calls([good, bad], {"calculator": calculator}))
    >>> [observation.text for observation in observations]
    ['42', 'error: not JSON']
    """
    turns = collections.defaultdict(asyncio.Lock)  # first come, first served

    async def run(call: Call | CallError) -> Observation:
        if isinstance(call, CallError):
            return _failed(call.message)
        if call.name not in tools:
            return _failed("there is no such tool")
        function = tools[call.name]
        if inspect.iscoroutinefunction(function):
            start = functools.partial(_start_task, function, call.arguments)
            return await _limit(call.name, timeout, start)
        work = functools.partial(_observe, functools.partial(function, **call.arguments))
        async with turns[id(getattr(function, "__self__", call))]:
            return await _limit(call.name, timeout, functools.partial(in_thread, work))

    too_many = CallError(f"only the first {max_calls} calls of a message are run")
    calls = [*calls[:max_calls], *[too_many] * len(calls[max_calls:])]
    observations = await asyncio.gather(*map(run, calls))
    return [Observation(clip(seen.text, max_chars), seen.error) for seen in observations]


# The time limit of the call that runs here.
_clock: contextvars.ContextVar[asyncio.Timeout] = contextvars.ContextVar("clock")


async def _limit(name: str, timeout: float, start: Callable[[], asyncio.Future]) -> Observation:
    """The result of a call, if it comes in time."""
    future = None
    try:
        async with asyncio.timeout(timeout) as clock:
            _clock.set(clock)  # before the start: a task takes over the variables of this moment
            future = start()
            # Not `await future`: it waits for ever for a task that swallows its cancellation.
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
    """For an `async def` tool that waits for its turn: `with untimed(): await turn`.

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


def _start_task(function: Callable, arguments: dict) -> asyncio.Task:
    return asyncio.ensure_future(_await(function, arguments))


async def _await(function: Callable, arguments: dict) -> Observation:
    try:
        result = await function(**arguments)
    except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        raise  # meant for the event loop, in whose thread this is
    except BaseException as error:  # a SystemExit would end the loop, and every other episode
        return _failed(error)
    # In a thread: a __str__ that hangs would stop the loop.
    return await in_thread(lambda: _observe(lambda: result))


def _observe(produce: Callable[[], Any]) -> Observation:
    """What `produce` returns or raises. For a thread of its own."""
    try:
        return Observation(_as_text(produce()), error=False)
    except BaseException as error:  # sys.exit() too: this thread is the tool's
        return _failed(error)


def in_thread(function: Callable[[], Any]) -> asyncio.Future:
    """Run `function` in a new thread. The future gets what it returns, or the Exception it raises.

    Not a pool: a thread that hangs for ever would be missed there, and Python waits for pools and
    for other threads at its exit. It does not wait for these.
    """
    loop = asyncio.get_running_loop()
    future, process = loop.create_future(), os.getpid()

    def work() -> None:
        result = error = None
        try:
            result = function()
        except Exception as e:
            error = e
        if os.getpid() != process:  # the function has forked us: the copy ends here
            os._exit(0)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_deliver, future, result, error)

    try:
        # Not threading.Thread: its start waits until the thread runs.
        _thread.start_new_thread(work, ())
    except RuntimeError as error:  # the system gives no more: abandoned threads may hold them all
        future.set_exception(error)
    return future


def _deliver(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # the call was abandoned
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _as_text(result: Any) -> str:
    """Text as it is, None as "done", bytes decoded, else JSON, else `str`. May raise."""
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
    """An error observation of one line, whatever the exception says."""
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
        mark = f" [... {len(text) - max_chars:,} characters cut ...] "
        text = text[: max_chars - tail] + mark + text[len(text) - tail :]
    # A policy can write "\ud800" in JSON, which is half a character: no tokenizer takes it.
    return text.encode("utf-8", "replace").decode("utf-8")


# --------------------------------------------------------------------------------------------------
# Tool: calculator

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
        raise ValueError(f"the expression has {len(expression):,} characters, more than 500: "
                         "work it out in parts")
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (RecursionError, MemoryError):  # MemoryError is how the parser says it
        raise ValueError("the expression is nested too deeply") from None
    except OverflowError:
        raise ValueError("a number is too large: the limit is 10**300") from None
    except SyntaxError as error:
        raise ValueError(f"not an arithmetic expression ({error.msg}): "
                         f"{expression[:60]!r}") from None
    if isinstance(value, float):
        is_exact = value.is_integer() and abs(value) < 2**53
        return str(int(value)) if is_exact else f"{value:.12g}"
    return str(value)


def _evaluate(node: ast.AST) -> float:
    """Computes the kinds of nodes below and refuses all others."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _evaluate(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    else:
        raise ValueError("only numbers, + - * / // % ** and parentheses are allowed, "
                         f"not {ast.unparse(node)[:40]!r}")
    if not abs(value) < _LIMIT:
        raise OverflowError
    return value


def _divide(a: float, b: float) -> float:
    # 10**30 / 10 as floats would lose the last digits.
    exact = isinstance(a, int) and isinstance(b, int) and a % b == 0
    return a // b if exact else a / b


def _power(base: float, exponent: float) -> float:
    if base < 0 and exponent != int(exponent):
        raise ValueError("a negative number to the power of a fraction is not a real number")
    # Asked before it is computed: 9**9**9 has 370 million digits.
    if abs(base) > 1 and exponent * math.log10(abs(base)) > 300:
        raise OverflowError
    return base**exponent


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
               ast.Div: _divide, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
               ast.Pow: _power}


# --------------------------------------------------------------------------------------------------
# Tool: python

_SECONDS = 5  # of processor time, for each process of a program
# By the clock, for a whole program: more, for it shares the cores. run_calls may end it earlier.
_WALL_SECONDS = 8
_OUTPUT = 100_000  # bytes
_SCRATCH = 64 * 2**20  # bytes, held in memory
# Of each process. But NPROC counts the processes and threads of a whole call, two of which are not
# the program's.
_LIMITS = {"CPU": _SECONDS, "AS": 512 * 2**20, "FSIZE": 16 * 2**20, "NOFILE": 64, "NPROC": 8,
           "CORE": 0, "MSGQUEUE": 0}


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# As many programs run at once, from whatever event loop. With more, all of them would be late.
_SANDBOXES = ThreadPoolExecutor(cores(), "sandbox")


async def python(code: str) -> str:
    """Run a Python program with the standard library, for at most 5 seconds. What it prints comes
    back. Each run starts afresh.

    Args:
        code: The program; print what you want to know.

    Returns:
        What was printed.

    Raises:
        ChildProcessError: The program failed or was stopped; with the last ten lines it wrote.
        RuntimeError: There is no sandbox here. The program was not run.

    The program is a process of its own, in a sandbox that bubblewrap builds anew for each call. It
    cannot read or write files other than those of the system's Python (read only) and a scratch
    folder. It cannot see or signal other processes, reach a network or a socket, read our
    environment, gain rights, take more time, memory, processes or disk than the limits above, or
    outlive the call. As many programs run at once as there are cores. The others wait for their
    turn: their time limits begin when they start. Limits: 5 seconds of processor time for each
    process, 8 seconds by the clock for all.

    Not prevented: bugs of the kernel or of bubblewrap, and what processor caches give away; 8
    processes that each take their share of time and memory (4 GB in all); for a moment, more inside
    the kernel, for many small files say; reading what lies under /usr/lib. What it prints is
    untrusted, like all text of an environment.
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
    """Run a program until it ends or `stop` is set. Returns what it wrote, and its exit code.

    Blocks its thread. When it returns, nothing is left of the program.
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
        raise RuntimeError("no sandbox can be built here (bubblewrap needs user namespaces), "
                           f"so the program was not run: {text}")
    elif status == 124:
        why = f"stopped after {_WALL_SECONDS} s"
    elif status == 128 + signal.SIGKILL:
        why = f"killed, as a program is after {_SECONDS} s of processor time"
    else:
        why = f"exit code {status}"
    last_lines = "\n".join(text.splitlines()[-10:])
    raise ChildProcessError(f"{why}. It wrote: {last_lines or 'nothing'}")


def _start_sandbox(code: str) -> subprocess.Popen:
    # Not asyncio's: when that is cancelled at the start, it kills bubblewrap, whose inner half then
    # sleeps for ever.
    programs = [shutil.which(name) for name in ("bwrap", "setpriv")]
    # Not the Python we run on: it may lie in somebody's home, which the program must not read.
    programs.append(shutil.which("python3", path="/usr/bin:/usr/local/bin"))
    if None in programs or platform.machine() not in _MACHINES:
        raise RuntimeError("model-written code runs in a sandbox only, and there is none here; "
                           "the program was not run. "
                           f"On Debian ({' or '.join(_MACHINES)}): apt-get install bubblewrap "
                           "python3 util-linux")
    with _nameless(code.encode("utf-8", "replace")) as program, _nameless(_forbid()) as rules:
        files = program.fileno(), rules.fileno()
        return subprocess.Popen(_sandboxed(*programs, *files), bufsize=0, cwd="/", pass_fds=files,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)


def _nameless(content: bytes) -> BinaryIO:
    """An open file in memory, for a child process that is told its number."""
    file = open(os.memfd_create("nameless"), "w+b")
    file.write(content)
    file.seek(0)
    return file


def _supervise(limits: dict[str, int], seconds: float) -> None:
    """Process 1 of the sandbox: when it ends, the kernel ends all others, and then tells us.

    Killing from outside would leave a moment in which something inside lives on. This function runs
    there, from its source, so it imports for itself.
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
    # 0: we are told to end, or nobody is left to tell us
    ready, _, _ = select.select([0, ended], [], [], seconds)
    code = 124  # as timeout(1) has it
    if ended in ready:
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    os._exit(code if code >= 0 else 128 - code)  # as shells have it


def _sandboxed(bwrap: str, setpriv: str, python: str, program: int, rules: int) -> list[str]:
    """The command that runs the open file `program` under the seccomp `rules`."""
    python = os.path.realpath(python)
    as_nobody, libraries = [], []
    if os.geteuid() == 0:  # the kernel exempts root from the limit on processes
        as_nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    for path in ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache"):
        libraries += ["--ro-bind-try", path, path]
    return [
        *as_nobody,
        bwrap,
        "--unshare-all",  # processes, network, IPC, host name, cgroups of its own
        # Nobody, who cannot become root of a new namespace.
        "--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns",
        "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv",
        "--new-session",  # no terminal to type into
        "--as-pid-1",  # see _supervise, which also ends when we are killed
        "--seccomp", str(rules),
        # The root is empty: no /proc, no /sys, no home, not a shell. Scratch comes first, for the
        # rest may lie below it.
        "--size", str(_SCRATCH), "--tmpfs", "/tmp", "--chdir", "/tmp",
        *libraries,
        "--ro-bind", python, python, "--dev-bind", "/dev/null", "/dev/null",
        "--perms", "0444", "--ro-bind-data", str(program), "/code.py",
        "--remount-ro", "/",  # it is a file system in memory as well, without a size
        python, "-I", "-S", "-B", "-c",
        inspect.getsource(_supervise) + f"_supervise({_LIMITS}, {_WALL_SECONDS})",
    ]  # fmt: skip


# The audit numbers of machines that the filter below knows.
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# System calls that namespaces and limits do not cover: their numbers on x86_64 and on aarch64.
_FORBIDDEN = {
    # sockets: some reach the hypervisor
    "socket": (41, 198),
    # memory that belongs to no process, so no limit holds
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # other processes of the call: process 1 must stay able to end them
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "setpriority": (141, 140), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    # the keys of our session
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # large parts of the kernel that no such program needs
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}
# Instructions of the kernel's packet filter, and what the filter may answer (seccomp(2)).
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
_CALL_NUMBER, _MACHINE = 0, 4  # where they stand in what the filter is given


def _forbid() -> bytes:
    """A seccomp filter: the forbidden calls fail with "Operation not permitted".

    An instruction is (code, instructions to skip if true, if false, value).
    """
    machine = platform.machine()
    column = list(_MACHINES).index(machine)
    program = [
        # 32-bit calls, and those of x32, have other numbers: a program that tries them is killed.
        (_LOAD, 0, 0, _MACHINE), (_IF_EQUAL, 1, 0, _MACHINES[machine]), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _CALL_NUMBER), (_IF_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL),
    ]
    for numbers in _FORBIDDEN.values():
        program += [(_IF_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _REFUSE)]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# --------------------------------------------------------------------------------------------------
# python tools.py


def _demo() -> None:
    def slow() -> str:
        """Never come back."""
        threading.Event().wait()

    tools = {"calculator": calculator, "slow": slow}
    print("A tool, described:\n" + json.dumps(schema(calculator), indent=2))
    calls = [format_call("calculator", expression="2**100"), format_call("slow"),
             format_call("calculator", expression="9**9**9"),
             format_call("calculator", expression=1), "<tool_call>\n{oops}\n</tool_call>"]
    text = "<think>Let me see.</think>I will call my tools.\n" + "\n".join(calls)
    print(f"\nA message, as a model might write it:\n{text}")
    message = parse(text, tools)
    print(f"\nIts thinking: {message.thinking!r}\nIts text: {message.text!r}")
    print("Its calls, and what came of each:")
    observations = asyncio.run(run_calls(message.calls, tools, timeout=0.2))
    for call, observation in zip(message.calls, observations):
        print(f"  {call}\n    -> {observation.text!r}")


if __name__ == "__main__":
    _demo()
