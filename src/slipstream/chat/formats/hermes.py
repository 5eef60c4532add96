"""Hermes and Qwen 2.5/3: `<tool_call>` around a JSON object."""

from slipstream.chat.formats.base import Mark, NativeTools, ParsedAnswer
from slipstream.chat.formats.json_calls import (
    MORE,
    call_rules,
    free_text_then,
    read_call,
    read_marked_calls,
    unique_call_id,
)
from slipstream.chat.tools import ToolUse

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(NativeTools):
    """Calls one after the other, each in tags of its own."""

    name = "hermes"

    def recognises(self, template: str) -> bool:
        """By its tag, unless the tag holds XML."""
        return BEGIN in template and "<function=" not in template

    def grammar(self, use: ToolUse, mark: Mark) -> str:
        """See `ToolFormat.grammar`."""
        begin, end = mark(BEGIN), mark(END)
        more = f'("\\n" {begin} "\\n" call "\\n" {end}){MORE}' if use.parallel else ""
        calls = f'"\\n" call "\\n" {end} {more}'
        start = f"start: {begin} {calls}" if use.mode == "required" else free_text_then(BEGIN, begin, calls)
        return f"{start}\n{call_rules(use.callable)}"

    def parse(self, text: str, use: ToolUse, *, complete: bool) -> ParsedAnswer:  # noqa: ARG002
        """See `ToolFormat.parse`."""
        return read_marked_calls(text, BEGIN, END, read_call, complete=complete)

    def new_call_id(self) -> str:
        """See `ToolFormat.new_call_id`."""
        return unique_call_id()
