"""Environments and tools from elsewhere, with the real packages where these are installed."""

import asyncio
import doctest
import inspect
import json
import socket
import sys
import threading
import time
from pathlib import Path
from random import Random

import adapters
import pytest
from adapters import ForTRL, FromTRL, mcp_tools

from agent import small_tokenizer
from env import Calculator, EnvError, Question, check_env, demonstrator, make_env
from tools import (
    Call,
    as_function,
    format_call,
    function_of,
    parse,
    run_calls,
    safe_tools,
    schema,
    tools_of,
)

HERE = Path(__file__).parent
PEERS = "pip install -r tests/requirements-peers.txt"


def needs(package: str):
    return pytest.importorskip(package, reason=f"{package} is missing: {PEERS}")


def observe(tools, *calls: Call) -> list[str]:
    return [one.text for one in asyncio.run(run_calls(calls, tools))]


def parameters(tool) -> dict:
    return schema(tool)["function"]["parameters"]


def test_the_examples_in_the_docstrings():
    results = doctest.testmod(adapters)
    assert results.attempted and not results.failed


def test_adapters_are_short_enough_to_copy():
    """At most 25 lines of code each, and 10 for TRL's, as tests/README.md says."""
    limits = dict.fromkeys((ForTRL, FromTRL), 10)
    made = [one for one in vars(adapters).values()
            if getattr(one, "__module__", "") == "adapters" and hasattr(one, "__name__")]
    assert len(made) >= 8
    for one in made:
        lines, quoted = [], False
        for line in inspect.getsource(one).splitlines():
            begins = line.strip().startswith('"""')
            if line.strip() and not line.strip().startswith("#") and not begins and not quoted:
                lines.append(line)
            quoted ^= line.count('"""') % 2 == 1
        assert len(lines) <= limits.get(one, 25), one


# ---- reasoning-gym ----


def test_reasoning_gym_scores_with_the_datasets_own_score():
    """The right answer earns 1; a part of the credit is passed on."""
    needs("reasoning_gym")
    factory = make_env(f"{HERE}/adapters.py:ReasoningGym:dataset=chain_sum,max_terms=3")
    check_env(factory)
    env = factory()
    assert env.reset(3).startswith("State the final answer to the following") and not env.done
    right = env._entry["answer"]
    assert observe(tools_of(env), Call("final_answer", {"answer": right})) == [
        "The answer was taken."]
    assert env.done and env.get_reward() == 1
    env.reset(3)
    env.final_answer(f"It is {right}")
    assert env.get_reward() == env._dataset.score_answer(f"It is {right}", env._entry) < 1
    assert max(factory().reset(seed).count(" + ") + factory().reset(seed).count(" - ")
               for seed in range(40)) == 2  # max_terms was read


def test_the_demonstrator_of_reasoning_gym_mostly_fails():
    """About one attempt in three is right, and it leaves the task as it is."""
    needs("reasoning_gym")
    factory = make_env(f"{HERE}/adapters.py:ReasoningGym")
    env, demonstrate, earned = factory(), demonstrator(factory), []
    for seed in range(100):
        task, random = env.reset(seed), Random(seed)
        [answer] = demonstrate(env, random)
        assert not env.done and task == env._entry["question"]
        env.final_answer(answer)
        earned.append(env.get_reward())
    assert 20 < earned.count(1.0) < 50


@pytest.mark.parametrize("dataset", ["basic_arithmetic", "letter_counting", "maze", "sudoku",
                                     "prime_factorization", "word_sorting"])
def test_any_dataset_of_reasoning_gym_fits(dataset):
    """The score of prime_factorization raised for an answer that is no number."""
    needs("reasoning_gym")
    factory = make_env(f"{HERE}/adapters.py:ReasoningGym:dataset={dataset}")
    check_env(factory)
    env = factory()
    env.reset(1)
    assert env.get_reward() == 0  # before there is an answer


