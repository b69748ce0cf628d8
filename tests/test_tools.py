"""tools.py: schemas, parsing, calling under limits, the calculator. test_sandbox.py tests `python`."""

import asyncio
import collections
import doctest
import gc
import inspect
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, Literal

import pytest

import tools
from tools import (
    Call,
    CallError,
    Message,
    Observation,
    calculator,
    clip,
    format_call,
    parse,
    plain_run,
    run_calls,
    schema,
    tools_of,
    wait_for_core,
)


def add(a: int, b: float, note: str | None = None, mode: Literal["fast", "best"] = "fast", numbers: list[int] | None = None):
    """Add numbers.

    Args:
        a: The first.
        b: The second.
        note: A remark.
        mode: How.
        numbers: More of them.

    Returns:
        The sum.
    """
    return str(a + b + sum(numbers or []))


def look() -> str:
    """Look around."""
    return "a room"


def put(flag: bool, thing: dict | list[str], what: Any = None, which: int | str = 0) -> None:
    """Put a thing.

    Args:
        flag: A switch.
        thing: An object or strings.
        what: Anything.
        which: A number or a name.
    """


TOOLS = {"add": add, "look": look, "put": put}
SCHEMAS = [schema(tool) for tool in TOOLS.values()]


def wait_until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def block(text):
    return f"<tool_call>\n{text}\n</tool_call>"


# ---- describe ----


def test_schema_is_the_form_apis_take():
    """The key "return" that transformers adds is refused by APIs; a tool may have no arguments."""
    function = schema(add)["function"]
    assert schema(add)["type"] == "function" and set(function) == {"name", "description", "parameters"}
    assert function["parameters"]["required"] == ["a", "b"] and "Returns" not in json.dumps(function)
    assert schema(look)["function"]["parameters"] == {"type": "object", "properties": {}}


def test_schema_of_a_method_is_that_of_the_function_and_keeps_no_object_alive():
    """A cache by bound method kept each environment alive; an edit of its dict reached all callers.
    """

    class Desk:
        def write(self, text: str) -> str:
            """Write.

            Args:
                text: What to write.
            """

    desk = Desk()
    described = schema(desk.write)
    assert described == schema(Desk.write)
    assert list(described["function"]["parameters"]["properties"]) == ["text"]
    described["function"]["name"] = "changed"
    assert schema(desk.write)["function"]["name"] == "write"
    alive = weakref.ref(desk)
    del desk
    gc.collect()
    assert alive() is None


def test_tools_of_takes_public_methods_in_order_and_runs_no_property():
    """`getattr` over `dir(env)` ran properties (a reward was computed, a connection opened) and sorted the tools by name."""

    class Base:
        def reset(self, seed: int) -> str: ...

        def walk(self) -> str: ...

        def hidden(self) -> str: ...

    class World(Base):
        hidden = None
        helper = print

        class Config: ...

        def __init__(self):
            self.callback = print

        @property
        def state(self):
            raise AssertionError("a property ran")

        def zoom(self) -> str: ...

        @staticmethod
        def add(a: int) -> str: ...

        def _secret(self): ...

        def get_reward(self): ...

        def walk(self) -> str:
            return "overridden"

    world = World()
    found = tools_of(world)
    assert list(found) == ["walk", "zoom", "add"]
    assert found["walk"]() == "overridden"


# ---- parse ----

ADD = format_call("add", a=1, b=2.5)
ADDED = Call("add", {"a": 1, "b": 2.5})
LOOK = format_call("look")
LOOKED = Call("look", {})

GOOD = {  # name: (message, its thinking, its text, its calls)
    "one call": (ADD, "", "", [ADDED]),
    "text around": (f"I add.\n{ADD} Done. ", "", "I add.\n Done.", [ADDED]),
    "several, in order": (ADD + "\n" + LOOK + ADD, "", "", [ADDED, LOOKED, ADDED]),
    "no call": ("Just text.", "", "Just text.", []),
    "empty": ("", "", "", []),
    "thinking": (f"<think>\nhm\n</think>\n\n{ADD}", "hm", "", [ADDED]),
    "thinking twice": (f"<think>a</think>b{ADD}<think>c</think>d", "a\nc", "bd", [ADDED]),
    "call inside thinking": (f"<think>maybe {ADD}?</think>no", f"maybe {ADD}?", "no", []),
    "thinking never closed": (f"so <think>hm {ADD}", f"hm {ADD}", "so", []),
    "opened by the prompt": (f"hm {ADD}\n</think>\n{LOOK}", f"hm {ADD}", "", [LOOKED]),
    "stray closing tags": (f"a</tool_call>{ADD}<think>b</think></think>", "b", "a</tool_call></think>", [ADDED]),
    "no line breaks": ('<tool_call>{"arguments":{},"name":"look"}</tool_call>', "", "", [LOOKED]),
    "another key": (block('{"id": 7, "name": "look", "arguments": {}}'), "", "", [LOOKED]),
}
for accepted in [
    Call("add", {"a": 1, "b": 2}),  # a whole number is a number
    Call("add", {"a": 1, "b": 2, "note": None}),
    Call("add", {"a": 1, "b": 2, "note": "<think>"}),
    Call("add", {"a": 1, "b": 2, "mode": "best"}),
    Call("add", {"a": 1, "b": 2, "numbers": [1, 2]}),
    Call("put", {"flag": True, "thing": {"k": 1}}),
    Call("put", {"flag": True, "thing": ["k"]}),
    Call("put", {"flag": False, "thing": [], "what": [1, None], "which": "a"}),
]:
    GOOD[str(accepted.arguments)] = (format_call(accepted.name, **accepted.arguments), "", "", [accepted])


