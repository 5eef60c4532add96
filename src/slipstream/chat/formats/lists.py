"""Formats with all calls of an answer in one JSON array, after a tag: Mistral until v7, Granite 3, Phi-4-mini."""

import json
import secrets
import string
from collections.abc import Sequence
from typing import Any

from slipstream.chat.formats.base import NativeTools, listed_calls, start_rules
from slipstream.chat.formats.json_calls import json_call_rules, read_json_call
from slipstream.chat.messages import Message
from slipstream.chat.reading import Reading, Steps, cut_off_in, skip, skip_space, text_until
from slipstream.chat.tags import Tags
from slipstream.chat.tools import ToolUse
from slipstream.tokenizer.provenance import content, own


class ListedCalls(NativeTools):
    """`BEGIN[{…}, {…}]END`, where there may be no end."""

    BEGIN = ""
    END = ""

    def __init__(self, tags: Tags) -> None:
        self._begin = tags(self.BEGIN)
        self._end = tags(self.END) if self.END else None

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag."""
        return cls.BEGIN in template

    def grammar(self, use: ToolUse) -> str:
        """See `ToolFormat.grammar`."""
        end = self._end.expression if self._end is not None else ""
        return "\n".join((start_rules(use, self._begin, f"{listed_calls(use)} {end}"), *json_call_rules(use.callable)))

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:  # noqa: ARG002
        """See `ToolFormat.read`."""
        while (yield from text_until(reading, self._begin.mark, reading.say)):
            reading.attempt()
            complete = (yield from skip(reading, "[")) and (yield from read_json_call(reading))
            while complete and (yield from skip(reading, ",")):
                reading.attempt(before=",")
                complete = yield from read_json_call(reading)
            if not complete:
                if reading.gave_up():
                    continue
                return  # a call is cut off
            for end in ("]", self._end.mark if self._end is not None else ""):
                if end and not (yield from skip(reading, end)) and reading.ended and cut_off_in(reading, end):
                    return
            yield from skip_space(reading)
        reading.say_rest()


class Mistral(ListedCalls):
    """Mistral Nemo, Large 2411, Small 2501: templates until v7."""

    name = "mistral"
    BEGIN = "[TOOL_CALLS]"

    def new_call_id(self) -> str:
        """See `short_call_id`."""
        return short_call_id()


def short_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse anything else."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Granite3(ListedCalls):
    """Granite 3.0 to 3.3."""

    name = "granite3"
    BEGIN = "<|tool_call|>"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag, and the tokens around roles."""
        return cls.BEGIN in template and "<|start_of_role|>" in template


class Phi4Mini(ListedCalls):
    """Phi-4-mini, whose template takes tools as text with the system message."""

    name = "phi4-mini"
    BEGIN, END = "<|tool_call|>", "<|/tool_call|>"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tags around its list of tools."""
        return "<|tool|>" in template and "<|/tool|>" in template

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """Tools with the system message, calls as text; the template has no other way in."""
        result = []
        for made, message in zip(super().messages(messages, use), messages, strict=True):
            calls = [{"name": call.name, "arguments": call.parsed_arguments()} for call in message.tool_calls]
            if calls:
                text = json.dumps(calls, ensure_ascii=False)
                made["content"] = self._written(message.text, text)
            result.append(made)
        if use.tools:
            if not result or result[0]["role"] != "system":
                result.insert(0, {"role": "system", "content": ""})
            functions = [tool.as_dict()["function"] for tool in use.tools]
            result[0]["tools"] = json.dumps(functions, ensure_ascii=False)
        return result

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:  # noqa: ARG002
        """None: they are with the system message."""
        return None

    def _written(self, said: str, calls: str) -> str:
        assert self._end is not None
        return content(said) + own(self.BEGIN) + content(calls) + own(self.END)
