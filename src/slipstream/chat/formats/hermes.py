"""Hermes, Qwen 2.5 and 3, Granite 4, SmolLM3: `<tool_call>` around a JSON object."""

import re
from collections.abc import Sequence

from slipstream.chat.formats.json_calls import json_call_rules, read_json_call
from slipstream.chat.formats.tagged import TaggedCalls
from slipstream.chat.reading import Reading, Steps
from slipstream.chat.tools import Tool, ToolUse

_JSON_IN_TAGS = re.compile(r"<tool_call>(\s|\\n)*\{")
"""As a template's source spells it too."""


class Hermes(TaggedCalls):
    """JSON in tags."""

    name = "hermes"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By its tag before JSON."""
        return _JSON_IN_TAGS.search(template) is not None

    def _call_rules(self, tools: Sequence[Tool]) -> Sequence[str]:
        return json_call_rules(tools)

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        return read_json_call(reading)
