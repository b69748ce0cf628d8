"""Functions as tools: describe them to a model, read the calls it writes, run them under limits.

    schema         a function with type hints and a docstring -> the JSON description in the prompt
    tools_of       an object, such as an environment -> its public methods, as tools
    parse          the text of a sampled message -> its thinking, its text and its calls
    run_calls      calls -> observations: text that agent.py appends for the policy to read
    as_function    a tool of LangChain or smolagents -> a function, which all of these take

The idea to take away: a policy that explores writes broken calls, so *nothing it writes may raise*.
What is wrong with a call, and how to write it right, becomes an observation. The episode goes on,
and the policy can learn from it. `plain_run` shows this in a few lines. Below the line of ==== is
the version that survives a policy in training, and a first tool, `calculator`. Stop at the words
"That is all": what follows are tools of other libraries, and a sandbox for programs (`python`).

Limits: Python cannot kill a thread. A tool that takes too long is abandoned, and its thread runs
on. Only one thread runs Python at a time (the GIL). One call into C may hold the GIL, and then no
time limit works: `re.search("(a+)+$", "a" * 40 + "b")` stops the whole process for hours. So a tool
that matches patterns of the policy, or that may crash, belongs in a child process. `python` shows
how. An `async def` tool must await, not block.

Run it alone: `python tools.py`. Copy it alone: it needs the standard library and one helper of
transformers.
"""

import _thread
import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
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
import struct
import subprocess
import threading
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, Union

from transformers.utils import get_json_schema

# --------------------------------------------------------------------------------------------------
# The idea, in plain code


def schema(function: Callable) -> dict:
    """The description of a tool, in the form that chat templates and APIs take.

    The tool is a function. (`as_function`, further down, also takes tools of other libraries.)
    Raises what `get_json_schema` raises if a type hint or a docstring is missing.

    >>> schema(calculator)["function"]["parameters"]["required"]
    ['expression']
    """
    described = get_json_schema(as_function(function))
    described["function"].pop("return", None)  # APIs refuse this key
    return described


def plain_run(text: str, tools: Mapping[str, Callable]) -> list[str]:
    """Find the calls in a message, run them one by one, and answer each with a text.

    The prompt has shown the policy the `schema` of each tool, so it writes calls like this one:

    >>> message = format_call("calculator", expression="6*7")
    >>> print(message)
    <tool_call>
    {"name": "calculator", "arguments": {"expression": "6*7"}}
    </tool_call>
    >>> plain_run("I need a tool. " + message, {"calculator": calculator})
    ['42']
    """
    observations = []
    for block in re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL):
        try:
            call = json.loads(block)
            function = tools[call["name"]]
            result = function(**call["arguments"])
            observations.append(str(result))
        except Exception as error:
            observations.append(f"error: {type(error).__name__}: {error}")
    return observations


# ==================================================================================================
# plain_run is enough for a well-formed message. A policy in training also writes bad ones:
#
#   problem                                               answer
#   a call inside <think>, which is only a thought        parse does not return it as a call
#   "error: KeyError: 'name'", which teaches nothing      parse says what to write instead
#   a megabyte of "<tool_call>": quadratic for findall    parse takes linear time
#   a tool that never returns                             run_calls gives up after a time limit
#   a tool that calls sys.exit, or returns a gigabyte     run_calls reports an error, or clips
#   several slow calls of independent tools               run_calls runs them at the same time
#   a program as an argument                              `python` runs it in a sandbox
# ==================================================================================================


def tools_of(obj: object) -> dict[str, Callable]:
    """The public methods of an object, base classes first, in the order of their definition.

    Not `reset` and `get_reward`: these are for the agent loop (see env.py). An attribute of the
    class that is a tool of LangChain or smolagents counts as a method.

    >>> class Door:
    ...     def open(self) -> str: ...
    ...     def _creak(self) -> str: ...
    >>> list(tools_of(Door()))
    ['open']
    """
    methods = {}
    for cls in reversed(type(obj).__mro__[:-1]):  # the last class is `object`
        for name in vars(cls):
            if name.startswith("_") or name in ("reset", "get_reward"):
                continue
            # Look in the class: on the object, a property would run.
            member = inspect.getattr_static(type(obj), name)
            if inspect.isfunction(member) or isinstance(member, (staticmethod, classmethod)):
                methods[name] = getattr(obj, name)
            elif as_function(member) is not member:
                methods[member.name] = as_function(member)
    return methods


# --------------------------------------------------------------------------------------------------
# Read a message


@dataclass
class Call:
    """A call that may be run: its tool exists and its arguments fit the tool's schema."""

    name: str  # of the tool
    arguments: dict[str, Any]  # by name, as JSON gave them


@dataclass
class CallError:
    """A call that is wrong and is not run. A value in `Message.calls`, not an exception."""

    message: str  # what is wrong and how to write it right, for the policy to read
    written: str = field(default="", compare=False)  # what stood between the tags


