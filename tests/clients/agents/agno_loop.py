"""Agno's agent."""

from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up
from agno.agent import Agent
from agno.models.openai.like import OpenAILike

model = OpenAILike(id=MODEL, base_url=f"{URL}/v1", api_key=KEY)
print(Agent(model=model, tools=[look_up], instructions=SYSTEM, telemetry=False).run(PROMPT).content)
