"""smolagents' agent that calls tools."""

from _task import KEY, MODEL, PROMPT, SYSTEM, URL
from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def look_up(city: str) -> str:
    """Look up the weather in a city.

    Args:
        city: Its name.
    """
    from _task import look_up as found

    return found(city)


model = OpenAIServerModel(model_id=MODEL, api_base=f"{URL}/v1", api_key=KEY)
print(ToolCallingAgent(tools=[look_up], model=model, instructions=SYSTEM).run(PROMPT))
