"""smolagents' ToolCallingAgent, with prompts that are short enough for a small model."""
from functools import cache

from smolagents import LogLevel, OpenAIModel, ToolCallingAgent, tool
from smolagents.agents import EMPTY_PROMPT_TEMPLATES

from env import demonstrate_calculator
from tools import format_call

PROMPTS = {**EMPTY_PROMPT_TEMPLATES, "system_prompt": "Answer with final_answer."}


@cache  # a client is slow to make, and the URL of an episode that has ended is used again
def model(base_url):
    return OpenAIModel("policy", api_base=base_url, api_key="none")


def solve(task, tools, base_url):
    agent = ToolCallingAgent([tool(function) for function in tools], model(base_url), PROMPTS,
                             max_steps=4, verbosity_level=LogLevel.OFF)
    return str(agent.run(task))


def demonstrate_solve(env, random):
    """As the environment's demonstrator. This agent hands in its answer with a call."""
    yield  # the first conversation
    for message in demonstrate_calculator(env, random):
        is_call = message.startswith("<tool_call>")
        yield message if is_call else format_call("final_answer", answer=message)