@dataclass
class Message:
    """A sampled message, taken apart to act on. Training uses its ids, exactly as sampled."""

    thinking: str  # inside <think>; its calls never run, and it is no part of an answer
    text: str  # outside <think> and <tool_call>, without blanks around it
    calls: list[Call | CallError]  # in the order written, also the broken ones


def format_call(name: str, **arguments: Any) -> str:
    """A call as Qwen, Hermes and many others write it; `parse` reads it back.

    >>> print(format_call("search", query="rivers"))
    <tool_call>
    {"name": "search", "arguments": {"query": "rivers"}}
    </tool_call>
    """
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    # A tag inside an argument would end the block early. In JSON "/" may be "\/", and "<" "\u003c".
    for tag in ("tool_call>", "think>"):
        text = text.replace("</" + tag, "<\\/" + tag).replace("<" + tag, "\\u003c" + tag)
    return f"<tool_call>\n{text}\n</tool_call>"


# |\Z: a tag that is never closed matches up to the end of the text. Without it, each of n unclosed
# tags would be searched to the end and fail: n * n steps.
_SECTION = re.compile(r"<think>(?P<thought>.*?)(?:</think>|\Z)"
                      r"|<tool_call>(?P<block>.*?)(?P<close></tool_call>|\Z)", re.DOTALL)


def parse(text: str, tools: Mapping[str, Callable] | Sequence[dict]) -> Message:
    """Take a sampled message apart. No text makes it raise; the time is linear in its length.

    `tools` is what `tools_of` gives, or a list of schemas. A <think> or <tool_call> that is never
    closed reaches to the end of the text. A </think> with no <think> before it closes one that the
    prompt opened, as Qwen's does. A call inside <think> is no call.

    >>> text = "<think>7*6?</think>So: " + format_call("calculator", expression="7*6")
    >>> parse(text, [schema(calculator)])  # doctest: +NORMALIZE_WHITESPACE
    Message(thinking='7*6?', text='So:',
            calls=[Call(name='calculator', arguments={'expression': '7*6'})])
    >>> parse(format_call("calculator"), {"calculator": calculator}).calls[0].message
    '"calculator" needs the argument "expression". Its arguments: expression (string)'
    """
    schemas = [schema(tool) for tool in tools.values()] if isinstance(tools, Mapping) else tools
    functions = [tool["function"] for tool in schemas]
    parameters = {function["name"]: function.get("parameters", {}) for function in functions}
    head, close, _ = text.partition("</think>")
    if close and "<think>" not in head:
        text = "<think>" + text
    thoughts, calls = [], []
    for section in _SECTION.finditer(text):
        if section["thought"] is not None:
            thoughts.append(section["thought"])
        else:
            block = section["block"].strip()
            call = _read_call(block, parameters) if section["close"] else CallError(_UNCLOSED)
            calls.append(replace(call, written=block) if isinstance(call, CallError) else call)
    return Message("\n".join(thoughts).strip(), _SECTION.sub("", text).strip(), calls)


_UNCLOSED = "<tool_call> was opened but never closed: end the call with </tool_call>"
_FORM = 'Write {"name": ..., "arguments": {...}}'


class _Wrong(ValueError):
    """What is wrong with a call, and how to write it right."""


def _read_call(block: str, parameters: dict[str, dict]) -> Call | CallError:
    """The inside of one <tool_call>. `parameters` holds those of each tool, by its name."""
    try:
        # Python also reads NaN, 1e999 and a key given twice. Each would be a guess at the meaning.
        found = json.loads(block, parse_constant=_finite, parse_float=_finite,
                           object_pairs_hook=_no_key_twice)
        return _check_call(found, parameters)
    except json.JSONDecodeError as error:
        near = _show(block[max(error.pos - 10, 0) : error.pos + 10])
        hint = "End each call with </tool_call>" if "<tool_call>" in block else _FORM
        where = f"at character {error.pos}, near {near}"
        return CallError(f"not valid JSON: {error.msg} {where}. {hint}")
    except RecursionError:
        return CallError("the JSON of the call is nested too deeply")
    except ValueError as error:  # a _Wrong, or a number of thousands of digits
        return CallError(str(error))


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise _Wrong(f"{number[:40]} is not a number in JSON: write a finite one, or a string")
    return float(number)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    found = {}
    for key, value in pairs:
        if key in found:
            raise _Wrong(f"the key {_show(key)} stands twice in one object: give it once")
        found[key] = value
    return found


def _check_call(found: Any, parameters: dict[str, dict]) -> Call:
    """Raises _Wrong with the first thing that is wrong."""
    if not isinstance(found, dict):
        raise _Wrong(f"a call must be a JSON object, not {_show(found)}. {_FORM}")
    for key in ("name", "arguments"):
        if key not in found:
            raise _Wrong(f'the call has no "{key}". {_FORM}')
    name, arguments = found["name"], found["arguments"]
    if not isinstance(name, str) or name not in parameters:
        known = ", ".join(parameters) or "none"
        raise _Wrong(f"there is no tool {_show(name)}. The tools: {known}")
    if not isinstance(arguments, dict):
        raise _Wrong(f'"arguments" of "{name}" must be a JSON object, not {_show(arguments)}')
    wrong = next(_misfits_of_call(name, arguments, parameters[name]), None)
    if wrong:
        specs = parameters[name].get("properties", {})
        usage = ", ".join(f"{key} ({_in_words(spec)})" for key, spec in specs.items())
        raise _Wrong(f"{wrong}. Its arguments: {usage or 'none'}")
    return Call(name, arguments)


