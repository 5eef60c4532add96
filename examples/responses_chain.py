"""A chain of responses: each goes on from the one before by its id, and sends only what is new.

The model looks things up with a tool, then answers; from that one response two others branch off, each of which
computes its own question and nothing else.

    python examples/responses_chain.py
"""

import argparse
import json
from typing import Any

from openai import OpenAI
from openai.types.responses import Response
from rich.console import Console
from rich.table import Table

STOCK = {"pen": 12, "book": 3, "map": 0}
INSTRUCTIONS = "You keep a small shop. Look up what is in stock, then answer in one short sentence."
LOOK_UP: Any = {
    "type": "function",
    "name": "look_up",
    "description": "Tells how many of an article are in stock, and on which shelf they are.",
    "parameters": {
        "type": "object",
        "properties": {"article": {"type": "string", "enum": list(STOCK)}},
        "required": ["article"],
        "additionalProperties": False,
    },
    "strict": True,
}


def look_up(article: str) -> str:
    """The tool itself."""
    return json.dumps({"article": article, "in_stock": STOCK[article], "shelf": list(STOCK).index(article) + 1})


def results(response: Response) -> list[Any]:
    """The results of all calls of a response, as its next input."""
    calls = [item for item in response.output if item.type == "function_call"]
    return [
        {"type": "function_call_output", "call_id": call.call_id, "output": look_up(**json.loads(call.arguments))}
        for call in calls
    ]


def main() -> None:
    """Ask, look up twice, answer, and branch."""
    parser = argparse.ArgumentParser(description="Responses that go on from one another.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    console = Console()
    client = OpenAI(base_url=f"{options.base_url}/v1", api_key="none")
    costs = Table("response", "after", "input", "cached", "computed", "output")
    names: dict[str | None, str] = {None: "-"}

    def respond(name: str, new: Any, after: Response | None, tool_choice: Any) -> Response:
        previous = after.id if after else None
        response = client.responses.create(
            model=options.model,
            instructions=INSTRUCTIONS,  # not carried over by previous_response_id: sent each time, computed once
            input=new,
            previous_response_id=previous,
            tools=[LOOK_UP],
            tool_choice=tool_choice,
            parallel_tool_calls=False,
            temperature=0,
            max_output_tokens=60,
        )
        usage: Any = response.usage
        cached = usage.input_tokens_details.cached_tokens
        tokens = (usage.input_tokens, cached, usage.input_tokens - cached, usage.output_tokens)
        costs.add_row(name, names[previous], *map(str, tokens))
        names[response.id] = name
        said = response.output_text or " ".join(f"{call['output']}" for call in results(response))
        console.print(f"{name}: {said}", markup=False, highlight=False)
        return response

    first = respond("first", "Can I have a pen and a map?", None, "required")
    second = respond("second", results(first), first, "required")
    answer = respond("answer", results(second), second, "none")
    respond("branch 1", "Then I take two pens. What is left?", answer, "none")
    respond("branch 2", "Rather a book. On which shelf is it?", answer, "none")
    console.print(costs)


if __name__ == "__main__":
    main()
