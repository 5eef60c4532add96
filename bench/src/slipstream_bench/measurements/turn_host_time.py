"""The host's time for a turn: finding what is known, rendering and tokenising the rest, recording the answer.

    python -m slipstream_bench.measurements.turn_host_time

An agent is asked once and works in pairs of a call and its result; a chat goes to and fro. Each turn sends the whole
conversation in new messages, as a client does, and one message more. Times are processor time, which other work on the
machine disturbs least; reading the messages, whose digests cost what the client sends, is timed apart. Uses the default
model's tokenizer and template; no model runs.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from slipstream.chat import ChatTemplate, Conversations, Message, Setting, Tool, ToolCall, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.tokenizer import Tokenizer
from slipstream_bench.measurements.turn_costs import words

PAIR_TOKENS = 500
READ = Tool("read", "Read a file", {"type": "object", "properties": {"path": {"type": "string"}}})
SETTINGS = {"agent": Setting(ToolUse((READ,))), "chat": Setting()}
SYSTEM = Message("system", "You are a careful engineer.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_000, 20_000, 150_000])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    console = Console(width=120)
    model = ModelStore().ensure(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    assert model.chat_template is not None
    started = time.thread_time()
    template = ChatTemplate(model.chat_template, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    Conversations(template, tokenizer, Dialect(template.shown, tokenizer))
    console.print(f"taking the template on: {(time.thread_time() - started) * 1e3:.0f} ms")
    table = Table(
        "conversation", "tokens at first", "prompt, ms", "of it tokenising, ms", "record, ms", "reading 100 kB, ms"
    )
    for kind in SETTINGS:
        for tokens in options.tokens:
            conversations = Conversations(template, tokenizer, Dialect(template.shown, tokenizer))
            table.add_row(*measured(kind, tokens, options.rounds, conversations, tokenizer))
    console.print(table)


def measured(kind: str, tokens: int, rounds: int, conversations: Conversations, tokenizer: Tokenizer) -> list[str]:
    """A row: medians over turns of a conversation that begins with so many tokens."""
    rng = random.Random(0)
    messages = [SYSTEM, Message("user", "Find the bug.")]
    for number in range(tokens // PAIR_TOKENS):
        messages += [answer(kind, number, rng), reply(kind, number, rng)]
    times: dict[str, list[float]] = {"prompt": [], "tokenise": [], "record": [], "read": []}
    length = 0
    for number in range(len(messages), len(messages) + rounds + 1):
        started = time.thread_time()
        messages = read(messages)
        times["read"].append((time.thread_time() - started) * 1e5 / sum(len(message.text) for message in messages))
        started = time.thread_time()
        prompt = conversations.prompt(messages, SETTINGS[kind])
        times["prompt"].append(time.thread_time() - started)
        started = time.thread_time()
        tokenizer.encode(messages[-1].text)
        times["tokenise"].append(time.thread_time() - started)
        said = answer(kind, number, rng)
        text = said.text or "".join(
            f'<tool_call>\n{{"name": "read", "arguments": {call.arguments}}}\n</tool_call>' for call in said.tool_calls
        )
        ids = tokenizer.encode(text)
        started = time.thread_time()
        conversations.record(prompt, said, ids, text)
        times["record"].append(time.thread_time() - started)
        messages += [said, reply(kind, number, rng)]
        length = length or len(prompt.token_ids)
    assert conversations.renders == {"first": 1, "spliced": rounds}
    medians = (statistics.median(seconds[1:]) * 1e3 for seconds in times.values())
    return [kind, f"{length:,}", *(f"{each:.2f}" for each in medians)]


def answer(kind: str, number: int, rng: random.Random) -> Message:
    """What the assistant says in turn."""
    if kind == "chat":
        return Message("assistant", words(rng, PAIR_TOKENS // 2))
    return Message("assistant", "", (ToolCall(f"call_{number}", "read", json.dumps({"path": f"src/{number}.py"})),))


def reply(kind: str, number: int, rng: random.Random) -> Message:
    """What comes back."""
    if kind == "chat":
        return Message("user", words(rng, PAIR_TOKENS // 2))
    return Message("tool", words(rng, PAIR_TOKENS - 50), tool_call_id=f"call_{number}")


def read(messages: Sequence[Message]) -> list[Message]:
    """The messages as a client sends them again: equal and new, each with its digest."""
    again = [replace(message) for message in messages]
    for message in again:
        assert message.digest
    return again


if __name__ == "__main__":
    main()