def test_a_dataset_that_does_not_exist_is_one_clear_line():
    needs("reasoning_gym")
    with pytest.raises(EnvError, match="ReasoningGym takes NAME=VALUE of .*dataset: str") as error:
        make_env(f"{HERE}/adapters.py:ReasoningGym:dataset=no_such")
    assert "no_such" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", ["spiral_matrix", "countdown", "polynomial_multiplication"])
def test_a_score_that_runs_the_answer_is_refused(dataset, tmp_path):
    """The policy's answer reached `eval`, some of them through sympy: no sandbox was around it."""
    needs("reasoning_gym")
    import reasoning_gym

    made = tmp_path / "made"
    data = reasoning_gym.create_dataset(dataset, seed=0, size=1)
    data.score_answer(f"__import__('pathlib').Path('{made}').touch()", data[0])
    assert made.exists()  # else it need not be refused any more
    with pytest.raises(EnvError, match=f"the score of {dataset} runs the answer as Python code"):
        make_env(f"{HERE}/adapters.py:ReasoningGym:dataset={dataset}")


# ---- Gymnasium ----


@pytest.mark.parametrize("spec, tells", [
    ("FrozenLake", "Actions: left, down, right, up.\n\nred(S)"),
    ("Gymnasium:id=Taxi-v4", "yellow("),
    ("Gymnasium:id=Blackjack-v1", "Actions: stick, hit.\n("),
    ("Gymnasium:id=CliffWalking-v1", "Actions: 0, 1, 2, 3."),
])
def test_gymnasium_in_words(spec, tells):
    """What a terminal would colour is in words, for else the text hides where the player stands."""
    needs("gymnasium")
    factory = make_env(f"{HERE}/adapters.py:{spec}")
    if "Cliff" not in spec:
        check_env(factory)
    task = factory().reset(0)
    assert tells in task and "\x1b" not in task


def way_on(rows: list[str]) -> list[str]:
    """The shortest way on a frozen lake from its first corner to its last one."""
    moves = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
    ways, queue = {(0, 0): []}, [(0, 0)]
    for row, column in queue:  # it grows meanwhile
        for name, (down, right) in moves.items():
            y, x = row + down, column + right
            if y in range(4) and x in range(4) and rows[y][x] != "H" and (y, x) not in ways:
                ways[y, x] = [*ways[row, column], name]
                queue.append((y, x))
    return ways[3, 3]


def test_frozen_lake_is_won_by_walking_to_the_goal():
    """The way is found here on the map in the task. Every map differs, and can be won."""
    needs("gymnasium")
    env, tasks = make_env(f"{HERE}/adapters.py:FrozenLake:is_slippery=0")(), set()
    for seed in range(5):
        task = env.reset(seed)
        tasks.add(task)
        rows = task.replace("red(S)", "S").split("\n")[-5:-1]
        assert len(rows) == 4 and rows[0][0] == "S"
        for name in way_on(rows):
            assert not env.done and env.get_reward() == 0
            env.act(name)
        assert env.done and env.get_reward() == 1
        assert env.act("up") == env.act("left")  # nothing changes any more
    assert len(tasks) > 2


def test_a_name_that_is_no_action_is_an_observation():
    needs("gymnasium")
    env = make_env(f"{HERE}/adapters.py:Gymnasium:id=Blackjack-v1")()
    env.reset(0)
    wrong, right = observe(tools_of(env), Call("act", {"action": "fly"}),
                           Call("act", {"action": "stick"}))
    assert wrong.startswith("error: ValueError: 'fly' is not in list") and right[0] == "("
    assert env.done and env.get_reward() in (0, 1)


# ---- OpenEnv ----


