"""Mistral: `[TOOL_CALLS]` and a JSON array of calls."""

import secrets
import string

from slipstream.chat.formats.base import Mark, NativeTools, ParsedAnswer, ParsedCall, certain_length
from slipstream.chat.formats.json_calls import MORE, call_rules, free_text_then, read_call
from slipstream.chat.tools import ToolUse

BEGIN = "[TOOL_CALLS]"


class Mistral(NativeTools):
    """All calls of an answer in one array, after a token that says so."""

    name = "mistral"

    def recognises(self, template: str) -> bool:
        """By the token."""
        return BEGIN in template

    def grammar(self, use: ToolUse, mark: Mark) -> str:
        """See `ToolFormat.grammar`."""
        begin = mark(BEGIN)
        calls = f'"[" call (", " call){MORE} "]"' if use.parallel else '"[" call "]"'
        start = f"start: {begin} {calls}" if use.mode == "required" else free_text_then(BEGIN, begin, calls)
        return f"{start}\n{call_rules(use.callable)}"

    def parse(self, text: str, use: ToolUse, *, complete: bool) -> ParsedAnswer:  # noqa: ARG002
        """See `ToolFormat.parse`."""
        before, found, array = text.partition(BEGIN)
        if not found:
            return ParsedAnswer(text if complete else text[: certain_length(text, (BEGIN,))])
        calls: list[ParsedCall] = []
        at: int | None = 0
        while at is not None:
            call, at = read_call(array, at)
            if call is None:
                break
            calls.append(call)
        return ParsedAnswer(before.rstrip(), tuple(calls))

    def new_call_id(self) -> str:
        """Nine letters and digits: its templates refuse anything else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
