"""An agent on Anthropic's own client: system blocks with `cache_control`, tools, and answers that stream.

`cache_control` is accepted but needless: everything is kept. `cache_read_input_tokens` tells how much that saved.

    python examples/claude_style.py
"""

import argparse
import json
from typing import Any

from anthropic import Anthropic
from rich.console import Console
from rich.table import Table

SYSTEM: list[Any] = [
    {"type": "text", "text": "You look after the weather stations of an island. Answer in one short sentence."},
    {
        "type": "text",
        "text": "Stations: north (on the cliff, windy), south (in the harbour, mild), peak (at 900 m, often cloudy). "
        "Frost is anything below 0 degrees; a storm is wind above 20 metres a second.",
        "cache_control": {"type": "ephemeral"},
    },
]
MEASURED = {
    "north": {"degrees": 4, "wind": 23, "rain": False},
    "south": {"degrees": 9, "wind": 6, "rain": True},
    "peak": {"degrees": -3, "wind": 17, "rain": False},
}
TOOLS: list[Any] = [
    {
        "name": "measure",
        "description": "Tells temperature, wind and rain at a station.",
        "input_schema": {
            "type": "object",
            "properties": {"station": {"type": "string", "enum": list(MEASURED)}},
            "required": ["station"],
        },
    }
]
ONE_CALL: Any = {"type": "any", "disable_parallel_tool_use": True}
NO_CALL: Any = {"type": "none"}
QUESTIONS = ("Is there a storm anywhere?", "And where does it freeze?")


def results(content: list[Any]) -> list[Any]:
    """A result for each call among the blocks of an answer."""
    calls = [block for block in content if block.type == "tool_use"]
    return [
        {"type": "tool_result", "tool_use_id": call.id, "content": json.dumps(MEASURED[call.input["station"]])}
        for call in calls
    ]


def main() -> None:
    """Answer the questions, each after two looks at the stations."""
    parser = argparse.ArgumentParser(description="An agent on Anthropic's client.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    console = Console()
    client = Anthropic(base_url=options.base_url, api_key="none")
    messages: list[Any] = []
    costs = Table("turn", "stop_reason", "cache_read", "cache_write", "output")
    for question in QUESTIONS:
        console.print(f"> {question}", markup=False)
        messages.append({"role": "user", "content": question})
        for tool_choice in (ONE_CALL, ONE_CALL, NO_CALL):  # a large model can decide for itself: auto
            with client.messages.stream(
                model=options.model,
                system=SYSTEM,
                messages=messages,
                tools=TOOLS,
                tool_choice=tool_choice,
                max_tokens=60,
                extra_body={"temperature": 0},  # newer versions of the client have no parameter for it
            ) as stream:
                for text in stream.text_stream:
                    console.print(text, end="", markup=False, highlight=False)
                answer = stream.get_final_message()
            messages.append({"role": "assistant", "content": answer.content})
            if found := results(answer.content):
                console.print("measured:", *(result["content"] for result in found), end="", markup=False)
                messages.append({"role": "user", "content": found})
            console.print()
            usage = answer.usage
            tokens = (usage.cache_read_input_tokens, usage.cache_creation_input_tokens, usage.output_tokens)
            costs.add_row(str(costs.row_count + 1), answer.stop_reason, *map(str, tokens))
    console.print(costs)


if __name__ == "__main__":
    main()