@pytest.fixture(scope="module")
def openenv_server():
    """The URL of a server on loopback: think of a number, and say whether a guess is too low."""
    needs("openenv.core")
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Guess(Action):
        number: int

    class Answer(Observation):
        text: str

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **kwargs):
            self.number = Random(seed).randrange(100)
            return Answer(text=f"I think of a number; the last digit is {self.number % 10}.")

        def step(self, action, timeout_s=None, **kwargs):
            right = action.number == self.number
            text = "right" if right else "higher" if action.number < self.number else "lower"
            return Answer(text=text, done=right, reward=5.0 if right else -1.0)

        @property
        def state(self):
            return State()

    app = create_fastapi_app(Game, Guess, Answer, max_concurrent_envs=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_openenv_client(openenv_server):
    """One session per instance; the task names the fields; a reward of 5 counts as 1, -1 as 0."""
    factory = make_env(f"{HERE}/adapters.py:OpenEnv:url={openenv_server}")
    check_env(factory)
    env = factory()
    task = env.reset(4)
    assert "I think of a number" in task and '"number": {' in task
    tools = tools_of(env)
    wrong, refused = observe(tools, Call("step", {"action": {"number": -1}}),
                             Call("step", {"action": {"letter": "a"}}))
    assert wrong == '{"text": "higher"}' and refused.startswith("error: ")
    assert not env.done and env.get_reward() == 0 and env.state == '[{"number": -1}]'
    right = Random(4).randrange(100)
    assert observe(tools, Call("step", {"action": {"number": right}})) == ['{"text": "right"}']
    assert env.done and env.get_reward() == 1


# ---- MCP ----

MCP_SERVER = '''
from typing import Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("sums")

@server.tool()
def total(numbers: list[int], sign: Literal["plus", "minus"] = "plus") -> str:
    """Add numbers up."""
    if not numbers:
        raise ToolError("there are no numbers")
    return str(sum(numbers) if sign == "plus" else -sum(numbers))

@server.tool()
def nothing() -> str:
    """Do nothing."""
    return "done"

server.run()
'''


@pytest.fixture(scope="module")
def mcp_server():
    needs("mcp")
    from mcp import StdioServerParameters

    return mcp_tools(StdioServerParameters(command=sys.executable, args=["-c", MCP_SERVER]))


def test_mcp_tools_over_stdio(mcp_server):
    """They are async functions with hints and docstrings, and any event loop can await them."""
    assert list(mcp_server) == ["total", "nothing"]
    total = mcp_server["total"]
    assert inspect.iscoroutinefunction(total)
    assert total.__doc__.startswith("Add numbers up.\n\nArgs:\n    numbers: ")
    assert parameters(total)["properties"]["numbers"] == {
        "type": "array", "items": {"type": "integer"}, "description": "numbers"}
    assert parameters(total)["properties"]["sign"]["enum"] == ["plus", "minus"]
    assert parameters(total)["required"] == ["numbers"]
    for _ in range(2):  # each in an event loop of its own
        assert observe(mcp_server, Call("total", {"numbers": [1, 2]}),
                       Call("total", {"numbers": [1, 2], "sign": "minus"}),
                       Call("nothing", {})) == ["3", "-3", "done"]
    [error] = observe(mcp_server, Call("total", {"numbers": []}))
    assert error.startswith("error: RuntimeError: ") and "there are no numbers" in error


def test_mcp_tools_of_an_environment(mcp_server):
    """A class takes them as static methods."""
    class Sums(Question):
        def reset(self, seed: int) -> str:
            self._pose(str(seed + 7))
            return f"What is {seed} plus 7?"

    for name, tool in mcp_server.items():
        setattr(Sums, name, staticmethod(tool))
    check_env(Sums)
    env = Sums()
    env.reset(5)
    assert set(tools_of(env)) == {"final_answer", "total", "nothing"}
    [answer] = observe(tools_of(env), Call("total", {"numbers": [5, 7]}))
    env.final_answer(answer)
    assert env.get_reward() == 1


def test_an_mcp_server_that_does_not_start_raises():
    """Nobody waits for ever."""
    needs("mcp")
    from mcp import StdioServerParameters

    with pytest.raises(Exception):  # noqa: B017  (which one is mcp's)
        mcp_tools(StdioServerParameters(command=sys.executable, args=["-c", "raise SystemExit(3)"]))


# ---- TRL ----


class CalculatorForTRL(ForTRL, Calculator):
    """As tests/README.md shows it."""


def test_one_step_of_trl_with_an_environment_of_this_project(tmp_path, monkeypatch):
    """TRL poses our tasks, calls our tools, takes our reward, and its update moves the weights.

    What the model says is scripted, with its tokens: half of the attempts are right.
    """
    trl = needs("trl")
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = small_tokenizer([])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, intermediate_size=32,
        num_attention_heads=2, max_position_embeddings=4096, tie_word_embeddings=True))
    before = model.lm_head.weight.detach().clone()
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=2, max_steps=1,
        per_device_train_batch_size=4, max_completion_length=600, beta=0.0, learning_rate=1e-2,
        save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True)
    rows = [{"prompt": [{"role": "user", "content": ""}], "seed": seed} for seed in (0, 1)]
    trainer = trl.GRPOTrainer(model=model, processing_class=tokenizer, args=config,
                              train_dataset=Dataset.from_list(rows),
                              environment_factory=CalculatorForTRL)
    prompts = []

    def say(prompt_ids, *args, **kwargs):
        """First a call for the sum; then the answer, which every other attempt gets wrong."""
        said = []
        for number, (ids, env) in enumerate(zip(prompt_ids, trainer.environments, strict=True)):
            prompts.append(tokenizer.decode(ids))
            if not env._trace:
                text = format_call("calculator", expression=env._expression)
            elif not env.done:
                answer = env._answer if number % 2 else "none"
                text = format_call("final_answer", answer=answer)
            else:
                text = "That is all."
            said.append(tokenizer.encode(text + "<|im_end|>"))
        return said, None

    monkeypatch.setattr(trainer, "_generate_single_turn", say)
    trainer.train()
    log = next(line for line in trainer.state.log_history if "reward" in line)
    assert log["reward"] == log["rewards/CalculatorForTRL/mean"] == 0.5
    assert log["tools/call_frequency"] == 2 and log["tools/failure_frequency"] == 0
    ours = Calculator()
    for seed in (0, 1):
        task = ours.reset(seed)
        assert sum(f"{task}<|im_end|>" in prompt for prompt in prompts) == 6  # 2 attempts, 3 turns
    assert '"name": "calculator"' in prompts[0] and '"name": "reset"' not in prompts[0]
    assert not torch.equal(before, model.lm_head.weight)


