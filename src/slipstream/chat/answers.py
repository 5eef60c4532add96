"""Answers: the grammar that a request demands of one, and reading one as it comes."""

from itertools import chain

from slipstream.chat.formats import AnswerGrammar, ToolFormat, choose_format
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.reading import AnswerDelta, Reading
from slipstream.chat.reasoning import Reasoning, choose_reasoning
from slipstream.chat.schema import Loss, json_rules, shared_rules
from slipstream.chat.setting import Schema, ToolUse
from slipstream.chat.tags import Tags
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced, content


class Dialect:
    """How one model writes its answers: its way to call tools, its way to reason, and which of their tags are tokens.

    Both are those that its chat `template` shows; `tool_format` names another. Raises `ModelError` if there is none of
    that name.
    """

    def __init__(self, template: str, tokenizer: Tokenizer | None = None, tool_format: str | None = None) -> None:
        tags = Tags(tokenizer.control_token) if tokenizer is not None else Tags()
        self.tool_format: ToolFormat = choose_format(template, tags, tool_format)
        self.reasoning: Reasoning = self.tool_format.reasoning or choose_reasoning(template, tags)
        self.token_ids = frozenset(tags.token_ids)
        """The tags that are tokens: part of an answer's text, whatever the vocabulary says of them."""

    @property
    def ends(self) -> tuple[Traced, ...]:
        """What may end a text or a call in an answer, beside what JSON ends with."""
        ends = (*self.tool_format.ends, *((self.reasoning.end,) if self.reasoning.expected else ()))
        return tuple(end.mark for end in ends)

    def grammar(self, use: ToolUse, response_schema: Schema | None, *, opens_reasoning: bool) -> AnswerGrammar | None:
        """The grammar that an answer must fit, or None if anything will do.

        With a `response_schema` an answer that is no call is JSON that fits it. A model that reasons may do so first.
        """
        may_call = bool(use.callable)
        if not may_call and response_schema is None:
            return None
        rules: list[str] = []
        losses: list[Loss] = []
        if may_call:
            required = ToolUse(use.tools, "required", use.allowed, use.parallel)
            calls = self.tool_format.grammar(use if response_schema is None else required)
            rules.append(calls.source.replace("start:", "answer:", 1))
            losses += calls.losses
        if response_schema is not None:
            json = json_rules("json", response_schema)
            rules += [f"response: {self.tool_format.before_text} json", *json.rules]
            losses += map(Loss, json.losses)
        alone = "answer" if may_call else "response"
        both = response_schema is not None and may_call and use.mode == "auto"
        answer = "(answer | response)" if both else alone
        rules.insert(0, self.reasoning.grammar(answer, opened=opens_reasoning))
        return AnswerGrammar("\n".join((*rules, *shared_rules(rules))), tuple(losses))


class AnswerReader:
    """Takes an answer apart as it comes: reasoning, text, calls.

    However the text is cut into pieces, the deltas add up to the same. Control tokens come whole, as `Traced` text of
    the model's own.
    """

    def __init__(self, dialect: Dialect, use: ToolUse, *, opens_reasoning: bool) -> None:
        tool_format = dialect.tool_format
        self._reading = Reading(tool_format.new_call_id)
        thoughts = dialect.reasoning.read(self._reading, opened=opens_reasoning)
        reads = use.callable or tool_format.reasoning is not None  # which is in channels, as all of the answer is
        self._steps = chain(thoughts, tool_format.read(self._reading, use) if reads else self._reading.say_all())

    def feed(self, text: str, *, last: bool = False) -> list[AnswerDelta]:
        """What becomes certain with this text."""
        self._reading.rest += content(text)
        self._reading.ended = last
        self._reading.deltas = []
        next(self._steps, None)
        return self._reading.deltas

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation, once the last text was fed; a call may be cut off."""
        calls = (ToolCall(call.id, call.name, "".join(call.arguments)) for call in self._reading.calls)
        return Message("assistant", "".join(self._reading.text), tuple(calls), reasoning=self.reasoning)

    @property
    def calls_to_run(self) -> bool:
        """Whether the answer ends in calls; it does not if it was cut off inside of one."""
        return bool(self._reading.calls) and self._reading.calls[-1].complete

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reading.reasoning)
