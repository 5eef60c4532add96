"""Formats that write each argument of a call between tags of its own: Qwen3-Coder, Seed-OSS, MiniMax-M2, GLM-4."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.chat.formats.base import call_rules
from slipstream.chat.formats.tagged import TaggedCalls
from slipstream.chat.reading import Reading, Steps, comes_next, skip, text_before, whole_until
from slipstream.chat.schema import as_object, closed_parameters, json_rule, literal, with_definitions
from slipstream.chat.tags import Tag, Tags, plain_tag, text_until
from slipstream.chat.tools import Tool, ToolUse


class ParameterCalls(TaggedCalls):
    """Strings stand as they are, other values as JSON. A text ends at the first closing tag, so it can't hold one."""

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._value_end = self._end_of_value(tags)
        self.ends = (self._value_end, self._end)

    @abstractmethod
    def _end_of_value(self, tags: Tags) -> Tag:
        """What ends an argument's value."""

    @abstractmethod
    def _call_head(self, name: str) -> str:
        """The Lark expression of what stands before the arguments."""

    @abstractmethod
    def _value_head(self, parameter: str) -> str:
        """The Lark expression of what stands before an argument's value."""

    @abstractmethod
    def _read_call_head(self, reading: Reading) -> Steps[str | None]:
        """Read what stands before the arguments. Returns the name, or None if it isn't there."""

    @abstractmethod
    def _read_value_head(self, reading: Reading) -> Steps[str | None]:
        """Read what stands before a value. Returns the parameter's name, or None if no argument comes."""

    @abstractmethod
    def _read_call_tail(self, reading: Reading) -> Steps[bool]:
        """Read what stands after the arguments. Returns whether it is there."""

    _CALL_TAIL = _VALUE_TAIL = ""
    """The Lark expressions of what stands after all arguments, and after each."""

    def _call_rules(self, tools: Sequence[Tool]) -> Sequence[str]:
        return call_rules(tools, self._tool_rules)

    def _tool_rules(self, rule: str, tool: Tool) -> list[str]:
        """A tag for each property, in the schema's order; those that are not required may be missing."""
        whole = closed_parameters(tool.parameters)
        schema = as_object(whole, whole, tool.name)
        required = schema.get("required", [])
        end = self._value_end.expression
        parts, rules = [], []
        for index, (name, value) in enumerate(schema.get("properties", {}).items()):
            if value is False:
                continue
            parts.append(f"({rule}_{index} {self._VALUE_TAIL})" + ("" if name in required else "?"))
            head = self._value_head(name)
            given = _given_texts(value)
            if given is not None:
                options = " | ".join(map(literal, given))
                rules.append(f"{rule}_{index}: {head} ({options}) {end}")
            elif _is_text(value):
                text = f"{rule}_{index}_text"
                rules.append(f"{rule}_{index}: {head} {text}")
                rules.append(text_until(self._value_end, text, value.get("minLength", 0), value.get("maxLength")))
            else:
                rules.append(f"{rule}_{index}: {head} {rule}_{index}_json {end}")
                rules.append(
                    f"{rule}_{index}_json: {json_rule(with_definitions({} if value is True else value, whole))}"
                )
        return [f"{rule}: {' '.join((self._call_head(tool.name), *parts, self._CALL_TAIL))}", *rules]

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """The arguments come one by one, when they are whole."""
        if (name := (yield from self._read_call_head(reading))) is None:
            return False
        properties = _properties(name, use)
        reading.begin_call(name)
        reading.add_arguments("{")
        separator = ""
        while (parameter := (yield from self._read_value_head(reading))) is not None:
            value = yield from whole_until(reading, self._value_end.mark.lstrip())
            if value is None:
                return False
            value = _as_json(self._value_of(value), properties.get(parameter, {}))
            reading.add_arguments(f"{separator}{json.dumps(parameter, ensure_ascii=False)}: {value}")
            separator = ", "
        if not (yield from self._read_call_tail(reading)):
            return False
        reading.add_arguments("}")
        reading.end_call()
        return True

    def _value_of(self, text: str) -> str:
        """The value that stands between the tags."""
        return text