def _misfits_of_call(name: str, arguments: dict, parameters: dict) -> Iterator[str]:
    """What is wrong with the arguments of a call, one thing after the other."""
    for key in parameters.get("required", []):
        if key not in arguments:
            yield f'"{name}" needs the argument "{key}"'
    specs = parameters.get("properties", {})
    for key, value in arguments.items():
        if key in specs:
            yield from _misfits(value, specs[key], f'argument "{key}" of "{name}"')
        else:
            yield f'"{name}" has no argument {_show(key)}'


def _misfits(value: Any, spec: dict, what: str = "") -> Iterator[str]:
    """What is wrong with a value: nothing if it fits its schema. `what` names the value.

    This knows the part of JSON schema that type hints can express.

    >>> list(_misfits(["a", 2], {"type": "array", "items": {"type": "string"}}, "the list"))
    ['item 1 of the list must be string, not 2']
    """
    if value is None and spec.get("nullable"):
        return
    fits = _has_type(value, _types(spec))
    if "enum" in spec:  # True == 1 in Python, so compare the types as well
        fits &= (type(value), value) in [(type(one), one) for one in spec["enum"]]
    if "anyOf" in spec:
        fits &= any(not list(_misfits(value, option)) for option in spec["anyOf"])
    if not fits:
        yield f"{what} must be {_in_words(spec)}, not {_show(value)}"
    elif isinstance(value, list) and "items" in spec:
        for place, item in enumerate(value):
            yield from _misfits(item, spec["items"], f"item {place} of {what}")


_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
               dict: "object", type(None): "null"}


def _has_type(value: Any, types: Sequence[str]) -> bool:
    """Has a value one of these JSON types? A type that JSON does not know fits every value."""
    found = _JSON_TYPES.get(type(value))
    if not types or found in types or not set(types).issubset(_JSON_TYPES.values()):
        return True
    return found == "integer" and "number" in types


def _types(spec: dict) -> list[str]:
    """JSON schema gives a type or a list of types. If it gives none, any value fits."""
    types = spec.get("type", [])
    return [types] if isinstance(types, str) else types


def _in_words(spec: dict) -> str:
    """A schema in words: 'integer', 'array of string or null', 'one of "a", "b"'."""
    if spec.get("nullable"):
        return _in_words({**spec, "nullable": False}) + " or null"
    if "enum" in spec:
        return "one of " + ", ".join(_show(value) for value in spec["enum"])
    if "anyOf" in spec:
        return " or ".join(_in_words(option) for option in spec["anyOf"])
    words = " or ".join(_types(spec)) or "anything"
    return f"{words} of {_in_words(spec['items'])}" if "items" in spec else words


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."


# --------------------------------------------------------------------------------------------------
# Run calls


@dataclass
class Observation:
    """What one call gave, for the policy to read."""

    text: str  # clipped, valid UTF-8; untrusted, so agent.py encodes it without control tokens
    error: bool  # the call was broken, raised or took too long; a wrong answer is no error


async def run_calls(calls: Sequence[Call | CallError], tools: Mapping[str, Callable], *,
                    timeout: float = 10.0, max_chars: int = 2000,
                    max_calls: int = 16) -> list[Observation]:
    """Run the calls of one message. Returns one observation per call, in call order.

    Calls run at the same time. But methods of one object, such as the tools of an environment, run
    one after the other: two moves in a maze must not race. Each call may take `timeout` seconds,
    counted from its own beginning. After that it is an error. But its thread runs on, and may
    overlap with the next call to the same object.

    Every exception of a tool becomes an error, SystemExit too. A text over `max_chars` loses its
    middle. Calls after the first `max_calls` do not run. This function raises only if it is
    cancelled, or at Ctrl-C. No limit works while a tool holds the GIL (see the top of this file).

    >>> calls = [Call("calculator", {"expression": "6*7"}), CallError("not JSON"),
    ...          Call("calculator", {"expression": "1/0"})]
    >>> observations = asyncio.run(run_calls(calls, {"calculator": calculator}))
    >>> [observation.text for observation in observations]
    ['42', 'error: not JSON', 'error: ValueError: division by zero']
    """
    # One per object: the tools of one environment never overlap. First come, first served.
    locks = collections.defaultdict(asyncio.Lock)
    too_many = CallError(f"only the first {max_calls} calls of a message are run")
    accepted = [call if place < max_calls else too_many for place, call in enumerate(calls)]
    jobs = [_run_call(call, tools, timeout, locks) for call in accepted]
    observations = await asyncio.gather(*jobs)
    return [Observation(clip(one.text, max_chars), one.error) for one in observations]


