"""A crew of one."""

from _task import KEY, MODEL, PROMPT, SYSTEM, URL
from _task import look_up as found
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool


@tool("look_up")
def look_up(city: str) -> str:
    """Look up the weather in a city."""
    return found(city)


llm = LLM(model=f"openai/{MODEL}", base_url=f"{URL}/v1", api_key=KEY)
agent = Agent(role="Forecaster", goal="Tell the weather.", backstory=SYSTEM, llm=llm, tools=[look_up])
task = Task(description=PROMPT, expected_output="One sentence.", agent=agent)
print(Crew(agents=[agent], tasks=[task]).kickoff())
