"""Calls after a mark, and such as stand each between tags of its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from slipstream.chat.formats.base import Mark, NativeTools
from slipstream.chat.formats.reading import Reading, Steps, skip, skip_space, text_until
from slipstream.chat.schema import literal
from slipstream.chat.tools import Tool, ToolUse

BEGIN, END = "<tool_call>", "</tool_call>"

MORE = "{0,15}"
"""How many calls may follow the first: a model that has lost its way calls without end."""


class TaggedCalls(NativeTools, ABC):
    """Calls one after the other, each in tags; what stands between them is the subclass's affair."""

    def grammar(self, use: ToolUse, mark: Mark) -> str:
        """See `ToolFormat.grammar`."""
        begin, end = mark(BEGIN), mark(END)
        more = f'("\\n" {begin} "\\n" call "\\n" {end}){MORE}' if use.parallel else ""
        start = start_rules(use, BEGIN, mark, f'"\\n" call "\\n" {end} {more}')
        return "\n".join((start, *self._call_rules(use.callable)))

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """See `ToolFormat.read`."""
        if not (yield from text_until(reading, BEGIN, reading.say)):
            reading.say(reading.take())
            return
        while (yield from self._read_call(reading, use)):
            if not (yield from skip(reading, END)) and END.startswith(reading.rest.lstrip()):
                return  # cut off inside of the tag
            yield from skip_space(reading)
            if not (yield from text_until(reading, BEGIN, reading.say)):
                reading.say(reading.take().rstrip())
                return

    @abstractmethod
    def _call_rules(self, tools: Sequence[Tool]) -> Sequence[str]:
        """Lark rules for `call`."""

    @abstractmethod
    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """Read a call. Returns whether it came to its end."""


def start_rules(use: ToolUse, begin: str, mark: Mark, calls: str) -> str:
    """Lark rules for `start`: `begin` and `calls`, or with mode "auto" also free text, alone or before them.

    `calls` is the Lark expression of what follows `begin`.
    """
    if use.mode == "required":
        return f"start: {mark(begin)} {calls}"
    if mark(begin) == literal(begin):
        return f"start: TEXT | head {calls}\nhead[lazy]: TEXT {literal(begin)}\nTEXT: /(.|\\n)*/"
    return f"start: TEXT | head {calls}\nhead: TEXT {mark(begin)}\nTEXT: /(.|\\n)*/"
