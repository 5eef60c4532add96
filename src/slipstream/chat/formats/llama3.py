"""Llama 3.1 to 3.3: the whole answer is one JSON object with `parameters`."""

from slipstream.chat.formats.base import Mark, NativeTools, ParsedAnswer
from slipstream.chat.formats.json_calls import call_rules, read_call, unique_call_id
from slipstream.chat.tools import ToolUse


class Llama3(NativeTools):
    """One call an answer: an answer that begins with a brace is a call, any other is text."""

    name = "llama3"

    def recognises(self, template: str) -> bool:
        """By the header tokens and the word for arguments in its instructions."""
        return "<|start_header_id|>" in template and '"parameters"' in template

    def grammar(self, use: ToolUse, mark: Mark) -> str:  # noqa: ARG002
        """See `ToolFormat.grammar`."""
        start = "start: call" if use.mode == "required" else "start: call | TEXT\nTEXT: /([^{](.|\\n)*)?/"
        return f"{start}\n{call_rules(use.callable, arguments_key='parameters')}"

    def parse(self, text: str, use: ToolUse, *, complete: bool) -> ParsedAnswer:  # noqa: ARG002
        """See `ToolFormat.parse`."""
        if not text.startswith("{"):
            return ParsedAnswer(text)
        call, _ = read_call(text, 0)
        if call is None:
            return ParsedAnswer(text if complete else "")
        return ParsedAnswer(calls=(call,))

    def new_call_id(self) -> str:
        """See `ToolFormat.new_call_id`."""
        return unique_call_id()
