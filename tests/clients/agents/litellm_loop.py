"""A tool loop with LiteLLM over Anthropic's protocol."""

import json

import litellm
from _task import KEY, MODEL, PROMPT, SYSTEM, URL, look_up

parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
function = {"name": "look_up", "description": "Look up the weather in a city.", "parameters": parameters}
messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
while True:
    answer = litellm.completion(
        model=f"anthropic/{MODEL}",
        api_base=URL,
        api_key=KEY,
        messages=messages,
        tools=[{"type": "function", "function": function}],
        max_tokens=512,
    )
    message = answer.choices[0].message
    messages.append(message.model_dump())
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        found = look_up(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": found})
