"""Formats that write each argument of a call between tags of its own: Qwen3-Coder, Seed-OSS, MiniMax-M2, GLM-4."""

import json

from slipstream.chat.formats.base import TaggedCalls, parameters
from slipstream.chat.reading import Reading, Steps, comes_next, skip, text_before, whole_until
from slipstream.chat.schema import json_rule, literal
from slipstream.chat.setting import Schema, Tool, ToolUse
from slipstream.chat.tags import Tag, Tags, rule_until
from slipstream.tokenizer.provenance import content


class ParameterCalls(TaggedCalls):
    """Calls and arguments as elements that name what they hold, each a tag of text.

    Strings stand as they are, other values as JSON. A text ends at the first closing tag, so it can't hold one.
    """

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
        """What ends an argument's value."""
        end = f"{self.AROUND_VALUE}</parameter>"
        return Tag(literal(end), content(end))

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

    def _call_rules(self, rule: str, tool: Tool) -> list[str]:
        """A tag for each property, in the schema's order; those that are not required may be missing."""
        end = self._value_end.expression
        parts, rules = [], []
        for index, (name, schema, required) in enumerate(parameters(tool)):
            argument = f"{rule}_{index}"
            parts.append(f"({argument} {self._value_tail})" + ("" if required else "?"))
            head = f"{argument}: {self._value_head(name)}"
            if (given := _given_texts(schema)) is not None:
                rules.append(f"{head} ({' | '.join(map(literal, given))}) {end}")
            elif _is_text(schema):
                rules.append(f"{head} {argument}_text")
                length = schema.get("minLength", 0), schema.get("maxLength")
                rules.append(rule_until(self._value_end, f"{argument}_text", *length))
            else:
                rules.append(f"{head} {argument}_json {end}")
                rules.append(f"{argument}_json: {json_rule(schema)}")
        return [f"{rule}: {' '.join((self._call_head(tool.name), *parts, self._call_tail))}", *rules]

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """The arguments come one by one, when they are whole."""
        if (name := (yield from self._read_call_head(reading))) is None:
            return False
        schemas = {each.name: each.schema for tool in use.callable if tool.name == name for each in parameters(tool)}
        reading.begin_call(name)
        reading.add_arguments("{")
        separator = ""
        while (parameter := (yield from self._read_value_head(reading))) is not None:
            value = yield from whole_until(reading, self._value_end.mark.lstrip())
            if value is None:
                return False
            value = value.removeprefix(self.AROUND_VALUE).removesuffix(self.AROUND_VALUE)
            value = _as_json(value, schemas.get(parameter, {}))
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


def _is_text(schema: Schema) -> bool:
    return schema.get("type") == "string"


def _given_texts(schema: Schema) -> list[str] | None:
    """The texts that a value may be, if they are listed."""
    given = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return [text for text in given if isinstance(text, str)] if given is not None and _is_text(schema) else None


def _as_json(value: str, schema: Schema) -> str:
    """The value as JSON text: as it stands, unless the schema says string or it isn't JSON."""
    if not _is_text(schema):
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)
