"""Answers: the grammar that a request demands of one, and reading one as it comes."""

from dataclasses import dataclass

from slipstream.chat.formats import ParsedAnswer, ToolFormat
from slipstream.chat.formats.base import Mark, certain_length
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.schema import closed, json_rule
from slipstream.chat.tools import Schema, ToolUse

_THINK, _THOUGHT = "<think>", "</think>"
_GAP = r"GAP: /\n{0,2}/"


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What an answer says more than before.

    A call is told with its `index`: `id` and `name` when it begins, then pieces of the JSON text of its `arguments`.
    """

    text: str = ""
    reasoning: str = ""
    index: int = 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""


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
        self._format = tool_format
        self._use = use
        self._opens_reasoning = opens_reasoning
        self._ids: list[str] = []
        self._told = ParsedAnswer()
        self.generated = ""
        """All text so far, as generated."""

    def feed(self, text: str, *, last: bool = False) -> list[AnswerDelta]:
        """What becomes certain with this text."""
        self.generated += text
        now = self._parse(complete=last)
        deltas = []
        if reasoning := now.reasoning[len(self._told.reasoning) :]:
            deltas.append(AnswerDelta(reasoning=reasoning))
        if shown := now.text[len(self._told.text) :]:
            deltas.append(AnswerDelta(text=shown))
        for index, call in enumerate(now.calls):
            known = self._told.calls[index].arguments if index < len(self._told.calls) else None
            if known is None:
                self._ids.append(self._format.new_call_id())
                deltas.append(AnswerDelta(index=index, id=self._ids[index], name=call.name))
            if arguments := call.arguments[len(known or "") :]:
                deltas.append(AnswerDelta(index=index, arguments=arguments))
        self._told = now
        return deltas

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation, once the last text was fed."""
        calls = zip(self._ids, self._told.calls, strict=True)
        return Message(
            "assistant",
            self._told.text,
            tuple(ToolCall(call_id, call.name, call.arguments) for call_id, call in calls),
        )

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return self._told.reasoning

    def _parse(self, *, complete: bool) -> ParsedAnswer:
        reasoning, rest = self._split_reasoning(complete=complete)
        if not self._use.callable:
            return ParsedAnswer(rest, (), reasoning)
        parsed = self._format.parse(rest, self._use, complete=complete)
        return ParsedAnswer(parsed.text, parsed.calls, reasoning)

    def _split_reasoning(self, *, complete: bool) -> tuple[str, str]:
        """The reasoning at the beginning, and what follows it."""
        text = self.generated
        if not self._opens_reasoning:
            begun = text.lstrip()
            if not begun.startswith(_THINK):
                undecided = not complete and _THINK.startswith(begun)
                return "", "" if undecided else text
            text = begun[len(_THINK) :]
        reasoning, ended, rest = text.partition(_THOUGHT)
        if not ended and not complete:
            reasoning = reasoning[: certain_length(reasoning, (_THOUGHT,))]
        return reasoning.strip(), rest.lstrip()