@pytest.mark.parametrize("case", GOOD)
def test_parse_reads_what_was_meant(case):
    text, *expected = GOOD[case]
    assert parse(text, TOOLS) == Message(*expected)
    assert parse(text, SCHEMAS) == Message(*expected)  # a list of schemas serves as well as the functions


BAD = {
    "not JSON": (block("{oops}"), ["not valid JSON", "at character 1", "{oops}", '"arguments"']),
    "nothing": (block(""), ["not valid JSON", "at character 0"]),
    "half a JSON": (block('{"name": "look", "arguments": {'), ["not valid JSON", "at character 31"]),
    "Python instead of JSON": (block("{'name': 'look', 'arguments': {}}"), ["not valid JSON", "double quotes"]),
    "two objects in one block": (block('{"name": "look", "arguments": {}}\n' * 2), ["Extra data", "34"]),
    "line break in a string": (block('{"name": "lo\nok", "arguments": {}}'), ["Invalid control character"]),
    "not an object": (block('["look"]'), ["must be a JSON object", '["look"]']),
    "no name": (block('{"arguments": {}}'), ['no "name"']),
    "no arguments": (block('{"name": "look"}'), ['no "arguments"']),
    "unknown tool": (block('{"name": "fly", "arguments": {}}'), ['no tool "fly"', "add, look, put"]),
    "name not a text": (block('{"name": ["add"], "arguments": {}}'), ['no tool ["add"]']),
    "arguments a text": (block('{"name": "look", "arguments": "{}"}'), ["must be a JSON object"]),
    "never closed": ('<tool_call>\n{"name": "look", "arguments": {}}', ["never closed", "</tool_call>"]),
    "closed too late": ('<tool_call>{"name": "look", "arguments": {}}' + format_call("look"), ["Extra data", "</tool_call>"]),
    "missing": (format_call("add", a=1), ['needs the argument "b"', "b (number)"]),
    "extra": (format_call("look", where="up"), ['no argument "where"', "none"]),
    "text for integer": (format_call("add", a="1", b=2), ['"a" of "add" must be integer', 'not "1"']),
    "boolean for integer": (format_call("add", a=True, b=2), ["must be integer", "not true"]),
    "boolean for number": (format_call("add", a=1, b=True), ["must be number"]),
    "float for integer": (format_call("add", a=1.0, b=2), ["must be integer", "not 1.0"]),
    "integer for boolean": (format_call("put", flag=1, thing={}), ["must be boolean"]),
    "null for integer": (format_call("add", a=None, b=2), ["must be integer", "not null"]),
    "number for text or null": (format_call("add", a=1, b=2, note=3), ["must be string or null"]),
    "not in the enum": (format_call("add", a=1, b=2, mode="slow"), ['one of "fast", "best"', '"slow"']),
    "not an array": (format_call("add", a=1, b=2, numbers=3), ["array of integer or null"]),
    "wrong item": (format_call("add", a=1, b=2, numbers=[1, "2"]), ['item 1 of argument "numbers"', "integer"]),
    "neither type": (format_call("put", flag=True, thing={}, which=[]), ["integer or string"]),
    "NaN": (block('{"name": "add", "arguments": {"a": 1, "b": NaN}}'), ["NaN is not a number in JSON"]),
    "-Infinity": (block('{"name": "add", "arguments": {"a": 1, "b": -Infinity}}'), ["-Infinity is not"]),
    "1e999": (block('{"name": "add", "arguments": {"a": 1, "b": 1e999}}'), ["1e999 is not"]),
    "key twice": (block('{"name": "add", "arguments": {"a": 1, "b": 2, "a": 3}}'), ["twice", '"a"']),
    "10,000 digits": (block('{"name": "add", "arguments": {"b": 1, "a": %s}}' % ("9" * 10_000)), ["digits"]),
    "nested too deeply": (block('{"name": "put", "arguments": ' + '{"what":' * 100_000), ["nested too deeply"]),
    "tag in a string": ('<tool_call>{"name": "add", "arguments": {"note": "</tool_call>"}}</tool_call>', ["Unterminated string"]),
}


@pytest.mark.parametrize("case", BAD)
def test_contract_08_a_malformed_call_is_answered_with_what_is_wrong(case):
    """Serving engines repaired cut calls to `{}` and ran them, or dropped them; tokenizers raise, which ended the episode."""
    text, expected = BAD[case]
    message = parse(format_call("look") + text, TOOLS)
    assert message.calls[0] == Call("look", {})
    assert isinstance(message.calls[1], CallError), message
    assert all(words in message.calls[1].message for words in expected), message.calls[1].message
    assert len(message.calls[1].message) < 500
    (observation,) = asyncio.run(run_calls(message.calls[1:2], TOOLS))
    assert observation.error and observation.text == "error: " + " ".join(message.calls[1].message.split())


