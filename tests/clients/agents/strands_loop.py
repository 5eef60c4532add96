"""Strands' agent, which streams."""

from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up
from strands import Agent, tool
from strands.models.openai import OpenAIModel

model = OpenAIModel(client_args={"api_key": KEY, "base_url": f"{URL}/v1"}, model_id=MODEL)
print(Agent(model=model, tools=[tool(look_up)], system_prompt=SYSTEM, callback_handler=None)(PROMPT))