async def _run_call(call: Call | CallError, tools: Mapping[str, Callable], timeout: float,
                    locks: Mapping[int, asyncio.Lock]) -> Observation:
    if isinstance(call, CallError):
        return _failed(call.message)
    if call.name not in tools:
        return _failed("there is no such tool")
    function = as_function(tools[call.name])
    if inspect.iscoroutinefunction(function):
        return await _in_time(_run_async(function, call.arguments), call.name, timeout)
    # A function that is no method has no object. It gets a lock of its own, and waits for nobody.
    owner = getattr(function, "__self__", None)
    lock = asyncio.Lock() if owner is None else locks[id(owner)]
    async with lock:
        job = in_thread(lambda: _run_plain(function, call.arguments))
        return await _in_time(job, call.name, timeout)


def _run_plain(function: Callable, arguments: dict) -> Observation:
    """Run a tool in this thread, which is the tool's own."""
    try:
        return Observation(_as_text(function(**arguments)), error=False)
    except BaseException as error:  # sys.exit() too
        return _failed(describe(error))


async def _run_async(function: Callable, arguments: dict) -> Observation:
    """Run an `async def` tool in the event loop."""
    try:
        result = await function(**arguments)
    except SystemExit as error:  # it would end the event loop and every other episode
        return _failed(describe(error))
    # In a thread: a __str__ that hangs would stop the loop.
    return await in_thread(lambda: _run_plain(lambda: result, {}))


# The time limit of the call that runs here, an asyncio.Timeout. `wait_for_core` puts it off.
_running_limit = contextvars.ContextVar("time limit", default=None)


async def _in_time(work: Awaitable[Observation], name: str, timeout: float) -> Observation:
    """The result of `work`, or an error if it takes longer than `timeout` seconds."""
    limit = asyncio.timeout(timeout)
    _running_limit.set(limit)  # before the task is made, because it copies the context
    future = asyncio.ensure_future(work)
    try:
        async with limit:
            # The limit cancels this wait, not the task. `await future` would cancel the task and
            # wait for its end: for ever, if it swallows its cancellation.
            await asyncio.wait({future})
    except TimeoutError:
        if not future.done():  # else the event loop was late: use the result
            return _failed(f"{name} took longer than {timeout:g} s and was abandoned")
    finally:
        future.cancel()  # does nothing to one that is done
    try:
        return future.result()
    except (Exception, asyncio.CancelledError) as error:
        return _failed(describe(error))


def in_thread(function: Callable[[], Any]) -> asyncio.Future:
    """Run `function` in a new thread, and wait for it with `await`."""
    return asyncio.wrap_future(start_thread(function))


def start_thread(function: Callable[[], Any]) -> concurrent.futures.Future:
    """Run `function` in a new thread. The future gets what it returns or raises.

    An exception that is no Exception, such as SystemExit, comes as a RuntimeError.
    Not a pool of threads: one that hangs for ever would be missing from the pool. And Python waits
    for the threads of a pool before it exits, but not for this one.
    """
    result, process = concurrent.futures.Future(), os.getpid()
    result.set_running_or_notify_cancel()  # if nobody waits any more, the thread still runs on

    def work() -> None:
        value = error = None
        try:
            value = function()
        except Exception as e:
            error = e
        except BaseException as e:  # such as SystemExit: an event loop that waits would end by it
            error = RuntimeError(describe(e))
        # If the function has forked, its copy of this process comes here, too. It must end, or it
        # would go on as a second trainer.
        if os.getpid() != process:
            os._exit(0)
        if error:
            result.set_exception(error)
        else:
            result.set_result(value)

    try:
        # Not threading.Thread: its start() would make the event loop wait until the thread runs.
        _thread.start_new_thread(work, ())
    except RuntimeError as error:  # no more threads: abandoned ones may hold them all
        result.set_exception(error)
    return result


def _as_text(result: Any) -> str:
    """Text as it is, None as "done", bytes decoded, all else as JSON or, if that fails, as `str`.

    May raise: a __str__ can.
    """
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


def _failed(reason: str) -> Observation:
    """An error observation of one line."""
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
        head, cut = max_chars - tail, len(text) - max_chars
        text = f"{text[:head]} [... {cut:,} characters cut ...] {text[head + cut :]}"
    # A policy can write "\ud800" in JSON, which is half a character: no tokenizer takes it.
    return text.encode("utf-8", "replace").decode("utf-8")


# --------------------------------------------------------------------------------------------------
# Tool: calculator

_LARGEST = 10**300  # whole numbers below it fit a float, so no operation overflows on the way