def test_parse_checks_schemas_that_were_not_made_from_functions():
    """Such as those of MCP servers; and older versions of transformers make no anyOf."""
    spec = {"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "string"}}], "nullable": True}
    tool = {"type": "function", "function": {"name": "t", "parameters": {"properties": {"x": spec, "y": {"type": "odd"}}}}}
    for x in [{}, {"k": 1}, [], ["k"], None]:
        assert parse(format_call("t", x=x, y=1), [tool]).calls == [Call("t", {"x": x, "y": 1})]
    for x in [1, [1], "k", True]:
        assert '"x" of "t" must be object or array of string or null' in parse(format_call("t", x=x), [tool]).calls[0].message
    bare = {"type": "function", "function": {"name": "t"}}
    assert "no argument" in parse(format_call("t", x=1), [bare]).calls[0].message
    assert parse(format_call("t"), [bare]).calls == [Call("t", {})]


def test_parse_agrees_with_the_parser_of_transformers():
    """An outside oracle, on the messages it can read at all: it has Qwen's rules and no errors."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    call = {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json"}
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {**call, "transform": {"type": "function", "function": "{content}"}},
            "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
        },
    }
    texts = [ADD, f"{ADD}\n{LOOK}", f"<think>\nhm\n</think>\n\n{ADD}", f"I add.\n{ADD}\n{ADD}", f"<think>x</think>I add.{ADD}"]
    for text in texts:
        try:
            theirs = tokenizer.parse_response(text, template, prefix="")
        except (TypeError, AttributeError) as error:
            pytest.skip(f"this transformers has another interface: {error}")
        ours = parse(text, TOOLS)
        called = [{"name": call.name, "arguments": call.arguments} for call in ours.calls]
        assert called == [one["function"] for one in theirs["tool_calls"]]
        assert (ours.thinking, ours.text) == (theirs.get("reasoning_content", "").strip(), theirs.get("content", "").strip())


def random_json(rng, depth=0):
    kinds = [lambda: rng.choice([None, True, False, 0, -7, 2.5, 10**20])]
    kinds += [lambda: "".join(rng.choices('ab"\\\n<>{}é🙂/', k=rng.randrange(8)))]
    kinds += [lambda: rng.choice(["</tool_call>", "<tool_call>", "<think>", "</think>", "\ud800", "<|im_end|>"])]
    if depth < 3:
        kinds += [lambda: [random_json(rng, depth + 1) for _ in range(rng.randrange(3))]]
        kinds += [lambda: {str(key): random_json(rng, depth + 1) for key in range(rng.randrange(3))}]
    return rng.choice(kinds)()


def test_format_call_and_parse_are_inverse():
    """A tag inside an argument ended the block early: what a policy wrote into its notes could break its own call."""
    rng = random.Random(0)
    for _ in range(500):
        arguments = {"flag": True, "thing": {}, "what": random_json(rng)}
        assert parse("So: " + format_call("put", **arguments), TOOLS) == Message("", "So:", [Call("put", arguments)])


# A message, as a grammar: a name stands for one of its productions, drawn at random; all else stands for itself.
GRAMMAR = {
    "MESSAGE": [["PART"] * n for n in range(8)],
    "PART": [["CALL"]] * 4 + [["THOUGHT"], ["TEXT"], ["TAG"], ["OBJECT"]],
    "THOUGHT": [["<think>", "TEXT", "CALL", "TEXT", "</think>"], ["<think>", "PART", "PART", "</think>"], ["<think>", "PART"]],
    "CALL": [[ADD], [LOOK], ["<tool_call>", "SPACE", "OBJECT", "SPACE", "</tool_call>"]] * 3
    + [["<tool_call>", "OBJECT"], ["<tool_call>", "OBJECT", "OBJECT", "</tool_call>"], ["<tool_call>", "CALL", "</tool_call>"]],
    "OBJECT": [['{"name": ', "NAME", ', "arguments": ', "ARGUMENTS", "}"]] * 3
    + [['{"arguments": ', "ARGUMENTS", ', "id": ', "VALUE", ', "name": ', "NAME", "}"], ['{"name": ', "NAME", "}"], ["VALUE"]],
    "NAME": [['"look"'], ['"add"'], ['"put"'], ['"fly"'], ["VALUE"]],
    "ARGUMENTS": [["{}"], ['{"a": ', "NUMBER", ', "b": ', "NUMBER", "}"], ['{"flag": true, "thing": {}, "what": ', "VALUE", "}"]],
    "VALUE": [["NUMBER"], ["STRING"], ["null"], ["true"], ["[", "VALUE", ", ", "VALUE", "]"], ['{"a": ', "VALUE", ', "b": ', "VALUE", "}"]],
    "NUMBER": [["0"], ["-7"], ["2.5"], ["1e999"], ["NaN"], ["-Infinity"], ["00"], ["9" * 5000], ["1E5"], ["-0.0"], ["1."]],
    "STRING": [['"', "TEXT", '"'], ['"', "TAG", '"'], ['"\\u003ctool_call\\u003e"'], ['"\\ud800"'], ["'"], ['"']],
    "TEXT": [[""], ["hm "], ["{"], ['"'], ["\\"], ["\n"], ["\x00"], ["é🙂"], ["\ud800"], ["<"], ["<|im_end|>"],
             ["assistant\n"], ["TEXT", "TEXT"]],
    "TAG": [["<tool_call>"], ["</tool_call>"], ["<think>"], ["</think>"], ["<tool_call"], ["< think>"], ["<TOOL_CALL>"], ["</", "TAG"]],
    "SPACE": [[""], ["\n"], [" \t\r\n"], ["\u00a0"]],
}


def generate(rng, symbol="MESSAGE", depth=0):
    if symbol not in GRAMMAR:
        return symbol
    productions = GRAMMAR[symbol] if depth < 12 else [min(GRAMMAR[symbol], key=len)]
    return "".join(generate(rng, part, depth + 1) for part in rng.choice(productions)) if depth < 40 else ""


def mutate(rng, text):
    """Cut out, double, swap or overwrite a piece, as an untrained model might."""
    a, b, c = sorted(rng.randrange(len(text) + 1) for _ in range(3))
    piece = rng.choice(["", "{", "}", '"', "<", "<think>", "</tool_call>", "\\", "\ud800", text[a:b] * 2])
    return rng.choice([text[:a] + text[b:], text[:a] + text[b:c] + text[a:b] + text[c:], text[:a] + piece + text[b:], text[:b]])


def blocks_by_definition(text):
    """What stands in each <tool_call>, and whether it was closed. Walks from tag to tag."""
    head, closed, tail = text.partition("</think>")
    rest = tail if closed and "<think>" not in head else text  # a thought that the prompt opened
    blocks = []
    while found := re.search("<think>|<tool_call>", rest):
        end = found[0].replace("<", "</")
        inside, closed, rest = rest[found.end() :].partition(end)
        if found[0] == "<tool_call>":
            blocks.append((inside.strip(), bool(closed)))
    return blocks


def fuzz(seed, cases):
    """Each Call is, name and arguments, the JSON object that its block of the text holds; nothing is repaired, merged or made up."""
    rng, seen = random.Random(seed), collections.Counter()
    for _ in range(cases):
        text = generate(rng)
        for _ in range(rng.choice([0, 0, 1, 3])):
            text = mutate(rng, text)
        message, blocks = parse(text, SCHEMAS), blocks_by_definition(text)
        assert len(message.calls) == len(blocks), text
        for call, (block, closed) in zip(message.calls, blocks):
            if isinstance(call, Call):
                assert closed, text
                pairs = json.loads(block, object_pairs_hook=list)  # as written, keys given twice among them
                assert len(dict(pairs)) == len(pairs), text
                found = json.loads(block)
                assert repr(call) == repr(Call(found["name"], found["arguments"])), text  # repr: True is not 1, nor 1.0
                inspect.signature(TOOLS[call.name]).bind(**call.arguments)
            seen[type(call).__name__] += 1
            if closed and f"<tool_call>\n{block}\n</tool_call>" in (ADD, LOOK):
                seen["well-formed"] += 1
                assert isinstance(call, Call), text
        seen["thoughts"] += bool(message.thinking)
    return seen


def test_fuzz_parse_never_raises_and_invents_no_call():
    """100,000 messages."""
    seen = fuzz(seed=1, cases=100_000)
    kinds = ("Call", "CallError", "well-formed", "thoughts")
    assert min(seen[kind] for kind in kinds) > 10_000, seen


def well_formed(rng):
    """A message of good calls, with the tools `add`, `look` and `fail`, and text between them."""
    parts = []
    for _ in range(rng.randrange(5)):
        call = format_call("add", a=rng.randrange(9), b=rng.randrange(9) / 2)
        parts += [rng.choice(["", "So: ", "\n"]), rng.choice([call, LOOK, format_call("fail")])]
    return "".join(parts)


def test_plain_run_is_parse_and_run_calls_on_a_well_formed_message():
    """The plain version at the top of the file and the one below the ruler give the same answers.
    """

    def fail() -> str:
        """Fail."""
        raise KeyError("no")

    toolbox, rng = {"add": add, "look": look, "fail": fail}, random.Random(5)
    for _ in range(100):
        text = well_formed(rng)
        observations = run(parse(text, toolbox).calls, toolbox)
        answers = plain_run(text, toolbox)
        assert [observation.text for observation in observations] == answers
        errors = [observation.error for observation in observations]
        assert errors == [answer.startswith("error: ") for answer in answers]


HOSTILE = {
    "open tags": "<tool_call>",
    "close tags": "</tool_call>",
    "empty calls": "<tool_call></tool_call>",
    "broken calls": "<tool_call>{</tool_call>",
    "open thinks": "<think>",
    "close thinks": "</think>",
    "thinks": "<think></think>",
    "both open": "<think><tool_call>",
    "half tags": "<tool_call",
    "angles": "<",
    "strings across blocks": '<tool_call>["</tool_call>","',
    "objects": '{"a":',
    "arrays": "[",
    "escapes": '"\\',
    "members": '"x",',
    "nested objects in a call": '{"a":',
    "nested calls": '<tool_call>{"name": "put", "arguments": {"what": ',
    "keys given twice": '"a": 1, ',
    "digits": "9",
}
INSIDE = {"members": "[", "escapes": "[", "nested objects in a call": "", "keys given twice": "{", "digits": "0."}



@pytest.mark.parametrize("case", HOSTILE)
def test_parse_takes_linear_time(case):
    """A lazy regex `<think>.*?</think>` is quadratic on a message of open tags: one episode stalled the whole batch."""
    prefix = "<tool_call>" + INSIDE[case] if case in INSIDE else ""

    def seconds(size):
        text = prefix + HOSTILE[case] * (size // len(HOSTILE[case]))
        gc.disable()  # it looks at all of PyTorch, too, when a threshold is passed
        try:
            start = time.thread_time()  # not the clock on the wall: the machine may be busy with something else
            parse(text, SCHEMAS)
            return time.thread_time() - start
        finally:
            gc.enable()

    assert any(seconds(1_000_000) < 3 * seconds(500_000) + 0.02 for _ in range(3))


# ---- run calls ----


class Unprintable:
    def __str__(self):
        raise ValueError("no text for you")


class UnprintableError(Exception):
    def __str__(self):
        raise SystemExit(3)


class Hanging:
    def __str__(self):
        threading.Event().wait()


def raising(error):
    def tool():
        raise error

    return tool


def araising(error):
    async def tool():
        raise error

    return tool


async def sleeps_async():
    await asyncio.sleep(60)


async def swallows_cancellation():
    for _ in range(10):  # not for ever: asyncio.run would wait for it at its end
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass


async def agives(value):
    return value


circular = {}
circular["self"] = circular
nested = []
for _ in range(100_000):
    nested = [nested]

# name: (tool, is it an error, what the observation holds)
HARM = {
    "hangs": (lambda: threading.Event().wait(), True, "took longer than 0.2 s and was abandoned"),
    "hangs, async": (sleeps_async, True, "took longer than 0.2 s and was abandoned"),
    "swallows cancellation": (swallows_cancellation, True, "abandoned"),
    "raises": (raising(KeyError("x\ny")), True, "error: KeyError: 'x\\ny'"),
    "raises, async": (araising(OSError("a\nb")), True, "error: OSError: a b"),
    "raises without text": (raising(UnprintableError()), True, "error: UnprintableError"),
    "raises a flood": (raising(ValueError("y" * 10_000_000)), True, "characters cut"),
    "exits": (lambda: sys.exit(1), True, "error: SystemExit: 1"),
    "exits, async": (araising(SystemExit(2)), True, "error: SystemExit: 2"),
    "interrupts": (raising(KeyboardInterrupt()), True, "error: KeyboardInterrupt"),
    "cancels": (raising(asyncio.CancelledError()), True, "error: CancelledError"),
    "cancels, async": (araising(asyncio.CancelledError()), True, "error: CancelledError"),
    "stops iteration": (raising(StopIteration(4)), True, "error: StopIteration: 4"),
    "recurses": (lambda: (lambda f: f(f))(lambda f: f(f)), True, "error: RecursionError"),
    "floods": (lambda: "z" * 10_000_000, False, "characters cut"),
    "floods in bytes": (lambda: b"z" * 10_000_000, False, "[... 9,999,500 characters cut ...]"),
    "bytes": (lambda: b"caf\xc3\xa9 \xff", False, "café \ufffd"),
    "NaN": (lambda: math.nan, False, "NaN"),
    "infinity in a list": (lambda: [math.inf, 1], False, "[Infinity, 1]"),
    "nothing": (lambda: None, False, "done"),
    "nothing, async": (agives, True, "TypeError"),
    "a number": (lambda: 7, False, "7"),
    "a dict": (lambda: {"a": [1, "é"]}, False, '{"a": [1, "é"]}'),
    "a set": (lambda: {1}, False, "{1}"),
    "a class": (lambda: int, False, "<class 'int'>"),
    "no text": (Unprintable, True, "error: ValueError: no text for you"),
    "a text that hangs": (Hanging, True, "abandoned"),
    "a circle": (lambda: circular, False, "{'self': {...}}"),
    "nested deeply": (lambda: nested, True, "RecursionError"),
    "10,000 digits": (lambda: 10**10_000, True, "ValueError"),
    "half a character": (lambda: "\ud800!", False, "?!"),
    "something to await": (lambda: agives(1), True, "async def"),
    "wrong arguments": (lambda x: x, True, "TypeError"),
}


def run(calls, toolbox, **limits):
    return asyncio.run(run_calls(calls, toolbox, **limits))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("case", HARM)
def test_contract_08_no_tool_can_hurt_the_run(case):
    """One bad tool in 400 killed runs of 500 (slime #2078), hung ones held slots for hours (miles #1012)."""
    tool, error, expected = HARM[case]
    toolbox = {"harm": tool, "look": look}
    timeout = 0.2 if "abandoned" in expected else 5
    start = time.perf_counter()
    calls = [LOOKED, Call("harm", {}), Call("look", {})]
    before, observation, after = run(calls, toolbox, timeout=timeout, max_chars=500)
    assert before == after == Observation("a room", error=False)
    assert observation.error is error and expected in observation.text, observation
    assert len(observation.text) < 560
    observation.text.encode("utf-8")  # a tokenizer would raise
    assert not error or (observation.text.startswith("error: ") and "\n" not in observation.text)
    assert time.perf_counter() - start < 3


def test_contract_08_hung_tools_do_not_block_each_other_nor_the_next_message():
    """In a pool of n threads, n hung tools are the end of all tools."""

    async def scenario():
        start = time.perf_counter()
        hung = {"hang": lambda: threading.Event().wait(), "look": look}
        for _ in range(3):
            observations = await run_calls([Call("hang", {}) for _ in range(16)], hung, timeout=0.1)
            assert all(observation.error for observation in observations)
        assert (await run_calls([Call("look", {})], hung))[0].text == "a room"
        return time.perf_counter() - start

    assert asyncio.run(scenario()) < 4


def test_contract_08_a_hung_tool_keeps_no_interpreter_alive(tmp_path):
    """Threads of a pool, and threads that are not daemons, are joined at exit. Also: tools.py works alone in an empty folder."""
    shutil.copy(tools.__file__, tmp_path)
    script = """
import asyncio, threading, tools
tools._demo()
def spin():
    while True: pass
calls = [tools.Call("wait", {}), tools.Call("spin", {})]
for observation in asyncio.run(tools.run_calls(calls, {"wait": threading.Event().wait, "spin": spin}, timeout=0.2)):
    print(observation.text)
"""
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, cwd=tmp_path, timeout=60, capture_output=True, text=True, check=True).stdout
    assert out.count("was abandoned") == 3 and "1267650600228229401496703205376" in out


def test_contract_08_a_tool_that_forks_or_prints_without_end_hurts_nobody(tmp_path):
    """The copy of the trainer that a fork makes ends where the tool does, silently: it answers no call and runs no second run.

    What a tool prints goes to the terminal (here to nowhere), not into memory, and not into the observation.
    """
    script = """
import asyncio, os, pathlib, re, sys, tools
def fork() -> str:
    return f"from {os.fork()}"
def loud() -> str:
    for _ in range(1000):
        print("x" * 10**6)
    return "said"
calls = [tools.Call("fork", {}), tools.Call("loud", {})]
forked, said = asyncio.run(tools.run_calls(calls, {"fork": fork, "loud": loud}, timeout=30))
child = int(forked.text.split()[1])
assert child and said.text == "said" and not forked.error
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) < 300_000
print(f"{os.getpid()} is still one", file=sys.stderr)
"""
    shutil.copy(tools.__file__, tmp_path)
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, cwd=tmp_path, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0 and re.fullmatch(r"\d+ is still one\n", out.stderr), out.stderr


def test_a_tool_that_ends_after_its_loop_is_closed_says_nothing(monkeypatch, caplog):
    """`call_soon_threadsafe` raises on a closed loop: tracebacks of threads filled the terminal after a run had ended."""
    release, said, idents = threading.Event(), [], []
    monkeypatch.setattr(sys, "unraisablehook", said.append)

    def late() -> bool:
        idents.append(threading.get_ident())
        return release.wait()

    assert run([Call("late", {})], {"late": late}, timeout=0.05)[0].error
    assert idents[0] in sys._current_frames()
    release.set()
    assert wait_until(lambda: idents[0] not in sys._current_frames())
    assert said == [] and caplog.records == []


def test_a_tool_that_ends_after_it_was_abandoned_says_nothing():
    """Setting a result that nobody waits for any more is an InvalidStateError, printed by the loop at each late call."""
    said = []

    async def scenario():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        release = threading.Event()
        assert (await run_calls([Call("late", {})], {"late": release.wait}, timeout=0.05))[0].error
        release.set()
        await asyncio.sleep(0.1)

    asyncio.run(scenario())
    assert said == []


@pytest.mark.parametrize("tool", [HARM["hangs"][0], sleeps_async, swallows_cancellation], ids=["thread", "async", "stubborn"])
def test_cancelling_an_episode_gets_through(tool):
    """CancelledError swallowed as "an error of the tool" made a run that could not be stopped."""

    async def scenario():
        task = asyncio.ensure_future(run_calls([Call("hang", {}), Call("look", {})], {"hang": tool, "look": look}, timeout=30))
        await asyncio.sleep(0.05)
        task.cancel()
        start = time.perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.perf_counter() - start

    assert asyncio.run(scenario()) < 0.35


def test_the_loop_goes_on_while_a_plain_tool_blocks():
    """A tool called in the loop's own thread stops every other episode, and the decoding of tokens."""

    async def scenario():
        ticks = 0
        task = asyncio.ensure_future(run_calls([Call("nap", {})], {"nap": lambda: time.sleep(0.2)}))
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(scenario()) > 5


def test_a_call_that_was_in_time_counts_even_if_the_event_loop_is_late():
    """The limit and the result wait in the same queue of a loop that was busy for longer than the limit."""

    async def scenario():
        ended = threading.Event()
        tools_here = {"quick": lambda: ended.set() or "in time"}
        task = asyncio.ensure_future(run_calls([Call("quick", {})], tools_here, timeout=0.3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ended.wait(10)  # blocks the loop
        time.sleep(0.5)
        return await task

    assert asyncio.run(scenario())[0].text == "in time"


def test_a_call_that_waits_for_a_core_is_not_charged_for_it(monkeypatch):
    """Its time limit is put off until it has a core. A cancelled call does not wait."""
    cores = threading.Semaphore(0)
    monkeypatch.setattr(tools, "_FREE_CORES", cores)

    async def works():
        await wait_for_core()
        return "worked"

    async def hangs():
        await wait_for_core()
        await asyncio.sleep(60)

    async def waits_twice():
        await asyncio.gather(works(), works())
        return "worked twice"

    async def scenario():
        tasks = [asyncio.ensure_future(run_calls([Call("tool", {})], {"tool": tool}, timeout=0.3))
                 for tool in (works, hangs, waits_twice, works)]
        await asyncio.sleep(1)
        assert not any(task.done() for task in tasks)
        tasks[-1].cancel()
        await asyncio.wait({tasks[-1]})
        cores.release(4)
        return await asyncio.gather(*tasks, return_exceptions=True)

    (worked,), (hung,), (twice,), cancelled = asyncio.run(scenario())
    assert (worked.text, twice.text) == ("worked", "worked twice")
    assert hung.text == "error: tool took longer than 0.3 s and was abandoned"
    assert isinstance(cancelled, asyncio.CancelledError)
    assert not cores.acquire(blocking=False), "four cores were taken: none by the cancelled call"


def test_a_call_that_is_over_keeps_no_environment_alive():
    """Its thread ends with it."""

    class World:
        def tell(self) -> int:
            return threading.get_ident()

    async def scenario():
        world = World()
        for _ in range(50):
            await run_calls([Call("tell", {})], tools_of(world))
        return weakref.ref(world)

    world = asyncio.run(scenario())
    assert wait_until(lambda: gc.collect() >= 0 and world() is None)


def test_no_more_threads_is_an_error_of_the_call(monkeypatch):
    """When abandoned ones hold all that the system gives."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    async def alook():
        return "a room"

    monkeypatch.setattr(tools._thread, "start_new_thread", refuse)
    refused = Observation("error: RuntimeError: can't start new thread", error=True)
    observations = run([Call("look", {}), Call("alook", {})], {"look": look, "alook": alook})
    assert observations == [refused, refused]


def test_a_thread_hands_on_whatever_ends_it():
    """Python drops a SystemExit of a thread in silence: its future was never done."""
    exits, fails = tools.start_thread(lambda: sys.exit(3)), tools.start_thread(lambda: 1 / 0)
    assert repr(exits.exception(5)) == "RuntimeError('SystemExit: 3')"
    assert isinstance(fails.exception(5), ZeroDivisionError)


def test_a_safe_tool_refuses_what_json_cannot_express():
    """An agent in Python passes any object. A tuple was a KeyError inside the agent."""
    [safe] = tools.safe_tools({"calculator": calculator}, timeout=5)
    said = 'error: argument "expression" of "calculator" must be string, not [1, 2]. '
    assert safe((1, 2)).startswith(said)
    for value in ({1, 2}, b"1", circular, nested):
        assert safe(value).startswith("error: ")


def test_contract_09_results_come_back_in_call_order():
    """`as_completed` order gave the answer of the second search to the first question."""

    def slow():
        time.sleep(0.4)
        return "slow"

    async def aslow():
        await asyncio.sleep(0.1)
        return "aslow"

    toolbox = {"slow": slow, "fast": lambda: "fast", "aslow": aslow, "fail": raising(ValueError("no"))}
    names = ["slow", "fast", "aslow", "fail", "broken", "slow", "unknown", "fast"]
    calls = [CallError("bad") if name == "broken" else Call(name, {}) for name in names]
    start = time.perf_counter()
    texts = [observation.text for observation in run(calls, toolbox)]
    expected = ["slow", "fast", "aslow", "error: ValueError: no", "error: bad", "slow", "error: there is no such tool", "fast"]
    assert texts == expected
    assert time.perf_counter() - start < 0.75, "they ran one after the other"


def test_contract_09_methods_of_one_object_take_turns_in_call_order():
    """Two moves of one message, in two threads, race: the same tokens lead to two different mazes, once in many episodes."""

    class World:
        def __init__(self):
            self.steps = []

        def step(self, to: int, seconds: float) -> str:
            before = list(self.steps)
            time.sleep(seconds)
            self.steps = [*before, to]
            return str(self.steps)

    world = World()
    calls = [Call("step", {"to": n, "seconds": 0.03 if n == 0 else 0}) for n in range(8)]
    assert run(calls, tools_of(world))[-1].text == str(list(range(8)))
    other, pair = World(), [Call("a", {"to": 1, "seconds": 0.3}), Call("b", {"to": 2, "seconds": 0.3})]
    start = time.perf_counter()
    run(pair, {"a": world.step, "b": other.step})
    assert time.perf_counter() - start < 0.55, "two objects need not wait for each other"


def test_calls_beyond_the_limit_do_not_run():
    """A message of "<tool_call>" blocks only would start a thread for each."""
    ran = []
    observations = run([Call("note", {"x": n}) for n in range(40)], {"note": lambda x: ran.append(x)}, max_calls=4)
    assert sorted(ran) == [0, 1, 2, 3] and len(observations) == 40
    assert [observation.error for observation in observations] == [False] * 4 + [True] * 36


def test_clip_keeps_head_and_tail_within_bounds():
    rng = random.Random(2)
    for _ in range(300):
        text, limit = "ab" * rng.randrange(50), rng.randrange(60)
        clipped = clip(text, limit)
        if len(text) <= limit:
            assert clipped == text
        else:
            head, mark, tail = clipped.partition(f" [... {len(text) - limit:,} characters cut ...] ")
            assert mark and len(head) + len(tail) == limit and text.startswith(head) and text.endswith(tail)


# ---- calculator ----


def random_expression(rng, depth=0):
    if depth > 3 or rng.random() < 0.25:
        return rng.choice([str(rng.randrange(100)), f"{rng.uniform(0, 100):.2f}", str(rng.randrange(3))])
    left, right = random_expression(rng, depth + 1), random_expression(rng, depth + 1)
    kind = rng.randrange(8)
    if kind == 0:
        return f"-{left}" if not left.startswith("-") else f"({left})"
    if kind == 1:
        return f"({rng.randrange(20)}) ** {rng.randrange(4)}"
    return f"({left} {rng.choice(['+', '-', '*', '/', '//', '%'])} {right})"


def test_calculator_agrees_with_python():
    """Python's own `eval` is the oracle, on expressions that hold nothing but arithmetic."""
    rng, failed = random.Random(3), 0
    for _ in range(3000):
        expression = random_expression(rng)
        try:
            expected = eval(expression)  # noqa: S307 (built above, from numbers and operators)
        except ZeroDivisionError:
            failed += 1
            with pytest.raises(ValueError, match="division by zero"):
                calculator(expression)
            continue
        got = calculator(expression)
        assert math.isclose(float(got), expected, rel_tol=1e-11, abs_tol=1e-11), expression
        if isinstance(expected, int):
            assert got == str(expected)
    assert failed < 1000


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("123456789 * 987654321 * 1000000007", str(123456789 * 987654321 * 1000000007)),
        ("10**30 / 10", str(10**29)),  # as floats: 99999999999999991433150857216
        ("6 / 2", "3"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333"),
        ("1234567890123457 / 2", "6.17283945062e+14"),
        ("2 ** -1", "0.5"),
        ("-0.0", "0"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** 0.5", "1.41421356237"),
        (" ( 1 + 2 ) * 3 ", "9"),
        ("1e3", "1000"),
        ("--3", "3"),
        ("1 ** (10 ** 200)", "1"),
    ],
)
def test_calculator_prints_what_a_person_would(expression, value):
    """Whole numbers are exact; floats are rounded to 12 digits, so 0.1 + 0.2 is no 0.30000000000000004 to copy."""
    assert calculator(expression) == value


ESCAPES = ["().__class__.__base__.__subclasses__()", "__import__('os').system('true')", "open('x')", "x"]
ESCAPES += [
    "print",
    "lambda: 1",
    "import os",
    "[1][0]",
    "(1, 2)",
    "1,000 + 1",
    "'a' * 3",
    "f'{1}'",
    "True + 1",
    "1j",
    "None",
    "1 if 1 else 2",
]
ESCAPES += [
    "1 < 2",
    "1 and 2",
    "not 1",
    "~1",
    "1 << 9999999",
    "1 ^ 2",
    "1 | 2",
    "1 @ 2",
    "(a := 1)",
    "[x for x in (1,)]",
    "yield",
    "await x",
]
ESCAPES += ["1; 2", "1\n2", "...", "", " ", "\x00", "1 +", "((1)", "½", "\ud800", "🙂"]
TOO_LARGE = ["9**9**9", "10**10**10", "2**10000", "10**300", "(10**299)*(10**299)", "*".join(["999999999"] * 49), "0.5 ** -10000"]
TOO_LARGE += ["1e999", "1e308 * 10", "9" * 400, "9" * 10_000, "1e200 // 1e-200", "9" * 400 + "." + "9" * 50 + "e999"]
UNDEFINED = ["0 ** -1", "5 % 0", "5 // 0.0", "1 / 0", "(-8) ** 0.5", "(-8) ** (1/3)"]
NESTED = ["(" * 249 + "1" + ")" * 249, "-" * 498 + "(", "(" * 10_000 + "1" + ")" * 10_000, "[" * 400]
ESCAPES += TOO_LARGE + UNDEFINED + NESTED


@pytest.mark.parametrize("expression", ESCAPES, ids=range(len(ESCAPES)))
def test_calculator_refuses_all_else_at_once(expression):
    """`eval` with empty builtins, and blocklists of strings, were escaped or hung in three public projects."""
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        calculator(expression)
    assert time.perf_counter() - start < 0.5
    assert str(error.value) and len(str(error.value)) < 300


def test_calculator_survives_depth():
    """Python's parser and a recursive walk have limits of their own: a RecursionError or MemoryError is no ValueError."""
    for expression in ["-" * 499 + "1", "+" * 499 + "1", "1" + "+1" * 249, "2" + "**1" * 166, "(" * 190 + "1" + ")" * 190]:
        try:
            assert calculator(expression) in ("-1", "1", "2", "250")
        except ValueError as error:
            assert "nested" in str(error)

    def deep(levels):
        return deep(levels - 1) if levels else calculator("-" * 400 + "1")

    with pytest.raises(ValueError, match="nested"):  # called from deep inside a program
        deep(sys.getrecursionlimit() - len(inspect.stack()) - 300)


def test_the_examples_of_the_docstrings_are_true():
    results = doctest.testmod(tools)
    assert results.attempted >= 8 and results.failed == 0
    assert pathlib.Path(tools.__file__).read_text().isascii()
