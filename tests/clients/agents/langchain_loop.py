"""A tool loop with langchain-anthropic."""

from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool

lookup = tool(look_up)
model = ChatAnthropic(model=MODEL, base_url=URL, api_key=KEY, max_tokens=512).bind_tools([lookup])
messages = [SystemMessage(SYSTEM), HumanMessage(PROMPT)]
while True:
    answer = model.invoke(messages)
    messages.append(answer)
    if not answer.tool_calls:
        print(answer.text)
        break
    messages += [lookup.invoke(call) for call in answer.tool_calls]