def calculator(expression: str) -> str:
    """Work out an arithmetic expression. Whole numbers below 10**300 are exact.

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
    except (RecursionError, MemoryError):  # MemoryError is what Python's parser raises
        raise ValueError("the expression is nested too deeply") from None
    except OverflowError:
        raise ValueError("a number is too large: the limit is 10**300") from None
    except SyntaxError as error:
        shown = repr(expression[:60])
        raise ValueError(f"not an arithmetic expression ({error.msg}): {shown}") from None
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.12g}"


def _evaluate(node: ast.AST) -> float:
    """Computes numbers and the operations below, and refuses everything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_evaluate(node.operand))
    else:
        raise ValueError("only numbers, + - * / // % ** and parentheses are allowed, "
                         f"not {ast.unparse(node)[:40]!r}")
    if not abs(value) < _LARGEST:
        raise OverflowError
    return value


def _divide(a: float, b: float) -> float:
    if isinstance(a, int) and isinstance(b, int) and a % b == 0:
        return a // b  # 10**30 / 10 as floats would lose the last digits
    return a / b


def _power(base: float, exponent: float) -> float:
    if base < 0 and exponent != int(exponent):
        raise ValueError("a negative number to the power of a fraction is not a real number")
    # Checked before computing: 9**9**9 has 370 million digits.
    if abs(base) > 1 and exponent * math.log10(abs(base)) > 300:
        raise OverflowError
    return base**exponent


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
               ast.Div: _divide, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
               ast.Pow: _power, ast.UAdd: operator.pos, ast.USub: operator.neg}


# ==================================================================================================
# That is all that an agent needs. Skip the rest on first reading: tools for agents written
# elsewhere, tools of other libraries, and `python`, which runs a policy's programs in a sandbox.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Tools and agents of other libraries


def as_function(tool: Any) -> Callable:
    """A tool of LangChain or smolagents as a function. A function stays as it is.

    A tool is known by its shape: neither library is imported.

    >>> class Shout:  # as in smolagents
    ...     name, description = "shout", "Say it loud."
    ...     inputs = {"text": {"type": "string", "description": "What to say"}}
    ...     def forward(self, text): return text.upper()
    ...     __call__ = forward
    >>> shout = as_function(Shout())
    >>> shout("hello"), inspect.signature(shout)
    ('HELLO', <Signature (text: str)>)
    """
    if hasattr(tool, "tool_call_schema"):  # LangChain
        parameters = tool.tool_call_schema  # a JSON schema, or a class of pydantic
        if not isinstance(parameters, dict):
            parameters = parameters.model_json_schema()
        # A tool that has a coroutine may have nothing else.
        call = tool.ainvoke if getattr(tool, "coroutine", None) else tool.invoke
    elif hasattr(tool, "inputs") and hasattr(tool, "forward"):  # smolagents
        required = [key for key, spec in tool.inputs.items() if not spec.get("nullable")]
        parameters = {"properties": tool.inputs, "required": required}

        def call(arguments: dict) -> Any:
            return tool(**arguments)
    else:
        return tool
    return function_of(tool.name, tool.description, parameters, call)


def function_of(name: str, description: str, parameters: dict, call: Callable) -> Callable:
    """A function with type hints and a docstring, made from a tool's JSON schema.

    `call` gets the arguments as one dictionary. If it is an `async def`, so is the function.
    Optional arguments default to None, and None is not passed on. Hints cannot express all of JSON
    schema: an object becomes a `dict`, whatever its fields.
    """
    specs, required = parameters.get("properties", {}), parameters.get("required", [])
    hints, arguments = {}, []
    for key in sorted(specs, key=lambda key: key not in required):  # Python wants these first
        hints[key] = _hint(specs[key], parameters.get("$defs", {}))
        default = inspect.Parameter.empty if key in required else specs[key].get("default")
        if default is None:
            hints[key] = hints[key] | None
        arguments.append(inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                           default=default, annotation=hints[key]))
    signature = inspect.Signature(arguments)

    def given(args: tuple, kwargs: dict) -> dict:
        found = signature.bind(*args, **kwargs).arguments
        return {key: value for key, value in found.items() if value is not None or key in required}

    def function(*args: Any, **kwargs: Any) -> Any:
        return call(given(args, kwargs))

    async def async_function(*args: Any, **kwargs: Any) -> Any:
        return await call(given(args, kwargs))

    made = async_function if inspect.iscoroutinefunction(call) else function
    made.__name__, made.__signature__, made.__annotations__ = name, signature, hints
    made.__doc__ = _docstring(description, specs)
    return made


def _docstring(description: str, specs: dict[str, dict]) -> str:
    """A docstring as `schema` reads it. A description with a section `Args:` is one already."""
    if "Args:" in description or not specs:
        return description
    lines = [f"    {key}: {spec.get('description', key)}" for key, spec in specs.items()]
    return "\n".join([description, "", "Args:", *lines])


