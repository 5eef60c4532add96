"""Hermes and Qwen 2.5/3: `<tool_call>` around a JSON object."""

from collections.abc import Sequence

from slipstream.chat.formats.json_calls import call_rules, read_json_call
from slipstream.chat.formats.reading import Reading, Steps
from slipstream.chat.formats.tagged import BEGIN, TaggedCalls
from slipstream.chat.tools import Tool, ToolUse


class Hermes(TaggedCalls):
    """JSON in tags."""

    name = "hermes"

    def recognises(self, template: str) -> bool:
        """By its tag, unless the tag holds XML."""
        return BEGIN in template and "<function=" not in template

    def _call_rules(self, tools: Sequence[Tool]) -> Sequence[str]:
        return call_rules(tools)

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        return read_json_call(reading)
