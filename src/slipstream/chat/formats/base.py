"""What a tool-call format has to say: how tools enter the prompt, what an answer looks like, how it is read."""

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.chat.messages import Message
from slipstream.chat.reading import Reading, Steps, cut_off_in, skip, skip_space, text_until
from slipstream.chat.reasoning import Reasoning
from slipstream.chat.schema import Loss, Written, arguments_rules, literal
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.setting import INPUT, Tool, ToolUse
from slipstream.chat.tags import Tag, Tags, rule_until
from slipstream.chat.text_grammar import text_rules
from slipstream.tokenizer.provenance import Traced, content, origin_of, own


@dataclass(frozen=True, slots=True)
class AnswerGrammar:
    """What an answer must fit: a Lark grammar, and the keywords of its schemas that it leaves out."""

    source: str
    losses: tuple[Loss, ...] = ()


class ToolFormat(ABC):
    """One family's way to call tools, in one vocabulary. Most templates take tools and calls as they are."""

    name: str
    SIGNS: tuple[str, ...] = ()
    """What the chat template of a model holds that was trained on the format."""
    THOUGHTS: tuple[str, ...] = ("reasoning_content", "reasoning")
    """The names that its templates have for the reasoning of a message."""
    ARGUMENTS = "arguments"
    """The key of the arguments in calls that are JSON objects."""
    JSON_ARGUMENTS = True
    """Whether a model writes the arguments of a call as JSON."""
    TEXT_ARGUMENTS = False
    """Whether its templates take arguments as JSON text, to which they add strings."""

    SHORT_IDS = False
    """Whether its templates refuse ids of calls other than nine letters and digits."""
    TOOLS_IN_MESSAGES = False
    """Whether tools are part of the messages that its templates take."""

    ends: tuple[Tag, ...] = ()
    """What ends a text inside of a call, beside the quotation mark of JSON, and what ends calls."""
    before_text = ""
    """The Lark expression of what stands before an answer that is no call."""
    reasoning: Reasoning | None = None
    """Where answers and reasoning are of one piece; None where the template's reasoning goes with the format."""

    def __init__(self, tags: Tags) -> None:  # noqa: B027 - not every format has tags
        pass

    @classmethod
    def recognises(cls, template: str) -> bool:
        """Whether a model with this chat template was trained on the format."""
        return all(sign in template for sign in cls.SIGNS)

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:  # noqa: ARG002
        """The messages as the template takes them."""
        return [self.message(message) for message in messages]

    def message(self, message: Message) -> dict[str, Any]:
        """A message as the template takes it; as most expect them, its calls have parsed arguments."""
        result: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.reasoning:
            result |= dict.fromkeys(self.THOUGHTS, message.reasoning)
        if message.tool_calls:
            given = [call.arguments if self.TEXT_ARGUMENTS else call.parsed_arguments() for call in message.tool_calls]
            result["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
                for call, arguments in zip(message.tool_calls, given, strict=True)
            ]
        rest = {"tool_call_id": message.tool_call_id, "name": message.name}
        return result | {key: value for key, value in rest.items() if value is not None}

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:
        """The tools as the template takes them; None where there are none, or they are part of the messages."""
        return [tool.as_dict() for tool in use.described if not self.TOOLS_IN_MESSAGES] or None

    def grammar(self, use: ToolUse) -> AnswerGrammar:
        """The Lark rules of an answer, from `start`: with mode "auto" text or calls, with "required" calls alone."""
        names = [f"call_{index}" for index in range(len(use.callable))]
        written = [self._call_rules(name, tool) for name, tool in zip(names, use.callable, strict=True)]
        losses = [
            Loss(keyword, tool.name, of_text=_has_grammar(tool))
            for tool, each in zip(use.callable, written, strict=True)
            for keyword in each.losses
        ]
        if not self.JSON_ARGUMENTS:
            losses += [Loss(_NO_TEXT, tool.name, of_text=True) for tool in use.callable if _has_grammar(tool)]
        rules = (rule for each in written for rule in each.rules)
        return AnswerGrammar("\n".join((self._start(use), f"call: {' | '.join(names)}", *rules)), tuple(losses))

    @abstractmethod
    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """Read an answer's text and calls, telling at once what no further text can change.

        How the text was cut into pieces makes no difference to what they add up to.
        """

    def new_call_id(self) -> str:
        """An id that no other call has: such as OpenAI's, unless the template wants a short one."""
        if self.SHORT_IDS:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    @abstractmethod
    def _start(self, use: ToolUse) -> str:
        """The Lark rules of `start`, in which `call` is one of any of the tools."""

    def _call_rules(self, rule: str, tool: Tool) -> Written:
        """Lark rules for a call of a tool, from one of this name; by default it's a JSON object."""
        return with_json_arguments(rule, tool, literal(f'{call_opening(tool)}, "{self.ARGUMENTS}": '), '"}"')