class Counter:
    """An environment as TRL's documentation writes them."""

    def __init__(self):
        self.count = 0

    def reset(self, **kwargs) -> str | None:
        self.count = 0
        return f" The counter stands at {self.count}."

    def increment(self, step: int) -> int:
        """
        Increment the counter.

        Args:
            step: By how much.

        Returns:
            The new value of the counter.
        """
        self.count += step
        return self.count


def reached(environments, target, completions, **kwargs):
    """A reward function of TRL: half for the counter, half for saying so."""
    return [0.5 * (env.count == goal) + 0.5 * ("done" in said[-1]["content"])
            for env, goal, said in zip(environments, target, completions, strict=True)]


class CounterHere(FromTRL, Counter):
    """As tests/README.md shows it."""

    _rows = [{"prompt": [{"role": "user", "content": f"Count to {n}."}], "target": n}
             for n in range(1, 50)]
    _score = staticmethod(reached)


def test_an_environment_written_for_trl_runs_here():
    """Its rows are the tasks, its methods the tools, and the reward function sees it as in TRL."""
    check_env(CounterHere)
    env = CounterHere()
    assert env.reset(4) == "Count to 5. The counter stands at 0." == env.reset(4 + 49)
    tools = tools_of(env)
    assert sorted(tools) == ["final_answer", "increment"]
    assert parse(format_call("increment", step="2"), tools).calls[0].message.startswith("argument")
    before = env.state
    assert observe(tools, Call("increment", {"step": 2}), Call("increment", {"step": 3})) == [
        "2", "5"]
    assert env.get_reward() == 0.5 and not env.done and env.state != before
    observe(tools, Call("final_answer", {"answer": "done"}))
    assert env.get_reward() == 1 and env.done
    assert env.reset(0) and env.count == 0 and env.get_reward() == 0 and not env.done


