"""Calls one after the other, each between a pair of tags."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from slipstream.chat.formats.base import MORE, NativeTools, start_rules
from slipstream.chat.reading import Reading, Steps, cut_off_in, skip, skip_space, text_until
from slipstream.chat.tags import Tags
from slipstream.chat.tools import Tool, ToolUse


class TaggedCalls(NativeTools, ABC):
    """A pair of tags around each call; what stands between them is the subclass's affair."""

    BEGIN, END = "<tool_call>", "</tool_call>"
    INNER = '"\\n" call "\\n"'
    """The Lark expression of what stands between the tags."""
    BETWEEN = '"\\n"'
    """The Lark expression of what stands between an end and the next beginning."""
    INNER_MORE = ""
    """The Lark expression of further calls between the same tags, where models may write them there."""

    def __init__(self, tags: Tags) -> None:
        self._begin, self._end = tags(self.BEGIN), tags(self.END)
        self.ends = (self._end,)

    def grammar(self, use: ToolUse) -> str:
        """See `ToolFormat.grammar`."""
        begin, end = self._begin.expression, self._end.expression
        between = self.INNER_MORE or f"{end} {self.BETWEEN} {begin} {self.INNER}"
        further = f"({between}){MORE}" if use.parallel else ""
        start = start_rules(use, self._begin, f"{self.INNER} {further} {end}")
        return "\n".join((start, *self._call_rules(use.callable)))

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """See `ToolFormat.read`. What stands between tags and is no call is text, and so are the tags."""
        while (yield from text_until(reading, self._begin.mark, reading.say)):
            reading.attempt()
            while (yield from self._read_call(reading, use)):
                if (yield from skip(reading, self._end.mark)):
                    yield from skip_space(reading)
                    break
                if reading.ended and cut_off_in(reading, self._end.mark):
                    return
                reading.attempt(before="")
            else:
                if not reading.gave_up():
                    return  # a call is cut off
        reading.say_rest()

    @abstractmethod
    def _call_rules(self, tools: Sequence[Tool]) -> Sequence[str]:
        """Lark rules for `call`."""

    @abstractmethod
    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """Read a call. Returns whether it came to its end."""