class ElementCalls(ParameterCalls):
    """Calls and arguments as elements that name what they hold, each a tag of text."""

    CALL = PARAMETER = ("", "")
    """What stands before and after the name of a function, and of a parameter."""
    AROUND_VALUE = ""
    """The line end between a value and its tags, if there is one."""
    CALL_END = ""

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._CALL_TAIL = literal(f"\n{self.CALL_END}")

    def _end_of_value(self, tags: Tags) -> Tag:  # noqa: ARG002
        return plain_tag(f"{self.AROUND_VALUE}</parameter>")

    def _call_head(self, name: str) -> str:
        return literal(name.join(self.CALL))

    def _value_head(self, parameter: str) -> str:
        return literal(f"\n{parameter.join(self.PARAMETER)}{self.AROUND_VALUE}")

    def _read_call_head(self, reading: Reading) -> Steps[str | None]:
        return _read_name(reading, *self.CALL)

    def _read_value_head(self, reading: Reading) -> Steps[str | None]:
        return _read_name(reading, *self.PARAMETER)

    def _read_call_tail(self, reading: Reading) -> Steps[bool]:
        return skip(reading, self.CALL_END)

    def _value_of(self, text: str) -> str:
        return text.removeprefix(self.AROUND_VALUE).removesuffix(self.AROUND_VALUE)


def _read_name(reading: Reading, before: str, after: str) -> Steps[str | None]:
    """The name between two texts, if they come next."""
    begun = yield from skip(reading, before)
    return (yield from whole_until(reading, after)) if begun else None


class Qwen3Coder(ElementCalls):
    """Qwen3-Coder, Qwen3.5: `<function=…>` and `<parameter=…>`, each value on lines of its own."""

    name = "qwen3-coder"
    CALL, PARAMETER = ("<function=", ">"), ("<parameter=", ">")
    AROUND_VALUE = "\n"
    CALL_END = "</function>"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag of a function."""
        return cls.BEGIN in template and "<function=" in template


class SeedOSS(ElementCalls):
    """Seed-OSS: the same in tags of its own, without lines for values."""

    name = "seed-oss"
    BEGIN, END = "<seed:tool_call>", "</seed:tool_call>"
    CALL, PARAMETER = Qwen3Coder.CALL, Qwen3Coder.PARAMETER
    CALL_END = Qwen3Coder.CALL_END

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By its tag."""
        return cls.BEGIN in template


class MiniMaxM2(ElementCalls):
    """MiniMax-M2: `<invoke name="…">` and `<parameter name="…">` in its own tags."""

    name = "minimax-m2"
    BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"
    INNER_MORE = 'call "\\n"'
    CALL, PARAMETER = ('<invoke name="', '">'), ('<parameter name="', '">')
    CALL_END = "</invoke>"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By its tag: the name, as a template spells it."""
        return "minimax:tool_call" in template


class GLM4(ParameterCalls):
    """GLM-4.5 and 4.6: the name, then `<arg_key>` and `<arg_value>` in turn, on lines of their own."""

    name = "glm-4"
    INNER = "call"
    LINE_END = "\n"

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._key, self._key_end = tags("<arg_key>"), tags("</arg_key>")
        self._value = tags("<arg_value>")
        self._VALUE_TAIL = self._line_end = literal(self.LINE_END) if self.LINE_END else ""

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the tag of a key."""
        return "<arg_key>" in template

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
        if not (yield from skip(reading, self._key.mark)):
            return None
        parameter = yield from whole_until(reading, self._key_end.mark)
        return parameter if (yield from skip(reading, self._value.mark)) else None

    def _read_call_tail(self, reading: Reading) -> Steps[bool]:
        return comes_next(reading, self._end.mark)


class GLM47(GLM4):
    """GLM-4.7 and later: the same without line ends."""

    name = "glm-4.7"
    LINE_END = ""

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By a value right after its key."""
        return "</arg_key><arg_value>" in template


def _is_text(schema: Mapping[str, Any] | bool) -> bool:
    return not isinstance(schema, bool) and schema.get("type") == "string"


def _given_texts(schema: Mapping[str, Any] | bool) -> list[str] | None:
    """The texts that a value may be, if they are listed."""
    if isinstance(schema, bool) or not _is_text(schema):
        return None
    given = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return None if given is None else [text for text in given if isinstance(text, str)]


def _properties(name: str, use: ToolUse) -> Mapping[str, Any]:
    """The schemas of a tool's parameters."""
    whole = closed_parameters(next((tool.parameters for tool in use.callable if tool.name == name), {}))
    properties: Mapping[str, Any] = as_object(whole, whole).get("properties", {})
    return properties


def _as_json(value: str, schema: Mapping[str, Any]) -> str:
    """The value as JSON text: as it stands, unless the schema says string or it isn't JSON."""
    if not _is_text(schema):
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)
