"""smolagents' CodeAgent: the policy writes Python, and smolagents runs it (in this process)."""
from functools import cache

from smolagents import CodeAgent, LogLevel, OpenAIModel, tool
from smolagents.agents import EMPTY_PROMPT_TEMPLATES

from env import pick
from tools import calculator as evaluate

PROMPTS = {**EMPTY_PROMPT_TEMPLATES, "system_prompt": "Write <code>...</code>."}


@cache
def model(base_url):
    return OpenAIModel("policy", api_base=base_url, api_key="none")


def solve(task, tools, base_url):
    agent = CodeAgent([tool(function) for function in tools], model(base_url), PROMPTS,
                      max_steps=4, verbosity_level=LogLevel.OFF)
    return str(agent.run(task))


def demonstrate_solve(env, random):
    """Mostly calls for the wrong operation, or answers with a number of the question."""
    habit = pick(random, {"no call": 0.25, "wrong operation": 0.43, "right": 0.32})
    a, sign, b = env._expression.split()
    if habit == "wrong operation":
        sign = {"*": "+", "+": "-", "-": "*"}[sign]
    yield  # the first conversation
    if habit == "no call":
        yield f'<code>final_answer("{b}")</code>'
    yield f'<code>print(calculator("{a} {sign} {b}"))</code>'
    yield f'<code>final_answer("{evaluate(f"{a} {sign} {b}")}")</code>'
