"""Llama 3.1 to 3.3: the whole answer is one JSON object with `parameters`."""

from slipstream.chat.formats.base import NativeTools
from slipstream.chat.formats.json_calls import call_opening, json_call_rules, read_json_call
from slipstream.chat.reading import Reading, Steps, comes_next
from slipstream.chat.tags import Tags
from slipstream.chat.tools import ToolUse


class Llama3(NativeTools):
    """One call an answer: an answer that begins as a call does is one, any other is text."""

    name = "llama3"

    def __init__(self, tags: Tags) -> None:
        pass

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the header tokens and the word for arguments in its instructions."""
        return "<|start_header_id|>" in template and '"parameters"' in template

    def grammar(self, use: ToolUse) -> str:
        """See `ToolFormat.grammar`."""
        start = "start: call" if use.mode == "required" else "start: call | TEXT\nTEXT: /([^{](.|\n)*)?/"
        return "\n".join((start, *json_call_rules(use.callable, arguments_key="parameters")))

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """See `ToolFormat.read`. An object that doesn't begin as a call is text: a response schema may ask for it."""
        if (yield from comes_next(reading, *map(call_opening, use.callable))) and reading.rest.startswith("{"):
            yield from read_json_call(reading)
        else:
            yield from reading.say_all()
