"""LangGraph's ReAct agent over OpenAI's chat completions."""

from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent

model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY)
agent = create_react_agent(model, [look_up], prompt=SYSTEM)
print(agent.invoke({"messages": [("user", PROMPT)]})["messages"][-1].content)
