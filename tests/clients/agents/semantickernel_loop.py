"""Semantic Kernel's chat completion agent."""

import asyncio

from _task import KEY, MODEL, PROMPT, SYSTEM, URL
from _task import look_up as found
from openai import AsyncOpenAI
from semantic_kernel.agents import ChatCompletionAgent
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion
from semantic_kernel.functions import kernel_function


class Weather:
    """A plugin."""

    @kernel_function
    def look_up(self, city: str) -> str:
        """Look up the weather in a city."""
        return found(city)


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)
    service = OpenAIChatCompletion(ai_model_id=MODEL, async_client=client)
    agent = ChatCompletionAgent(service=service, name="agent", instructions=SYSTEM, plugins=[Weather()])
    print(await agent.get_response(PROMPT))


asyncio.run(main())
