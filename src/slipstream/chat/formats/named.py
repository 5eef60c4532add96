"""Formats with a call's name between tags and its arguments as JSON: Mistral from v11 on, DeepSeek, Kimi K2."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from slipstream.chat.formats.base import MORE, NativeTools, call_rules, start_rules, with_json_arguments
from slipstream.chat.formats.json_calls import read_json_arguments
from slipstream.chat.formats.lists import short_call_id
from slipstream.chat.messages import Message
from slipstream.chat.reading import Reading, Steps, skip, skip_space, text_until, whole_until
from slipstream.chat.schema import literal
from slipstream.chat.tags import Tags
from slipstream.chat.tools import Tool, ToolUse


class Head(NamedTuple):
    """What a call says before its arguments: the function's name, and the call's id where the model gives it one."""

    name: str
    id: str | None = None


class NamedCalls(NativeTools):
    """`OPEN (BEGIN name NAMED arguments END)… CLOSE`; those of the tags that a family has not are empty."""

    OPEN = BEGIN = NAMED = END = CLOSE = ""
    AFTER = ""
    """Text between arguments and end."""
    TEXT_ARGUMENTS = False
    """Whether its templates take arguments as JSON text, to which they add strings."""

    def __init__(self, tags: Tags) -> None:
        self._begin, self._named = tags(self.BEGIN), tags(self.NAMED)
        self._open, self._end, self._close = (
            tags(text) if text else None for text in (self.OPEN, self.END, self.CLOSE)
        )

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag between name and arguments."""
        return cls.NAMED in template

    def grammar(self, use: ToolUse) -> str:
        """See `ToolFormat.grammar`."""
        begin = self._begin.expression
        end, close = (tag.expression if tag is not None else "" for tag in (self._end, self._close))
        after = literal(self.AFTER) if self.AFTER else ""
        more = f"({begin} call){MORE}" if use.parallel else ""
        if self._open is None:
            start = start_rules(use, self._begin, f"call {more} {close}")
        else:
            start = start_rules(use, self._open, f"{begin} call {more} {close}")

        def rules_of(rule: str, tool: Tool) -> list[str]:
            return with_json_arguments(rule, tool, self._head_rule(tool.name), f"{after} {end}")

        return "\n".join((start, *call_rules(use.callable, rules_of)))

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """See `ToolFormat.messages`."""
        made = super().messages(messages, use)
        if self.TEXT_ARGUMENTS:
            for each, message in zip(made, messages, strict=True):
                for call, given in zip(each.get("tool_calls", ()), message.tool_calls, strict=True):
                    call["function"]["arguments"] = given.arguments
        return made

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:  # noqa: ARG002
        """See `ToolFormat.read`."""
        first = self._open or self._begin
        while (yield from text_until(reading, first.mark, reading.say)):
            reading.attempt()
            more = self._open is None or (yield from skip(reading, self._begin.mark))
            while more:
                if not (yield from self._read_call(reading)):
                    break
                more = self._open is not None and (yield from skip(reading, self._begin.mark))
            if reading.gave_up():
                continue
            if more:
                return  # the call is cut off
            if self._close is not None:
                yield from skip(reading, self._close.mark)
            yield from skip_space(reading)
        reading.say_rest()

    def _read_call(self, reading: Reading) -> Steps[bool]:
        if (head := (yield from self._read_head(reading))) is None:
            return False
        reading.begin_call(head.name, head.id)
        if not (yield from read_json_arguments(reading)):
            return False
        for rest in (self.AFTER.strip(), self._end.mark if self._end is not None else ""):
            if rest:
                yield from skip(reading, rest)
        return True

    def _head_rule(self, name: str) -> str:
        """The Lark expression of a call's head."""
        return f"{literal(name)} {self._named.expression}"

    def _read_head(self, reading: Reading) -> Steps[Head | None]:
        """Read a call's head; None if it doesn't come."""
        name = yield from whole_until(reading, self._named.mark)
        return Head(name.strip()) if name is not None else None


class Mistral13(NamedCalls):
    """Devstral, Ministral 3, Magistral since 2507: `[TOOL_CALLS]name[ARGS]{…}`."""

    name = "mistral-v13"
    BEGIN, NAMED = "[TOOL_CALLS]", "[ARGS]"

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._call_id = tags("[CALL_ID]")

    def new_call_id(self) -> str:
        """See `short_call_id`."""
        return short_call_id()

    def _read_head(self, reading: Reading) -> Steps[Head | None]:
        head = yield from whole_until(reading, self._named.mark)
        if head is None:
            return None
        name, _, id = head.partition(str(self._call_id))
        return Head(name.strip(), id.strip() or None)


class Mistral11(Mistral13):
    """Mistral Small 3.1 and 3.2: the model gives each call an id, `[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`."""

    name = "mistral-v11"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag of ids."""
        return cls.NAMED in template and "[CALL_ID]" in template

    def _head_rule(self, name: str) -> str:
        return f"{literal(name)} {self._call_id.expression} /[a-zA-Z0-9]{{9}}/ {self._named.expression}"


class DeepSeekV31(NamedCalls):
    """DeepSeek V3.1 and later."""

    name = "deepseek-v3.1"
    OPEN, CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    BEGIN, NAMED, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    TEXT_ARGUMENTS = True


class DeepSeekV3(DeepSeekV31):
    """DeepSeek V3 and R1: the name after the word function, arguments in a block of code."""

    name = "deepseek-v3"
    AFTER = "\n```"
    _BLOCK = "\n```json\n"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By its tags, and the block of code."""
        return cls.NAMED in template and "```json" in template

    def _head_rule(self, name: str) -> str:
        return f'"function" {self._named.expression} {literal(f"{name}{self._BLOCK}")}'

    def _read_head(self, reading: Reading) -> Steps[Head | None]:
        if (yield from whole_until(reading, self._named.mark)) is None:
            return None
        name = yield from whole_until(reading, self._BLOCK)
        return Head(name.strip()) if name is not None else None


class KimiK2(NamedCalls):
    """Kimi K2, whose heads are ids as well: `functions.name:0`."""

    name = "kimi-k2"
    OPEN, CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    BEGIN, NAMED, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    TEXT_ARGUMENTS = True

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag around all calls: some of its templates write the others in another way."""
        return cls.OPEN in template

    def _head_rule(self, name: str) -> str:
        return f"{literal(f'functions.{name}:')} /[0-9]{{1,4}}/ {self._named.expression}"

    def _read_head(self, reading: Reading) -> Steps[Head | None]:
        head = yield from whole_until(reading, self._named.mark)
        if head is None:
            return None
        id = head.strip()
        return Head(id.removeprefix("functions.").rpartition(":")[0] or id, id)
