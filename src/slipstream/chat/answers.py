"""Answers: the grammar that a request demands of one, and reading one as it comes."""

from slipstream.chat.formats import ToolFormat
from slipstream.chat.formats.base import Mark
from slipstream.chat.formats.reading import AnswerDelta, Reading, Steps, skip, skip_space, text_until
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.schema import closed, json_rule
from slipstream.chat.tools import Schema, ToolUse

_THINK, _THOUGHT = "<think>", "</think>"
_GAP = r"GAP: /\n{0,2}/"


def answer_grammar(
    tool_format: ToolFormat,
    use: ToolUse,
    response_schema: Schema | None,
    mark: Mark,
    *,
    reasons: bool,
    opens_reasoning: bool,
) -> str | None:
    """The Lark grammar that the answer must fit, or None if anything will do.

    With a `response_schema` an answer that is no call is JSON that fits it. A model that `reasons` may do so first.
    """
    may_call = bool(use.callable)
    if not may_call and response_schema is None:
        return None
    rules = []
    if may_call:
        required = ToolUse(use.tools, "required", use.allowed, use.parallel)
        body = tool_format.grammar(use if response_schema is None else required, mark)
        rules.append(body.replace("start:", "answer:", 1))
    if response_schema is not None:
        rules.append(f"response: {json_rule(closed(response_schema))}")
    answer = "answer" if response_schema is None else "answer | response" if may_call and use.mode == "auto" else None
    answer = answer or ("answer" if may_call else "response")
    if opens_reasoning:
        rules.append(f"start: reasoning GAP ({answer})\nreasoning[lazy]: /(.|\\n)*<\\/think>/\n{_GAP}")
    elif reasons:
        rules.append(f"start: (reasoning GAP)? ({answer})\nreasoning[lazy]: /<think>(.|\\n)*<\\/think>/\n{_GAP}")
    else:
        rules.append(f"start: {answer}")
    return "\n".join(rules)


class AnswerReader:
    """Takes an answer apart as it comes: reasoning, text, calls.

    However the text is cut into pieces, the deltas add up to the same.
    """

    def __init__(self, tool_format: ToolFormat, use: ToolUse, *, opens_reasoning: bool) -> None:
        self._pieces: list[str] = []
        self._reading = Reading(tool_format.new_call_id)
        self._steps = _read(self._reading, tool_format, use, opens_reasoning=opens_reasoning)

    def feed(self, text: str, *, last: bool = False) -> list[AnswerDelta]:
        """What becomes certain with this text."""
        self._pieces.append(text)
        self._reading.rest += text
        self._reading.ended = last
        self._reading.deltas = []
        next(self._steps, None)
        return self._reading.deltas

    @property
    def generated(self) -> str:
        """All text so far, as generated."""
        return "".join(self._pieces)

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation, once the last text was fed; a call may be cut off."""
        calls = (ToolCall(call.id, call.name, "".join(call.arguments)) for call in self._reading.calls)
        return Message("assistant", "".join(self._reading.text), tuple(calls))

    @property
    def calls_to_run(self) -> bool:
        """Whether the answer ends in calls; it does not if it was cut off inside of one."""
        return bool(self._reading.calls) and self._reading.calls[-1].complete

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reading.reasoning)


def _read(reading: Reading, tool_format: ToolFormat, use: ToolUse, *, opens_reasoning: bool) -> Steps[None]:
    if opens_reasoning or (yield from skip(reading, _THINK)):
        yield from skip_space(reading)
        if not (yield from text_until(reading, _THOUGHT, reading.think)):
            reading.think(reading.take().rstrip())
        yield from skip_space(reading)
    yield from tool_format.read(reading, use) if use.callable else reading.say_all()
