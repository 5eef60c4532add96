"""A model that follows a script, under the real engine: it says what a run's next step is, token by token.

What it reads is the prompt, from the backend's own memory, so a wrong block or a lost token changes what it says. Its
logits prefer the longest token that goes on as the script wants; grammars, drafts and sampling do their work on them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.backend import StepCost, StepMeasurements
from slipstream.tokenizer import Tokenizer
from slipstream.types import FloatArray, IntArray
from tests.unit.toy_backend import RUBBISH, ToyBackend, ToyChunk

CONTEXT = 131_072
_BLOCK_SIZE = 32
_CONVERSATIONS = 6
"""How many conversations of the longest context there is memory for."""
_LONGEST_TOKEN = 24
_BELOW, _ABOVE = -1e4, 100.0

SUMMARY = (
    "<summary>\nThe run went well so far. The user asked for small changes, and all of them were made.\n</summary>"
)
_ASKS_FOR_SUMMARY = re.compile(
    r"CONTEXT CHECKPOINT COMPACTION|detailed summary of (the|our|this)|summary of the conv", re.I
)
_RUN = re.compile(r"\[\[run (\S+)\]\]")


@dataclass(frozen=True)
class Call:
    """A step that calls a tool."""

    tool: str
    arguments: dict[str, Any] = field(default_factory=dict)


Step = Call | str
"""A call, or a text."""


def script_answer(runs: Mapping[str, Sequence[Step]], messages: Sequence[tuple[str, str]]) -> str:
    """What the model says after messages (role, text): the next step of the run that a message last named."""
    last = messages[-1][1]
    if _ASKS_FOR_SUMMARY.search(last) and not last.startswith("<tool_response>"):
        return SUMMARY
    begun = [(at, names[-1]) for at, (_, text) in enumerate(messages) if (names := _RUN.findall(text))]
    if not begun:
        return "OK."
    at, name = begun[-1]
    done = sum(role == "assistant" for role, _ in messages[at + 1 :])
    steps = runs.get(name, ())
    step = steps[done] if done < len(steps) else "Done."
    return step if isinstance(step, str) else _call_text(step, messages[0][1])


def _call_text(call: Call, system: str) -> str:
    """A call as the generic format has it, its arguments in the order of the tool's schema, as the grammar wants it."""
    arguments: Any = call.arguments
    if "<tools>" not in system:
        return SUMMARY  # Codex compacts without tools
    for line in system.split("<tools>\n", 1)[-1].split("\n</tools>", 1)[0].splitlines():
        tool = json.loads(line)
        if tool["name"] == call.tool:
            arguments = _ordered(call.arguments, tool["parameters"])
    body = json.dumps({"name": call.tool, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _ordered(value: Any, schema: Any) -> Any:
    if isinstance(value, list) and isinstance(schema, dict):
        return [_ordered(each, schema.get("items")) for each in value]
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    properties = schema.get("properties", {})
    names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
    return {name: _ordered(value[name], properties.get(name)) for name in names}


class Scripted(ToyBackend):
    """A backend whose likeliest tokens spell the answer that `answer` gives for the messages of a prompt in ChatML."""

    fingerprint = "scripted"

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, answer: Callable[[Sequence[tuple[str, str]]], str]
    ) -> None:
        super().__init__(_CONVERSATIONS * CONTEXT // _BLOCK_SIZE, _BLOCK_SIZE)
        self.vocab_size = vocab_size
        self.cost = StepCost(StepMeasurements(((16, 1e-4), (512, 1e-3), (4096, 4e-3))), smallest_chunk=2)
        self._tokenizer = tokenizer
        self._answer = answer
        self._begin, self._end = tokenizer.control_token("<|im_start|>"), tokenizer.control_token("<|im_end|>")
        self._head = 1 + len(tokenizer.encode("assistant\n"))
        plain = (token for token in range(tokenizer.vocab_size) if not tokenizer.is_control(token))
        self._tokens = {tokenizer.token_bytes(token): token for token in plain}
        self._answers: dict[bytes, bytes] = {}

    def compute(self, chunks: Sequence[ToyChunk]) -> FloatArray:
        with self.watching():
            for chunk in chunks:
                self._check(chunk)
            for chunk in chunks:
                self.write(chunk)
            rows = [row for chunk in chunks if chunk.rows for row in self._rows(self.read(chunk), chunk.rows)]
            for chunk in chunks:
                chunk.state.length += len(chunk.tokens)
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def write(self, chunk: ToyChunk) -> None:
        table, end = self._table(chunk), chunk.past + len(chunk.tokens)
        assert len(table) * self.block_size > end, "there is room for one more token"
        at = np.arange(chunk.past, end)
        self._slots[table[at // self.block_size], at % self.block_size] = chunk.tokens
        self._slots[table[end // self.block_size], end % self.block_size] = RUBBISH

    def _rows(self, tokens: IntArray, rows: int) -> list[FloatArray]:
        return [self._row(tokens[: len(tokens) - rows + 1 + row]) for row in range(rows)]

    def _row(self, tokens: IntArray) -> FloatArray:
        """The logits after some tokens: of tokens that go on with the answer, the longer the higher."""
        logits = np.full(self.vocab_size, _BELOW, np.float32)
        logits[self._end] = _BELOW / 2
        begins = np.flatnonzero(tokens == self._begin)
        start = int(begins[-1]) + self._head if len(begins) else len(tokens)
        said = b"".join(self._tokenizer.token_bytes(int(token)) for token in tokens[start:])
        wanted = self._wanted(tokens[: begins[-1]]) if len(begins) else b""
        if len(said) >= len(wanted) or not wanted.startswith(said):
            logits[self._end] = _ABOVE
            return logits
        rest = wanted[len(said) : len(said) + _LONGEST_TOKEN]
        for length in range(1, len(rest) + 1):
            if (token := self._tokens.get(rest[:length])) is not None:
                logits[token] = _ABOVE * length
        return logits

    def _wanted(self, prompt: IntArray) -> bytes:
        key = prompt.tobytes()
        if key not in self._answers:
            begins = [*np.flatnonzero(prompt == self._begin), len(prompt)]
            texts = [self._text(prompt[begins[at] : begins[at + 1]]) for at in range(len(begins) - 1)]
            self._answers[key] = self._answer(texts).encode()
            if len(self._answers) > 32:
                del self._answers[next(iter(self._answers))]
        return self._answers[key]

    def _text(self, tokens: IntArray) -> tuple[str, str]:
        """The role and the text of a message."""
        ends = np.flatnonzero(tokens == self._end)
        text = self._tokenizer.decode(tokens[1 : ends[0] if len(ends) else None].tolist(), skip_special=False)
        role, _, said = text.partition("\n")
        return role, said
