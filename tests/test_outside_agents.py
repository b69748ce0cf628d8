"""Agents of LangChain, LangGraph, smolagents and the openai client, unchanged, behind the endpoint.

The policy is a script, so these tests show the wiring: which tokens are recorded, and how. Each is
skipped without its package (tests/requirements-peers.txt).
"""

import asyncio
from collections import Counter

import pytest
from test_endpoint import CHAT, Desk, Policy, said, sampled, solve_all, solved

from tools import format_call

ECHO = format_call("echo", text="a")


class Later(Desk):
    """Its tool is asynchronous."""

    async def echo(self, text: str) -> str:
        """Say it again.

        Args:
            text: What to say.
        """
        await asyncio.sleep(0.001)
        self.log.append(text)
        return text


# ---- LangChain and LangGraph ----


def create_agent():
    agents = pytest.importorskip("langchain.agents")
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI

    async def solve(task, tools, base_url):
        agent = agents.create_agent(
            chat_openai(model="policy", base_url=base_url, api_key="none"), tools)
        result = await agent.ainvoke({"messages": [("user", task)]})
        return result["messages"][-1].content

    return solve


@pytest.mark.parametrize("env", [Desk, Later])
def test_create_agent_continues_one_segment(env):
    """LangChain writes the history anew for each request: null texts, arguments from its own JSON.
    With plain tools, which it runs in threads, and with asynchronous ones."""
    episode, policy = solved(create_agent(), "<think>hm</think>" + ECHO + ECHO, ECHO, "yes",
                             env=env)
    assert sampled(episode) == [said("<think>hm</think>" + ECHO + ECHO) + said(ECHO) + said("yes")]
    assert (episode.reward, episode.turns, episode.tool_calls) == (1.0, 3, 3)
    text = CHAT.tokenizer.decode(policy.calls[2][0])
    assert text.count("<|im_start|>tool\na<|im_end|>") == 3


@pytest.mark.parametrize("call", [
    format_call("echo", text=1), format_call("echo"), format_call("nothing"),
    format_call("fail", how="broken"), format_call("fail", how="exit"), "<tool_call>{oops</tool_call>",
    '<tool_call>{"name": "echo"}</tool_call>', '<tool_call>{"name": "echo", "arguments": 5}</tool_call>',
    '<tool_call>{"name": "echo", "arguments": {"text": "\\ud800"}}</tool_call>', ""])
def test_a_bad_call_is_not_the_fault_of_create_agent(call):
    """Some become a text for the policy, some an exception in LangChain. None costs the episode."""
    episode, policy = solved(create_agent(), call, "yes")
    assert not episode.error


def test_urls_are_used_again_with_create_agent():
    """Else each episode pays for a new client: LangChain keeps one for each URL."""
    urls = Counter()
    solve = create_agent()

    async def counted(task, tools, base_url):
        urls[base_url] += 1
        return await solve(task, tools, base_url)

    episodes = solve_all([counted] * 12, [Policy(ECHO, "yes") for _ in range(12)], at_once=3)
    assert all(episode.success for episode in episodes)
    assert len(urls) == 3


def test_a_state_graph_with_two_model_nodes_keeps_a_segment_for_each():
    """Plan in one conversation, act in another, with tools in a loop of its own."""
    graph = pytest.importorskip("langgraph.graph")
    prebuilt = pytest.importorskip("langgraph.prebuilt")
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI

    class State(graph.MessagesState):
        plan: str

    async def solve(task, tools, base_url):
        model = chat_openai(model="policy", base_url=base_url, api_key="none")

        async def plan(state):
            reply = await model.ainvoke([("system", "Make a plan."), ("user", task)])
            return {"plan": reply.content}

        async def act(state):
            start = [("system", state["plan"]), ("user", task)]
            return {"messages": [await model.bind_tools(tools).ainvoke(
                start + state["messages"])]}

        builder = graph.StateGraph(State)
        builder.add_node("plan", plan)
        builder.add_node("act", act)
        builder.add_node("tools", prebuilt.ToolNode(tools))
        builder.add_edge(graph.START, "plan")
        builder.add_edge("plan", "act")
        builder.add_conditional_edges("act", prebuilt.tools_condition)
        builder.add_edge("tools", "act")
        result = await builder.compile().ainvoke({"messages": []})
        return result["messages"][-1].content

    episode, policy = solved(solve, "first echo", ECHO, "yes")
    assert sampled(episode) == [said("first echo"), said(ECHO) + said("yes")]
    assert episode.success


