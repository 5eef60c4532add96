"""LlamaIndex's function agent, which streams."""

import asyncio

from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=131_072,
)


async def main() -> None:
    print(await FunctionAgent(tools=[look_up], llm=llm, system_prompt=SYSTEM).run(PROMPT))


asyncio.run(main())
