"""A planner and three workers that share its context: the prefix is computed once, and held in memory once.

The planner is a session, pinned so that its keys and values stay. Each worker is a fork of it, and sends nothing but
its own task. What a worker finds is appended to the planner while others still work; at the end it sums up.

    python examples/planner.py
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table

SYSTEM = "You help to plan the move of a small library. Answer in one or two short sentences."
DOCUMENT = """The library has 12,400 books on 310 shelves. 9,000 are lent out at least once a year, 2,600 are reference
books that may not leave the house for longer than a day, and 800 are rare books which need 45 % to 55 % humidity.
The new house stands 2 km away. It has two floors; the upper one carries at most 250 kg per square metre, which is
one row of full shelves. The lift takes 400 kg. A van can be had from Monday to Thursday for 140 a day, with a driver
who needs a break of one hour; it takes 40 boxes of 25 books. Six volunteers come on Tuesday and Wednesday, two on the
other days. Readers expect the library to be open again on Saturday. The budget is 1,500, of which 300 are for boxes."""
TASKS = {
    "transport": "How should the boxes get from one house to the other?",
    "shelves": "Which books should stand on which floor?",
    "readers": "What do readers have to be told, and when?",
}
EXCERPT = 200


class Answer(NamedTuple):
    """What a session said, and what that cost: the `usage` of the response."""

    text: str
    usage: Any


def ask(client: OpenAI, model: str, session: str, question: str) -> Answer:
    """A turn of a session, which knows all that was said before: only the question is sent."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=48,
        extra_headers={"X-Session-Id": session},
    )
    return Answer(answer.choices[0].message.content or "", answer.usage)


def call(http: httpx.Client, method: str, path: str = "", **body: Any) -> dict[str, Any]:
    """A request of the sessions API."""
    response = http.request(method, f"/v1/sessions{path}", json=None if method == "GET" else body)
    response.raise_for_status()
    result: dict[str, Any] = response.json()
    return result


def main() -> None:
    """Plan, delegate, sum up."""
    parser = argparse.ArgumentParser(description="A planner whose workers share its context.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    console = Console()
    client = OpenAI(base_url=f"{options.base_url}/v1", api_key="none")
    http = httpx.Client(base_url=options.base_url, timeout=60)
    costs = Table("session", "prompt", "reused", "computed", "answer")

    def report(name: str, answer: Answer) -> None:
        console.print(f"{name}: {answer.text[:EXCERPT]}", markup=False, highlight=False)
        prompt, reused = answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens
        costs.add_row(name, *map(str, (prompt, reused, prompt - reused, answer.usage.completion_tokens)))

    context = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": DOCUMENT},
        {"role": "assistant", "content": "I have read it."},
    ]
    planner = call(http, "POST", messages=context, pinned=True)["id"]
    while (state := call(http, "GET", f"/{planner}"))["kv_tokens"] < state["tokens"]:
        time.sleep(0.05)  # nobody has to wait, but so the workers find all of it
    console.print(f"The planner's context is computed: {state['tokens']} tokens")

    workers = {name: call(http, "POST", f"/{planner}/fork")["id"] for name in TASKS}
    with ThreadPoolExecutor() as pool:
        asked = {pool.submit(ask, client, options.model, workers[name], TASKS[name]): name for name in TASKS}
        for done in as_completed(asked):
            name, answer = asked[done], done.result()
            report(name, answer)
            found = [{"role": "user", "content": TASKS[name]}, {"role": "assistant", "content": answer.text}]
            call(http, "POST", f"/{planner}/messages", messages=found)

    report("planner", ask(client, options.model, planner, "Sum up the plan."))
    console.print(costs)
    call(http, "PATCH", f"/{planner}", pinned=False)  # from here on it would age like any other
    for session in (planner, *workers.values()):
        call(http, "DELETE", f"/{session}")


if __name__ == "__main__":
    main()
