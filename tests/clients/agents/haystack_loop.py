"""Haystack's agent."""

from typing import Annotated

from _task import KEY, MODEL, PROMPT, SYSTEM, URL
from _task import look_up as found
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from haystack.utils import Secret


@tool
def look_up(city: Annotated[str, "Its name"]) -> str:
    """Look up the weather in a city."""
    return found(city)


generator = OpenAIChatGenerator(api_key=Secret.from_token(KEY), model=MODEL, api_base_url=f"{URL}/v1")
agent = Agent(chat_generator=generator, tools=[look_up], system_prompt=SYSTEM)
print(agent.run(messages=[ChatMessage.from_user(PROMPT)])["messages"][-1].text)
