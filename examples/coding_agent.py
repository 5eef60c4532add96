"""A coding agent that knows nothing of state: each turn it sends its whole conversation, as any client does.

The project is in memory, and the tools work on it. The table at the end shows that a turn cost its new tokens, while
the conversation grew to thousands.

    python examples/coding_agent.py
"""

import argparse
import json
import re
import time
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

SYSTEM = "You are a coding agent. Give every function in the project a docstring and a return type; test your work."
PRICE = """RATES = {"book": 7, "pen": 19, "map": 7}

def discounted(price, percent):
    return round(price * (1 - percent / 100), 2)

def with_tax(kind, price):
    return round(price * (1 + RATES[kind] / 100), 2)
"""
STOCK = """STOCK = {"book": 3, "pen": 12, "map": 0}

def available(kind):
    return STOCK.get(kind, 0) > 0

def take(kind, count):
    if STOCK[kind] < count:
        raise ValueError(f"only {STOCK[kind]} left of {kind}")
    STOCK[kind] -= count
"""
PROJECT = {"price.py": PRICE, "stock.py": STOCK}
FUNCTION = re.compile(r'^def (\w+)\(.*\)( -> .+)?:\n(    """)?', re.MULTILINE)
RESULT_LENGTH = 400  # characters, about 120 tokens: 35 turns fit in a context of 8,192


def tool(name: str, description: str, **parameters: Any) -> Any:
    """A tool as the protocol describes it; all its parameters are required."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


FILE = {"type": "string", "enum": list(PROJECT)}
TOOLS = {
    "list_files": tool("list_files", "List the files and the functions in each."),
    "read_file": tool("read_file", "Read a file.", file=FILE),
    "write_file": tool("write_file", "Replace the text of a file.", file=FILE, text={"type": "string"}),
    "run_tests": tool("run_tests", "Check that every function has a docstring and a return type."),
}


def functions(text: str) -> dict[str, bool]:
    """The functions in a file's text, and whether each is done."""
    return {name: bool(returns and docstring) for name, returns, docstring in FUNCTION.findall(text)}


def execute(name: str, file: str = "", text: str = "") -> str:
    """The result of a call."""
    project = {path: functions(source) for path, source in PROJECT.items()}
    match name:
        case "list_files":
            return "\n".join(f"{path} with {', '.join(found)}" for path, found in project.items())
        case "read_file":
            return PROJECT[file]
        case "write_file":
            if missing := project[file].keys() - functions(text).keys():  # models err
                return f"REFUSED: {', '.join(sorted(missing))} would be lost. The file still is:\n{PROJECT[file]}"
            PROJECT[file] = text
            return f"Written:\n{text}"
        case _:
            verdicts = {True: "passed", False: "FAILED"}
            return "\n".join(f"{each}: {verdicts[done]}" for found in project.values() for each, done in found.items())


def all_but(names: list[str]) -> Any:
    """The `tool_choice` for one call of any other tool. All tools stay in the prompt, so none of it changes."""
    allowed = [{"type": "function", "function": {"name": name}} for name in TOOLS if name not in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": allowed}}


def main() -> None:
    """Let the agent work, and show what each turn cost."""
    parser = argparse.ArgumentParser(description="A coding agent that sends its whole conversation each turn.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--turns", type=int, default=35)
    options = parser.parse_args()
    client = OpenAI(base_url=f"{options.base_url}/v1", api_key="none")
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Please begin."}]
    called: list[str] = []
    costs = Table("turn", "call", "prompt", "computed", "answer", "seconds")
    for turn in range(1, options.turns + 1):
        started = time.perf_counter()
        response: Any = client.chat.completions.create(
            model=options.model,
            messages=messages,
            tools=TOOLS.values(),
            tool_choice=all_but(called[-2:]),  # "required" would do, but small models go round in circles
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=200,
        )
        seconds = time.perf_counter() - started
        messages.append(response.choices[0].message)
        for call in response.choices[0].message.tool_calls:
            called.append(call.function.name)
            result = execute(call.function.name, **json.loads(call.function.arguments))[:RESULT_LENGTH]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        prompt, reused = response.usage.prompt_tokens, response.usage.prompt_tokens_details.cached_tokens
        answer = response.usage.completion_tokens
        costs.add_row(str(turn), called[-1], str(prompt), str(prompt - reused), str(answer), f"{seconds:.2f}")
    Console().print(costs)


if __name__ == "__main__":
    main()