def _hint(spec: dict, definitions: dict[str, dict]) -> Any:
    """The type hint that says what a JSON schema says. `Any`, where none does.

    >>> _hint({"type": "array", "items": {"enum": ["red", "green"]}, "nullable": True}, {})
    typing.Optional[list[typing.Literal['red', 'green']]]
    """
    if "$ref" in spec:
        return _hint(definitions.get(spec["$ref"].rpartition("/")[2], {}), definitions)
    types = {name: kind for kind, name in _JSON_TYPES.items()}
    hints = [types.get(name, Any) for name in _types(spec)] or [Any]
    if "enum" in spec:
        hints = [Literal[tuple(spec["enum"])]]
    elif "anyOf" in spec:
        hints = [_hint(option, definitions) for option in spec["anyOf"]]
    elif hints == [list] and "items" in spec:
        hints = [list[_hint(spec["items"], definitions)]]
    if spec.get("nullable"):
        hints.append(None)
    return Union[tuple(hints)]  # noqa: UP007  (there is no | of a list)


def safe_tools(tools: Mapping[str, Callable], timeout: float,
               report: Callable[[Observation], None] = lambda observation: None) -> list[Callable]:
    """The same tools as functions that never raise, for an agent written elsewhere.

    They obey the rules of `run_calls`, and return the text of the observation. Bad arguments become
    a text, too: so a mistake of the policy does not look like a mistake of the agent. `report` is
    called with each observation. Names, type hints and docstrings stay. `async def` stays, too.

    >>> [safe] = safe_tools({"calculator": calculator}, timeout=10)
    >>> safe("6*7"), safe("1/0"), safe(number=2)  # doctest: +NORMALIZE_WHITESPACE
    ('42', 'error: ValueError: division by zero',
     "error: got an unexpected keyword argument 'number'")
    """
    lock = threading.Lock()  # one plain call at a time: these tools change one environment
    # The caller's mapping, not a copy: agent.py empties it at the end of the episode. After that, a
    # late call gets "there is no such tool".
    return [_safe_tool(name, tools, timeout, report, lock) for name in tools]


def _safe_tool(name: str, tools: Mapping[str, Callable], timeout: float,
               report: Callable[[Observation], None], lock: threading.Lock) -> Callable:
    tool = as_function(tools[name])
    signature = inspect.signature(tool)
    parameters = {name: schema(tool)["function"]["parameters"]}

    async def call_async(*args, **kwargs) -> str:
        call = _as_call(name, signature, parameters, args, kwargs)
        [observation] = await run_calls([call], tools, timeout=timeout)
        report(observation)
        return observation.text

    def call_plain(*args, **kwargs) -> str:
        with lock:
            # A plain function blocks its caller, but `run_calls` needs an event loop, and the
            # caller's thread may run one already. So: a thread with a loop of its own.
            job = start_thread(lambda: asyncio.run(call_async(*args, **kwargs)))
            error = job.exception()  # no more threads or files
            return _failed(describe(error)).text if error else job.result()

    safe = call_async if inspect.iscoroutinefunction(tool) else call_plain
    functools.update_wrapper(safe, tool)  # its name and docstring
    # Frameworks describe a tool by its hints or by its signature. Both say that it returns text.
    safe.__annotations__ = typing.get_type_hints(tool) | {"return": str}
    takes = [parameter.replace(annotation=safe.__annotations__[key])
             for key, parameter in signature.parameters.items()]
    safe.__signature__ = signature.replace(parameters=takes, return_annotation=str)
    return safe


def _as_call(name: str, signature: inspect.Signature, parameters: dict, args: tuple,
             kwargs: dict) -> Call | CallError:
    """The arguments by name and as JSON gives them, checked as if a policy had written them."""
    try:
        # Not `bind`: `_check_call` says more about an argument that is missing.
        arguments = signature.bind_partial(*args, **kwargs).arguments
        arguments = json.loads(json.dumps(arguments, allow_nan=False))
        return _check_call({"name": name, "arguments": arguments}, parameters)
    except Exception as error:  # Python lets an agent pass any object, and its methods may fail
        return CallError(describe(error).partition(": ")[2])  # without the exception's name


# --------------------------------------------------------------------------------------------------
# Tool: python

# A model's program may do anything, so each call gets a new sandbox, which bubblewrap builds, also
# when we are root. Inside, a program
#
#   - reads only the files of the system's Python, and writes only in a scratch folder;
#   - cannot see or signal other processes, nor reach a network or a socket;
#   - cannot read our environment variables, nor gain rights;
#   - cannot exceed the limits below, nor outlive the call, however the call ends.
#
# The sandbox does not protect from these:
#
#   - bugs of the kernel or of bubblewrap, and what processor caches give away;
#   - up to 6 processes that each use all their time and memory (3 GB in all);
#   - for a moment, more memory in the kernel, for many small files (only a cgroup bounds that);
#   - a program that reads what lies under /usr/lib.
#
# Two processes of ours take part. `python` starts bubblewrap, and reads what the program prints.
# `_supervise` runs inside the sandbox, starts the program, and ends it. At a time limit: `python`
# writes a byte -> `_supervise` exits -> it is process 1 of the sandbox, so the kernel kills all
# others -> the pipe with their output closes -> `python` returns.