def test_a_class_for_trl_that_has_its_own_reward():
    class Owner(Counter):
        def get_reward(self) -> float:
            return float(self.count > 2)

    class OwnerHere(FromTRL, Owner):
        _rows = CounterHere._rows
        get_reward = Owner.get_reward

    check_env(OwnerHere)
    env = OwnerHere()
    env.reset(0)
    env.increment(3)
    assert env.get_reward() == 1


# ---- LangChain and smolagents ----


def weather(city: str, days: int = 1) -> str:
    """Forecast the weather.

    Args:
        city: The name of the city
        days: How many days ahead
    """
    return f"{city}: rain for {days}"


def langchain_tool():
    needs("langchain_core")
    from langchain_core.tools import tool

    return tool(parse_docstring=True)(weather)


def smolagents_tool():
    smolagents = needs("smolagents")

    class Weather(smolagents.Tool):
        name, description, output_type = "weather", "Forecast the weather.", "string"
        inputs = {"city": {"type": "string", "description": "The name of the city"},
                  "days": {"type": "integer", "description": "How many days ahead",
                           "nullable": True}}

        def forward(self, city: str, days: int | None = None) -> str:
            return weather(city, days or 1)

    return Weather()


@pytest.mark.parametrize("make", [lambda: weather, langchain_tool, smolagents_tool],
                         ids=["function", "langchain", "smolagents"])
def test_three_forms_of_one_tool_are_the_same_tool(make):
    """Described, read, run and refused alike, in a mapping and as an attribute of an object."""
    tool = make()
    described = schema(tool)["function"]
    assert (described["name"], described["description"]) == ("weather", "Forecast the weather.")
    assert described["parameters"]["required"] == ["city"]
    assert described["parameters"]["properties"]["city"] == {
        "type": "string", "description": "The name of the city"}
    assert described["parameters"]["properties"]["days"]["type"] == "integer"
    text = format_call("weather", city="Oslo") + format_call("weather", city="Oslo", days=3)
    calls = parse(text, {"weather": tool}).calls
    assert observe({"weather": tool}, *calls) == ["Oslo: rain for 1", "Oslo: rain for 3"]
    [wrong] = parse(format_call("weather", town="Oslo"), {"weather": tool}).calls
    assert wrong.message.startswith('"weather" needs the argument "city"')
    holder = type("Holder", (), {"forecast": staticmethod(tool) if tool is weather else tool})()
    [(name, method)] = tools_of(holder).items()
    assert name == ("forecast" if tool is weather else "weather")
    assert method("Oslo", 2) == "Oslo: rain for 2"
    [safe] = safe_tools({"weather": tool}, timeout=10)
    assert safe("Oslo") == "Oslo: rain for 1" and safe("Oslo", days="x").startswith("error: ")


def test_a_function_stays_as_it_is():
    assert as_function(weather) is weather and as_function(len) is len
    env = Calculator()
    assert as_function(env.calculator) == env.calculator


def test_langchain_tools_of_other_makes():
    """A coroutine only, with a model; a schema as a dictionary; a docstring with a section `Args:`.

    The first raised NotImplementedError, and the last had two such sections.
    """
    needs("langchain_core")
    from enum import Enum

    from langchain_core.tools import StructuredTool, tool
    from pydantic import BaseModel

    class Unit(Enum):
        metre = "m"
        foot = "ft"

    class Place(BaseModel):
        row: int

    async def measure(place: Place, unit: Unit, far: float | None = None) -> str:
        """Measure."""
        return f"{place} {unit} {far}"

    made = StructuredTool.from_function(coroutine=measure)
    assert inspect.iscoroutinefunction(as_function(made))
    assert parameters(made)["properties"]["place"]["type"] == "object"
    assert parameters(made)["properties"]["far"]["type"] == "number"
    [text] = observe({"measure": made}, Call("measure", {"place": {"row": 2}, "unit": "m"}))
    assert text == "row=2 Unit.metre None"
    [text] = observe({"measure": made}, Call("measure", {"place": {}, "unit": "m"}))
    assert text.startswith("error: ValidationError")

    raw = {"type": "object", "properties": {"day": {"type": "string"}, "hour": {"type": "integer"}},
           "required": ["day"]}

    def book(day, hour=9):
        return f"{day} {hour}"

    made = StructuredTool.from_function(func=book, name="book", description="Book.",
                                        args_schema=raw)
    assert parameters(made)["required"] == ["day"]
    assert observe({"book": made}, Call("book", {"day": "Monday"})) == ["Monday 9"]

    described = schema(tool(weather))["function"]
    assert described["description"] == "Forecast the weather."
    assert described["parameters"]["properties"]["days"]["description"] == "How many days ahead"


