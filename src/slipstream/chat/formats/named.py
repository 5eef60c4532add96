"""Formats with a call's name between tags and its arguments as JSON: Mistral from v11 on, DeepSeek, Kimi K2."""

from slipstream.chat.formats.base import MORE, MarkedCalls, with_json_arguments
from slipstream.chat.formats.json_calls import read_json_arguments
from slipstream.chat.reading import Reading, Steps, skip, whole_until
from slipstream.chat.schema import Written, literal
from slipstream.chat.setting import Tool, ToolUse
from slipstream.chat.tags import Tags


class NamedCalls(MarkedCalls):
    """`BEGIN (CALL name NAMED arguments CALL_END)… END`. A family without `CALL` begins each call with `BEGIN`."""

    CALL = NAMED = CALL_END = ""
    INNER = ""
    """What divides the head of a call, which stands before `NAMED`."""
    AFTER = ""
    """Text between arguments and end."""

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._call, self._named, self._call_end = tags(self.CALL), tags(self.NAMED), tags(self.CALL_END)
        self._inner = tags(self.INNER)

    def _calls(self, use: ToolUse) -> str:
        each = self._call if self.CALL else self._begin
        more = f"({each.expression} call){MORE}" if use.parallel else ""
        return f"{self._call.expression} call {more}"

    def _call_rules(self, rule: str, tool: Tool) -> Written:
        before = f"{self._head_rule(tool.name)} {self._named.expression}"
        after = literal(self.AFTER) if self.AFTER else ""
        return with_json_arguments(rule, tool, before, f"{after} {self._call_end.expression}")

    def _read_calls(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        more = yield from skip(reading, self._call.mark)
        while more:
            name, id = self._head((yield from whole_until(reading, self._named.mark)) or "")
            if not name:
                return False
            reading.begin_call(name, id)
            if not (yield from read_json_arguments(reading)):
                return False
            for rest in (self.AFTER.strip(), self._call_end.mark):
                yield from skip(reading, rest)
            more = bool(self.CALL) and (yield from skip(reading, self._call.mark))
        yield from skip(reading, self._end.mark)
        return True

    def _head_rule(self, name: str) -> str:
        """The Lark expression of a call's head."""
        return literal(name)

    def _head(self, text: str) -> tuple[str, str | None]:
        """The function's name of what was read as one, and the call's id where the model gives it one."""
        return text.strip(), None


class Mistral13(NamedCalls):
    """Devstral, Ministral 3, Magistral since 2507: `[TOOL_CALLS]name[ARGS]{…}`."""

    name = "mistral-v13"
    BEGIN, NAMED = "[TOOL_CALLS]", "[ARGS]"
    SIGNS: tuple[str, ...] = (NAMED,)
    INNER = "[CALL_ID]"
    SHORT_IDS = True

    def _head(self, text: str) -> tuple[str, str | None]:
        name, _, id = text.partition(str(self._inner))
        return name.strip(), id.strip() or None


class Mistral11(Mistral13):
    """Mistral Small 3.1 and 3.2: the model gives each call an id, `[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`."""

    name = "mistral-v11"
    SIGNS = (Mistral13.NAMED, Mistral13.INNER)

    def _head_rule(self, name: str) -> str:
        return f"{literal(name)} {self._inner.expression} /[a-zA-Z0-9]{{9}}/"


class DeepSeekV31(NamedCalls):
    """DeepSeek V3.1."""

    name = "deepseek-v3.1"
    BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, NAMED, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    SIGNS: tuple[str, ...] = (NAMED,)
    TEXT_ARGUMENTS = True


class DeepSeekV3(DeepSeekV31):
    """DeepSeek V3 and R1: the name after the word function, arguments in a block of code."""

    name = "deepseek-v3"
    NAMED, INNER, AFTER = "\n```json\n", DeepSeekV31.NAMED, "\n```"
    SIGNS = (INNER, "```json")

    def _head_rule(self, name: str) -> str:
        return f'"function" {self._inner.expression} {literal(name)}'

    def _head(self, text: str) -> tuple[str, str | None]:
        return text.partition(str(self._inner))[2].strip(), None


class KimiK2(NamedCalls):
    """Kimi K2, whose heads are ids as well: `functions.name:0`."""

    name = "kimi-k2"
    BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    CALL, NAMED, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    SIGNS = (BEGIN,)  # some of its templates write the other tags in another way
    TEXT_ARGUMENTS = True

    def _head_rule(self, name: str) -> str:
        return f"{literal(f'functions.{name}:')} /[0-9]{{1,4}}/"

    def _head(self, text: str) -> tuple[str, str | None]:
        id = text.strip()
        return id.removeprefix("functions.").rpartition(":")[0] or id, id
