"""The bare openai client: two samples, and the model itself judges which one is right."""
from openai import AsyncOpenAI

from env import demonstrate_chain


async def solve(task, tools, base_url):
    async with AsyncOpenAI(base_url=base_url, api_key="none") as client:
        async def ask(text, number=1):
            reply = await client.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": text}], n=number)
            return [choice.message.content or "" for choice in reply.choices]

        first, second = await ask(task, number=2)
        if first == second:
            return first
        [verdict] = await ask(f"{task} Answers: {first} or {second}? First or second?")
        return second if "second" in verdict else first


def demonstrate_solve(env, random):
    """Two attempts, each as imperfect as the environment's demonstrator, and a coin for a judge."""
    conversation = yield
    while True:
        if "First or second?" in conversation[-1].text:
            conversation = yield random.choice(["first", "second"])
        else:
            conversation = yield next(demonstrate_chain(env, random))
