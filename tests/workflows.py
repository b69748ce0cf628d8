"""Workflows: agents that are more than one conversation, written on the verbs of `agent.Agent`.

    plan_then_execute     two roles of one model: a planner, and an executor that reads the plan
    best_of_two           two messages for each turn; the model itself judges which one counts
    retry_with_a_lesson   after each attempt a line of lesson, all that the next attempt knows

`python train.py --agent tests/workflows.py:plan_then_execute --env lookup` trains one (commands and
figures: tests/README.md). All roles are the same weights, and one reward trains them all: each
message is a turn of the episode, whatever context it was written in.

The generator beside a workflow writes the messages of the warm start, one per query. Like the
demonstrators of env.py, it mostly fails. It fits one environment; a workflow fits any.
"""

import json
from collections.abc import Iterator
from random import Random

from agent import Agent, take_turns
from env import NEXT, THOUGHTS, Chain, Lookup, Mastermind, _grade, pick
from tools import Call, Message, format_call


def shown(message: Message) -> str:
    """A message as another role reads it: thoughts, arguments of calls, text."""
    arguments = [json.dumps(call.arguments) for call in message.calls if isinstance(call, Call)]
    return " ".join([message.thinking, *arguments, message.text]).strip()


# --------------------------------------------------------------------------------------------------
# A plan first


async def plan_then_execute(agent: Agent) -> None:
    """The planner reads the task. The executor reads the task and the plan, and has the tools."""
    task = agent.episode.task
    agent.fresh(f"{task} Write a plan.")
    plan = await agent.query()
    if plan is not None:  # else it was cut
        agent.fresh(f"{task} The plan: {plan.text}")
        await take_turns(agent)


def demonstrate_plan_then_execute(env: Lookup, random: Random) -> Iterator[str]:
    """Mostly plans a search too few. The executor follows the plan."""
    habit = pick(random, {"one search": 0.15, "a search too few": 0.52, "right": 0.33})
    hops = len(env._chain) - 1
    searches = {"one search": 1, "a search too few": hops - 1, "right": hops}[habit]
    yield "search the " + ", then the ".join(["person", "company", "city"][:searches])
    for name in env._chain[:searches]:
        yield format_call("search", query=name)
    yield env._chain[searches]


# --------------------------------------------------------------------------------------------------
# The better of two


async def best_of_two(agent: Agent) -> None:
    """For each turn the policy writes two messages. The one that the judge prefers is acted on."""
    while not agent.episode.finish:
        other = agent.branch()
        first, second = await agent.query(), await other.query()
        if first and second and await prefers_second(agent, first, second):
            agent, first = other, second  # go on from there; the other branch ends here
        if first:  # else it was cut
            await agent.act(first)


async def prefers_second(agent: Agent, first: Message, second: Message) -> bool:
    """Ask the judge: the same model in a context of its own."""
    judge = agent.branch()
    judge.fresh(f"{agent.episode.task} First: {shown(first)} Second: {shown(second)} "
                "Which is better?")
    verdict = await judge.query()
    return verdict is not None and "second" in verdict.text


def demonstrate_best_of_two(env: Chain, random: Random) -> Iterator[str]:
    """Mostly stops thinking too early, like the environment's own, and takes the first message."""
    right = []
    for _ in range(2):
        habit = pick(random, {"one step": 0.15, "a step too few": 0.61, "right": 0.24})
        steps = {"one step": 1, "a step too few": env.steps - 1, "right": env.steps}[habit]
        found = env._digits[1 : steps + 1]
        yield f"<think>{''.join(f'so {digit}, ' for digit in found)}</think>{found[-1]}"
        right.append(steps == env.steps)
    habit = pick(random, {"the first": 0.6, "the better one": 0.4})
    yield "second" if habit == "the better one" and right == [False, True] else "first"


# --------------------------------------------------------------------------------------------------
# A lesson from each attempt


async def retry_with_a_lesson(agent: Agent) -> None:
    """Attempts, each in a fresh context. The lesson is all that one knows of those before it."""
    task, lesson = agent.episode.task, "none"
    while not agent.episode.finish:
        agent.fresh(f"{task} Lesson: {lesson}")
        attempt = await agent.query()
        if attempt is None:  # it was cut
            continue
        results = await agent.act(attempt)
        if not agent.episode.finish:
            agent.fresh(f"{task} You tried {shown(attempt)} and got: {' '.join(results)}. "
                        "Write a lesson.")
            written = await agent.query()
            lesson = written.text if written else lesson


def demonstrate_retry_with_a_lesson(env: Mastermind, random: Random) -> Iterator[str]:
    """Mostly learns no more than that a guess was wrong, and counts on: 5555, 6666, 7777."""
    habit = pick(random, {"counts on": 0.68, "right": 0.32})
    guess = "5" * env.digits
    while True:
        yield format_call("guess", code=guess)
        answers = _grade(env._secret, guess).split()
        if habit == "counts on":
            yield f"not {guess}"
            guess = str((int(guess[0]) + 1) % 10) * env.digits
        else:
            yield ", ".join(f"{THOUGHTS[answer]} {g}" for answer, g in zip(answers, guess))
            guess = "".join(NEXT[answer][int(g)] for answer, g in zip(answers, guess))