# Limits of each process of a program, by the names of setrlimit(2): seconds of processor time,
# bytes of memory, bytes of a file, open files. NPROC alone is for the whole program: its processes
# and threads, and two more that are not its own.
_LIMITS = {"CPU": 5, "AS": 512 * 2**20, "FSIZE": 16 * 2**20, "NOFILE": 64, "NPROC": 8,
           "CORE": 0, "MSGQUEUE": 0}
# Of a whole program:
_WALL_SECONDS = 8  # by the clock; more than its processor time, because it shares the cores
_OUTPUT = 100_000  # bytes
_SCRATCH = 64 * 2**20  # bytes of the scratch folder, which lies in memory

# As many programs run at once as we may use cores. With more, all of them would be late. All event
# loops share this bound. (macOS cannot tell the number, and has no sandbox.)
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
_FREE_CORES = threading.Semaphore(_CORES)


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
    """
    await wait_for_core()
    stop = threading.Event()
    ended = in_thread(lambda: _run_program(code, stop))
    try:
        await asyncio.wait({ended})
    finally:
        # If we are cancelled, tell the program to stop, and wait until it has, even if we are
        # cancelled once more. Nothing may outlive the call.
        stop.set()
        while not ended.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({ended})
        _FREE_CORES.release()
    return _report(*ended.result())


async def wait_for_core() -> None:
    """Take one of `_FREE_CORES`. The time limit of the call must stand still meanwhile.

    So each time that we wait, we put off the limit by as long. `_in_time` leaves its limit in a
    context variable, which also reaches a `python` that another tool calls.
    """
    pause, now, limit = 0.02, asyncio.get_running_loop().time, _running_limit.get()
    left = limit.when() - now() if limit else 0.0
    while not _FREE_CORES.acquire(blocking=False):
        if limit:
            limit.reschedule(now() + pause + left)
        await asyncio.sleep(pause)


def _report(printed: bytes, status: int) -> str:
    """What a program printed. Raises if it failed."""
    text = printed[:_OUTPUT].decode("utf-8", "replace")
    reasons = {124: f"stopped after {_WALL_SECONDS} s",
               137: f"killed, as a program is after {_LIMITS['CPU']} s of processor time"}
    why = reasons.get(status, f"exit code {status}")
    if len(printed) > _OUTPUT:
        why = f"stopped, because it wrote more than {_OUTPUT:,} bytes"
    elif status == 0:
        return text or "(nothing was printed)"
    elif text.startswith(("bwrap: ", "setpriv: ")):
        raise RuntimeError("no sandbox can be built here (bubblewrap needs user namespaces), "
                           f"so the program was not run: {text}")
    last_lines = "\n".join(text.splitlines()[-10:]) or "nothing"
    raise ChildProcessError(f"{why}. It wrote: {last_lines}")


def _run_program(code: str, stop: threading.Event) -> tuple[bytes, int]:
    """Run a program until it ends, or writes too much, or `stop` is set.

    Returns what it wrote, and its exit code. This blocks its thread. When it returns, nothing is
    left of the program.
    """
    printed, poll = bytearray(), select.poll()  # not select.select: no descriptors above 1023
    with _start_sandbox(code) as process:  # its end waits for the process
        poll.register(process.stdout, select.POLLIN)
        while len(printed) <= _OUTPUT and not stop.is_set():
            if poll.poll(50):  # milliseconds
                block = process.stdout.read(2**16)
                if not block:
                    break
                printed += block
        with contextlib.suppress(BrokenPipeError):  # the program has ended
            process.stdin.write(b"end")
        # Until nobody holds the other end of the pipe: then all processes inside are gone.
        while poll.poll(10_000) and process.stdout.read(2**16):
            pass
        process.kill()  # does nothing, unless bubblewrap itself hangs
    return bytes(printed), process.returncode


def _start_sandbox(code: str) -> subprocess.Popen:
    """Start a program. Whatever is written to its standard input ends it (see `_supervise`).

    Not asyncio's subprocess: cancelled while it starts, it kills bubblewrap, whose inner half then
    sleeps for ever.
    """
    # Not the Python we run on. It may lie in a home folder, which the program's user must not read.
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    bwrap, setpriv = shutil.which("bwrap"), shutil.which("setpriv")
    if None in (bwrap, setpriv, python) or platform.machine() not in _MACHINES:
        raise RuntimeError("model-written code runs in a sandbox only, and there is none here; "
                           f"the program was not run. On Debian ({' or '.join(_MACHINES)}): "
                           "apt-get install bubblewrap python3 util-linux")
    with _file_in_memory(code.encode("utf-8", "replace")) as program, \
            _file_in_memory(_system_call_filter()) as rules:
        files = (program.fileno(), rules.fileno())
        command = _sandbox_command(bwrap, os.path.realpath(python), *files)
        if os.geteuid() == 0:
            # The kernel exempts root from the limit on processes, so become nobody first.
            command = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        return subprocess.Popen(command, bufsize=0, cwd="/", pass_fds=files, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _file_in_memory(content: bytes) -> BinaryIO:
    """An open file without a name, for a child process that is told its descriptor."""
    file = open(os.memfd_create("nameless"), "w+b")
    file.write(content)
    file.seek(0)
    return file


def _sandbox_command(bwrap: str, python: str, program: int, rules: int) -> list[str]:
    """The command that runs an open file, `program`, under an open file of system call `rules`."""
    command = [bwrap, "--unshare-all"]  # its own processes, network, IPC, host name and cgroups
    # The user "nobody", who cannot become root in a new namespace.
    command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    command += ["--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    command += ["--new-session"]  # no terminal to type into
    command += ["--as-pid-1"]  # _supervise must be process 1
    command += ["--seccomp", str(rules)]
    # The root is empty: no /proc, no /sys, no home, not a shell. The scratch folder comes first,
    # for the other folders may lie below it.
    command += ["--size", str(_SCRATCH), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    command += ["--ro-bind", python, python, "--dev-bind", "/dev/null", "/dev/null"]
    command += ["--perms", "0444", "--ro-bind-data", str(program), "/code.py"]
    command += ["--remount-ro", "/"]  # it is a file system in memory as well, without a size
    supervisor = inspect.getsource(_supervise) + f"_supervise({_LIMITS}, {_WALL_SECONDS})"
    return [*command, python, "-I", "-S", "-B", "-c", supervisor]


def _supervise(limits: dict[str, int], seconds: float) -> None:
    """Start the program inside the sandbox, and end when it ends, or is to end, or is out of time.

    This runs as process 1 of the sandbox. When process 1 ends, the kernel ends all others first. To
    kill bubblewrap from outside would leave a moment in which a process inside lives on. Only the
    source of this function runs in the sandbox, so it imports what it needs.
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
        python = sys.executable
        os.execv(python, [python, "-I", "-S", "-B", "-X", "utf8", "/code.py"])
    ended = os.pidfd_open(program)
    # Any byte on our standard input (0), or its end, means: stop. `_run_program` writes some, and
    # the input ends if the process that started the sandbox dies.
    ready, _, _ = select.select([0, ended], [], [], seconds)
    code = 124  # as timeout(1) has it
    if ended in ready:
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    os._exit(code if code >= 0 else 128 - code)  # a signal as shells have it