# ---- smolagents ----


def smol_model(base_url):
    smolagents = pytest.importorskip("smolagents")
    return smolagents.OpenAIServerModel("policy", api_base=base_url, api_key="none")


def test_a_tool_calling_agent_writes_a_segment_for_each_turn():
    """smolagents writes its own calls back as the text "Calling tools: ...", so no request extends
    the one before. No sample is lost. It takes the tools with their hints and docstrings."""
    smolagents = pytest.importorskip("smolagents")

    def solve(task, tools, base_url):
        agent = smolagents.ToolCallingAgent([smolagents.tool(tool) for tool in tools[:1]],
                                            smol_model(base_url), max_steps=4, verbosity_level=0)
        return str(agent.run(task))

    messages = [ECHO, format_call("final_answer", answer="yes")]
    episode, policy = solved(solve, *messages)
    assert sampled(episode) == [said(message) for message in messages]
    assert episode.success


def test_a_code_agent_runs_programs_that_call_tools():
    """A program is the message. It may pass a tool any object, which must not raise. Its history
    is rewritten, too, so each turn is a segment."""
    smolagents = pytest.importorskip("smolagents")

    def solve(task, tools, base_url):
        agent = smolagents.CodeAgent([smolagents.tool(tool) for tool in tools[:1]],
                                     smol_model(base_url), max_steps=3, verbosity_level=0)
        return str(agent.run(task))

    programs = ["<code>\nprint(echo({1, 2}))\n</code>", '<code>\nfinal_answer("yes")\n</code>']
    episode, policy = solved(solve, *programs, context=30_000)
    assert sampled(episode) == [said(program) for program in programs]
    assert episode.success and episode.tool_errors == 1


# ---- openai ----


def test_the_openai_client_with_a_best_of_two_and_a_judge():
    """Every sample is kept, the judge's too."""
    openai = pytest.importorskip("openai")

    def solve(task, tools, base_url):
        client = openai.OpenAI(base_url=base_url, api_key="none")
        found = client.chat.completions.create(
            model="policy", n=2, temperature=0.3, messages=[{"role": "user", "content": task}])
        answers = [choice.message.content for choice in found.choices]
        question = f"Which is better, 0 or 1? {answers}"
        verdict = client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": question}])
        return answers[int(verdict.choices[0].message.content)]

    episode, policy = solved(solve, "no", "yes", "1")
    assert sampled(episode) == [said("no"), said("yes"), said("1")] and episode.success


def test_the_openai_client_reads_the_stream():
    """Calls, text, usage: as the API sends them, and as its own parser takes them."""
    openai = pytest.importorskip("openai")

    async def solve(task, tools, base_url):
        client = openai.AsyncOpenAI(base_url=base_url, api_key="none")
        assert [model.id async for model in client.models.list()] == ["policy"]
        tool = {"type": "function", "function": {"name": "echo", "parameters": {
            "type": "object", "properties": {"text": {"type": "string"}}}}}
        request = {"model": "policy", "messages": [{"role": "user", "content": task}],
                   "tools": [tool], "stream_options": {"include_usage": True}}
        async with client.chat.completions.stream(**request) as stream:
            async for _ in stream:
                pass
            whole = await stream.get_final_completion()
        [call] = whole.choices[0].message.tool_calls
        assert (call.id, call.function.name, call.function.arguments) == (
            "call_1", "echo", '{"text": "a"}')
        assert whole.choices[0].finish_reason == "tool_calls"
        assert whole.usage.completion_tokens == len(said("so" + ECHO))
        history = [*request["messages"], whole.choices[0].message,
                   {"role": "tool", "content": "a", "tool_call_id": "call_1"}]
        stream = await client.chat.completions.create(
            **{**request, "messages": history}, stream=True)
        chunks = [chunk async for chunk in stream]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    episode, policy = solved(solve, "so" + ECHO, "yes")
    assert len(episode.segments) == 1 and episode.success


def test_the_openai_client_is_told_what_is_wrong():
    """As an error of its own, at once: it waits and tries again after a 429 or a 500."""
    openai = pytest.importorskip("openai")

    def solve(task, tools, base_url):
        client = openai.OpenAI(base_url=base_url, api_key="none")
        with pytest.raises(openai.BadRequestError, match="n from 1 to 16"):
            client.chat.completions.create(model="policy", n=99, messages=[
                {"role": "user", "content": task}])
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="policy", input="a")
        return "yes"

    assert solved(solve)[0].success
