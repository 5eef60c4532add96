"""Formats that write each argument of a call between tags of its own: Qwen3-Coder, Seed-OSS, MiniMax-M2, GLM-4."""

import json

from slipstream.chat.formats.base import TaggedCalls, as_json
from slipstream.chat.reading import Reading, Steps, comes_next, skip, text_before, whole_until
from slipstream.chat.schema import Arguments, Written, literal, text_arguments
from slipstream.chat.schema.objects import Member
from slipstream.chat.schema.regex_writing import RAW, either, terminal
from slipstream.chat.schema.shapes import Strings
from slipstream.chat.setting import Tool, ToolUse
from slipstream.chat.tags import Tag, Tags, rule_until


class ParameterCalls(TaggedCalls):
    """Calls and arguments as elements that name what they hold, each a tag of text.

    Strings stand as they are, other values as JSON. A text ends at the first closing tag, so it can't hold one.
    """

    JSON_ARGUMENTS = False
    CALL, PARAMETER = ("<function=", ">"), ("<parameter=", ">")
    """What stands before and after the name of a function, and of a parameter."""
    AROUND_VALUE = ""
    """The line end between a value and its tags, if there is one."""
    CALL_END = "</function>"

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._value_end = self._end_of_value(tags)
        self.ends = (self._value_end, self._end)
        self._call_tail, self._value_tail = literal(f"\n{self.CALL_END}"), ""
        """The Lark expressions of what stands after all arguments, and after each."""

    def _end_of_value(self, tags: Tags) -> Tag:  # noqa: ARG002
        """What ends an argument's value: a text, whatever the vocabulary has."""
        return Tags()(f"{self.AROUND_VALUE}</parameter>")

    def _call_head(self, name: str) -> str:
        """The Lark expression of what stands before the arguments."""
        return literal(name.join(self.CALL))

    def _value_head(self, parameter: str) -> str:
        """The Lark expression of what stands before an argument's value."""
        return literal(f"\n{parameter.join(self.PARAMETER)}{self.AROUND_VALUE}")

    def _read_call_head(self, reading: Reading) -> Steps[str | None]:
        """Read what stands before the arguments. Returns the name, or None if it isn't there."""
        return _read_name(reading, *self.CALL)

    def _read_value_head(self, reading: Reading) -> Steps[str | None]:
        """Read what stands before a value. Returns the parameter's name, or None if no argument comes."""
        return _read_name(reading, *self.PARAMETER)

    def _read_call_tail(self, reading: Reading) -> Steps[bool]:
        """Read what stands after the arguments. Returns whether it is there."""
        return skip(reading, self.CALL_END)

    def _call_rules(self, rule: str, tool: Tool) -> Written:
        """A tag for each argument, in the schema's order; those that are not required may be missing."""
        arguments = Arguments(tool.parameters, prefix=f"{rule}_value")
        rules: list[str] = []
        ways = []
        for members in arguments.forms:
            parts = []
            for member in members:
                argument = f"{rule}_{len(rules)}"
                parts.append(f"({argument} {self._value_tail})" + ("" if member.required else "?"))
                rules.append(self._argument_rule(argument, member, arguments))
            ways.append(" ".join((self._call_head(tool.name), *parts, self._call_tail)))
        rules += arguments.values.rules
        return Written([f"{rule}: {' | '.join(dict.fromkeys(ways))}", *rules], tuple(arguments.meaning.losses))

    def _argument_rule(self, argument: str, member: Member, arguments: Arguments) -> str:
        """The Lark rules of an argument in its tags."""
        end = self._value_end.expression
        head = f"{argument}: {self._value_head(member.key)}"
        texts = arguments.text(member.node) if member.key in arguments.texts else None
        if texts is None:
            return f"{head} {arguments.values.expression(member.node)} {end}"
        if any(each.values is None for each in texts):
            body = None if Strings() in texts else terminal(either(each.texts for each in texts), RAW)
            return f"{head} {argument}_text\n{rule_until(self._value_end, f'{argument}_text', body)}"
        given = dict.fromkeys(text for each in texts for text in each.values or ())
        return f"{head} ({' | '.join(map(literal, given))}) {end}"

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """The arguments come one by one, when they are whole."""
        if (name := (yield from self._read_call_head(reading))) is None:
            return False
        called = [tool for tool in use.callable if tool.name == name]
        texts = {each for tool in called for each in text_arguments(json.dumps(tool.parameters))}
        reading.begin_call(name)
        reading.add_arguments("{")
        separator = ""
        while (parameter := (yield from self._read_value_head(reading))) is not None:
            value = yield from whole_until(reading, self._value_end.mark.lstrip())
            if value is None:
                return False
            value = value.removeprefix(self.AROUND_VALUE).removesuffix(self.AROUND_VALUE)
            value = json.dumps(value, ensure_ascii=False) if parameter in texts else as_json(value)
            reading.add_arguments(f"{separator}{json.dumps(parameter, ensure_ascii=False)}: {value}")
            separator = ", "
        if not (yield from self._read_call_tail(reading)):
            return False
        reading.add_arguments("}")
        reading.end_call()
        return True


