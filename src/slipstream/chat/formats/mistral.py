"""Mistral: `[TOOL_CALLS]` and a JSON array of calls."""

import secrets
import string

from slipstream.chat.formats.base import Mark, NativeTools
from slipstream.chat.formats.json_calls import call_rules, read_json_call
from slipstream.chat.formats.reading import Reading, Steps, text_until
from slipstream.chat.formats.tagged import MORE, start_rules
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
        calls = f'"[" call (", " call){MORE} "]"' if use.parallel else '"[" call "]"'
        return "\n".join((start_rules(use, BEGIN, mark, calls), *call_rules(use.callable)))

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:  # noqa: ARG002
        """See `ToolFormat.read`."""
        if not (yield from text_until(reading, BEGIN, reading.say)):
            reading.say(reading.take())
            return
        while (yield from read_json_call(reading)):
            pass

    def new_call_id(self) -> str:
        """Nine letters and digits: its templates refuse anything else."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