class MarkedCalls(ToolFormat):
    """Text, in which one or several calls stand between the tags `BEGIN` and `END`; there may be no end."""

    BEGIN = END = ""

    def __init__(self, tags: Tags) -> None:
        self._begin, self._end = tags(self.BEGIN), tags(self.END)

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """See `ToolFormat.read`. What stands between tags and is no call is text, and so are the tags."""
        while (yield from text_until(reading, self._begin.mark, reading.say)):
            reading.attempt()
            complete = yield from self._read_calls(reading, use)
            if reading.gave_up():
                continue
            if not complete:
                return
            yield from skip_space(reading)
        rest = reading.take()
        reading.say(rest.rstrip() if reading.calls else rest)

    def _start(self, use: ToolUse) -> str:
        calls = f"{self._calls(use)} {self._end.expression}"
        if use.mode == "required":
            return f"start: {self._begin.expression} {calls}"
        return f"start: TEXT | head {calls}\n{rule_until(self._begin, 'head')}\nTEXT: /(.|\\n)*/"

    @abstractmethod
    def _calls(self, use: ToolUse) -> str:
        """The Lark expression of what stands between the tags, where each `call` is one."""

    @abstractmethod
    def _read_calls(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """Read what follows the first tag, and the last. Returns whether the answer may go on after it."""

    def _as_text(self, message: Message, calls: str) -> Traced:
        """The text of a message with its calls, for templates that have no other way in."""
        written = content(calls, origin_of(message.tool_calls[0].arguments))
        return content(message.text) + own(str(self._begin)) + written + own(str(self._end))


class TaggedCalls(MarkedCalls):
    """A pair of tags around each call; what stands between them is the subclass's affair."""

    BEGIN, END = "<tool_call>", "</tool_call>"
    INNER = '"\\n" call "\\n"'
    """The Lark expression of what stands between the tags."""
    BETWEEN = '"\\n"'
    """The Lark expression of what stands between an end and the next beginning."""
    INNER_MORE = ""
    """The Lark expression of further calls between the same tags, where models may write them there."""

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self.ends = (self._end,)

    def _calls(self, use: ToolUse) -> str:
        again = f"{self._end.expression} {self.BETWEEN} {self._begin.expression} {self.INNER}"
        return f"{self.INNER} ({self.INNER_MORE or again}){MORE}" if use.parallel else self.INNER

    def _read_calls(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        while (yield from self._read_call(reading, use)):
            if (yield from skip(reading, self._end.mark)):
                return True
            if reading.ended and cut_off_in(reading, self._end.mark):
                return False
            reading.attempt(before="")
        return False

    @abstractmethod
    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """Read a call. Returns whether it came to its end."""


def call_opening(tool: Tool) -> str:
    """How a call of the tool as a JSON object begins, up to its name."""
    return f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}'


def with_json_arguments(rule: str, tool: Tool, before: str, after: str = "") -> Written:
    """Lark rules for a call whose arguments are JSON that fits the tool's schema, between two expressions."""
    call = f"{rule}: {before} {rule}_arguments {after}"
    losses: tuple[str, ...] = ()
    if tool.text is not None and _has_grammar(tool):
        opening, ending, inside = literal(f'{{{json.dumps(INPUT)}: "'), literal('"}'), f"{rule}{TEXT}"
        text = f"{rule}_arguments: {opening} {inside}start {ending}"
        try:
            return Written([call, text, *text_rules(tool.text, inside)])
        except (UnsupportedError, ValueError) as error:
            losses = (str(error),)
    arguments = arguments_rules(f"{rule}_arguments", tool.parameters)
    return Written([call, *arguments.rules], (*losses, *arguments.losses))


def as_json(text: str) -> str:
    """A text as it stands, but for white space around it, if it's JSON, else as a string of JSON."""
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


def _has_grammar(tool: Tool) -> bool:
    """Whether it takes a text that must fit something."""
    return tool.text is not None and tool.text.syntax != "text"


TEXT = "_text_"
"""What stands between the name of a call's rule and the names of the grammar of its text."""
_NO_TEXT = "the model does not write arguments as JSON"
MORE = "{0,15}"
"""How many calls may follow the first: a model that has lost its way calls without end."""
