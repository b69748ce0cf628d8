"""LangGraph's ready-made agent. `pip install langchain langchain-openai`"""
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI


async def solve(task, tools, base_url):
    agent = create_agent(ChatOpenAI(model="policy", base_url=base_url, api_key="none"), tools)
    result = await agent.ainvoke({"messages": [("user", task)]})
    return result["messages"][-1].content
