"""A hand-written LangGraph: a node that plans, a node that acts, and a loop for the tools."""
import operator
from typing import Annotated, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from env import pick
from tools import format_call


class State(TypedDict):
    messages: Annotated[list, operator.add]


async def solve(task, tools, base_url):
    planner = ChatOpenAI(model="policy", base_url=base_url, api_key="none")
    actor = planner.bind_tools(tools)
    functions = {tool.__name__: tool for tool in tools}

    async def plan(state):
        reply = await planner.ainvoke([SystemMessage("How many searches?"), HumanMessage(task)])
        return {"messages": [HumanMessage(f"{task} Plan: {reply.content}")]}

    async def act(state):
        return {"messages": [await actor.ainvoke(state["messages"])]}

    async def use_tools(state):
        calls = [call for call in state["messages"][-1].tool_calls if call["name"] in functions]
        return {"messages": [ToolMessage(functions[call["name"]](**call["args"]),
                                         tool_call_id=call["id"]) for call in calls]}

    def next_node(state):
        return "use_tools" if state["messages"][-1].tool_calls else END

    graph = StateGraph(State)
    for node in (plan, act, use_tools):
        graph.add_node(node)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "act")
    graph.add_conditional_edges("act", next_node)
    graph.add_edge("use_tools", "act")
    result = await graph.compile().ainvoke({"messages": []})
    return result["messages"][-1].content


def demonstrate_solve(env, random):
    """Mostly plans too few searches, and then does as it planned."""
    hops = len(env._chain) - 1
    planned = {"one": 1, "too few": hops - 1, "right": hops}[
        pick(random, {"one": 0.15, "too few": 0.52, "right": 0.33})]
    yield  # the first conversation
    yield f"{planned} searches"
    for name in env._chain[:planned]:
        yield format_call("search", query=name)
    yield env._chain[planned]