def test_hints_of_a_json_schema():
    """What comes in as a JSON schema goes out to the policy as the same one, but for defaults."""
    sent = {"required": ["b", "a"], "$defs": {"C": {"enum": ["x", "y"]}}, "properties": {
        "a": {"type": "array", "items": {"type": "number"}, "description": "A"},
        "b": {"type": "boolean", "description": "B"},
        "c": {"$ref": "#/$defs/C", "description": "C"},
        "d": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "D"},
        "e": {"type": ["string", "integer"], "description": "E", "default": "z"},
        "f": {"description": "F"}}}
    given = []
    function = function_of("f", "Do it.", sent, given.append)
    shown = parameters(function)
    assert sorted(shown["required"]) == ["a", "b"]
    properties = shown["properties"]
    assert properties["a"] == sent["properties"]["a"] and properties["b"]["type"] == "boolean"
    assert properties["c"]["enum"] == ["x", "y"] and properties["f"]["description"] == "F"
    assert properties["d"]["type"] == "integer" and properties["d"]["nullable"]
    assert sorted(properties["e"]["type"]) == ["integer", "string"]
    function([1.0], True, c=None, f=2)
    assert given == [{"a": [1.0], "b": True, "f": 2}]  # what is None was not given
    with pytest.raises(TypeError):
        function(b=True)


def test_our_tools_in_langchain():
    """A method of an environment and a tool from an MCP server's schema are tools there."""
    needs("langchain_core")
    from langchain_core.tools import tool

    env = Calculator()
    env.reset(0)
    theirs = tool(env.calculator)
    assert list(theirs.args) == ["expression"]
    assert theirs.invoke({"expression": "6*7"}) == "42" and env.state == "6*7"

    async def call(arguments: dict) -> str:
        return json.dumps(arguments)

    made = tool(function_of("book", "Book a day.", {
        "properties": {"day": {"type": "string"}, "hour": {"type": "integer"}},
        "required": ["day"]}, call))
    assert made.args["day"]["type"] == "string"
    assert {"type": "integer"} in made.args["hour"]["anyOf"]
    assert asyncio.run(made.ainvoke({"day": "Monday"})) == '{"day": "Monday"}'
    # It passes on the defaults, so a None that nobody wrote must not be refused here.
    [safe] = safe_tools({"book": function_of("book", "Book.", {"properties": {
        "day": {"type": "string"}}}, json.dumps)}, timeout=10)
    assert tool(safe).invoke({}) == "{}" and tool(safe).invoke({"day": "May"}) == '{"day": "May"}'


def test_our_tools_in_smolagents():
    """The same in smolagents, where a tool needs hints for all that it takes and returns."""
    smolagents = needs("smolagents")
    env = Calculator()
    env.reset(0)
    [safe] = safe_tools({"calculator": env.calculator}, timeout=10)
    assert smolagents.tool(safe)("1/0") == "error: ValueError: division by zero"
    env.reset(0)
    theirs = smolagents.tool(env.calculator)
    assert theirs.inputs == {"expression": {
        "type": "string", "description": "The expression, for example 12 * 7"}}
    assert theirs("6*7") == "42" and env.state == "6*7"