def _read_name(reading: Reading, before: str, after: str) -> Steps[str | None]:
    """The name between two texts, if they come next."""
    begun = yield from skip(reading, before)
    return (yield from whole_until(reading, after)) if begun else None


class Qwen3Coder(ParameterCalls):
    """Qwen3-Coder, Qwen3.5: `<function=…>` and `<parameter=…>`, each value on lines of its own."""

    name = "qwen3-coder"
    SIGNS = (ParameterCalls.BEGIN, "<function=")
    AROUND_VALUE = "\n"


class SeedOSS(ParameterCalls):
    """Seed-OSS: the same in tags of its own, without lines for values."""

    name = "seed-oss"
    BEGIN, END = "<seed:tool_call>", "</seed:tool_call>"
    SIGNS = (BEGIN,)


class MiniMaxM2(ParameterCalls):
    """MiniMax-M2: `<invoke name="…">` and `<parameter name="…">` in its own tags."""

    name = "minimax-m2"
    BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"
    SIGNS = ("minimax:tool_call",)  # as a template may spell the tag
    INNER_MORE = 'call "\\n"'
    CALL, PARAMETER = ('<invoke name="', '">'), ('<parameter name="', '">')
    CALL_END = "</invoke>"


class GLM4(ParameterCalls):
    """GLM-4.5 and 4.6: the name, then `<arg_key>` and `<arg_value>` in turn, on lines of their own."""

    name = "glm-4"
    SIGNS: tuple[str, ...] = ("<arg_key>",)
    INNER = "call"
    LINE_END = "\n"

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._key, self._key_end = tags("<arg_key>"), tags("</arg_key>")
        self._value = tags("<arg_value>")
        self._value_tail = self._line_end = literal(self.LINE_END) if self.LINE_END else ""
        self._call_tail = ""

    def _end_of_value(self, tags: Tags) -> Tag:
        return tags("</arg_value>")

    def _call_head(self, name: str) -> str:
        return literal(f"{name}{self.LINE_END}")

    def _value_head(self, parameter: str) -> str:
        key = f"{self._key.expression} {literal(parameter)} {self._key_end.expression}"
        return f"{key} {self._line_end} {self._value.expression}"

    def _read_call_head(self, reading: Reading) -> Steps[str | None]:
        name = yield from text_before(reading, "\n", self._key.mark, self._end.mark)
        return name.strip() if name is not None and name.strip() else None

    def _read_value_head(self, reading: Reading) -> Steps[str | None]:
        parameter = yield from _read_name(reading, self._key.mark, self._key_end.mark)
        return parameter if parameter is not None and (yield from skip(reading, self._value.mark)) else None

    def _read_call_tail(self, reading: Reading) -> Steps[bool]:
        return comes_next(reading, self._end.mark)


class GLM47(GLM4):
    """GLM-4.7 and later: the same without line ends, so that a value comes right after its key."""

    name = "glm-4.7"
    SIGNS = ("</arg_key><arg_value>",)
    LINE_END = ""
