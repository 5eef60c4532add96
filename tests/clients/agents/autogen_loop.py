"""AutoGen's assistant."""

import asyncio

from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient

info = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown", "structured_output": True}
client = OpenAIChatCompletionClient(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, model_info=info)
agent = AssistantAgent("agent", client, tools=[look_up], system_message=SYSTEM, max_tool_iterations=6)
print(asyncio.run(agent.run(task=PROMPT)).messages[-1].content)