# System calls that namespaces and limits do not cover, with their numbers on x86_64 and aarch64.
_FORBIDDEN = {
    # Make sockets, some of which reach the hypervisor.
    "socket": (41, 198),
    # Take memory that belongs to no process, so that no limit counts it.
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # Stop or change process 1, which ends the program, or take its files.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    # Leave process 1 no processor time.
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    # Use the keys of the session that we run in, which no namespace hides.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # Reach large parts of the kernel that no such program needs. This filter does not see the
    # calls that io_uring makes.
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}
# The kernel's numbers for the machines (audit.h).
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _system_call_filter() -> bytes:
    """A seccomp filter: a small program that the kernel runs before each system call.

    It lets the forbidden calls fail with "Operation not permitted". A line of it is an operation,
    the number of lines to skip if a comparison is true, the number to skip if it is false, and a
    value. See seccomp(2).
    """
    load, if_equal, if_at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    at_call_number, at_machine = 0, 4  # in what the kernel gives to the filter
    machine = platform.machine()
    column = list(_MACHINES).index(machine)
    # 32-bit code and x32 use other numbers for the same calls. A program that tries them is killed.
    lines = [(load, 0, 0, at_machine),
             (if_equal, 1, 0, _MACHINES[machine]), (answer, 0, 0, kill),  # if equal, skip the kill
             (load, 0, 0, at_call_number),
             (if_at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # if below (not x32), skip it
    for numbers in _FORBIDDEN.values():  # if it is another call, skip the refusal
        lines += [(if_equal, 0, 1, numbers[column]), (answer, 0, 0, refuse)]
    lines.append((answer, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


# --------------------------------------------------------------------------------------------------
# python tools.py


def _demo() -> None:
    def wait() -> str:
        """Never come back."""
        threading.Event().wait()

    tools = {"calculator": calculator, "wait": wait}
    print("A tool, described:\n" + json.dumps(schema(calculator), indent=2))
    good = "I will work it out.\n" + format_call("calculator", expression="2**100")
    print(f"\nA message, as a model might write it:\n{good}\n  -> {plain_run(good, tools)}")
    bad = [format_call("calculator", expression="9**9**9"), format_call("wait"),
           format_call("calculator", expression=1), "<tool_call>\n{oops}\n</tool_call>"]
    text = "\n".join([f"<think>Or {bad[0]}?</think>{good}", *bad])
    print(f"\nA message, as a model in training might write it:\n{text}\n\nTaken apart, and run:")
    calls = parse(text, tools).calls
    for call, observation in zip(calls, asyncio.run(run_calls(calls, tools, timeout=0.2))):
        print(f"  {call}\n    -> {observation.text!r}")


if __name__ == "__main__":
    _demo()
