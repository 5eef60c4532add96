"""Rendering messages, and of a conversation that goes on no more than its end depends on."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from slipstream.chat.answers import Dialect
from slipstream.chat.foreign import Template
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.placing import Placing
from slipstream.chat.setting import Setting, Tool, ToolUse
from slipstream.errors import InvalidRequestError
from slipstream.tokenizer.provenance import Traced, origin

logger = logging.getLogger(__name__)

_STAND_IN = "slipstream"

_SHAPES = (
    *("uauauA", "uauauAu", "uuauuauuAuu", "uasuauauAu", "suauauauauauauauauAuau"),
    *("uctctCt", "suctctctctCt", "suctauctauAu", "suctauctaucttctCtt", "uctauaucttCttct"),
)
"""Conversations to try templates with: system, user, assistant, call, result; a capital is the answer in question."""

_ROLES = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
_TRIED = Setting(ToolUse((Tool("look", "Look", {"type": "object", "properties": {"at": {"type": "string"}}}),)))


class Renderer:
    """Renders messages with a model's chat template, in the form that its dialect gives them.

    A template may look at all messages wherever it is, but what it writes after an answer rarely depends on more than
    the system messages and the turn before that answer. So the *elided* conversation, which has no more than those,
    mostly ends like the whole one. This is tried at the start, and again on each conversation whose messages have
    doubled; where it doesn't hold, whole conversations are rendered.
    """

    def __init__(self, template: Template | None, dialect: Dialect) -> None:
        self._template = template
        self._format = dialect.tool_format
        self.elides = template is None or all(self._ends_alike(*_conversation(shape), "", _TRIED) for shape in _SHAPES)
        """Whether elided conversations end like whole ones, as far as is known."""

    def whole(self, messages: Sequence[Message], setting: Setting) -> Traced:
        """The text of the messages, whose content has their numbers for origins."""
        assert self._template is not None
        use = setting.tools
        traced = [message.traced(origin(number)) for number, message in enumerate(messages)]
        return self._template.render(
            self._format.messages(traced, use), self._format.template_tools(use), setting.template_kwargs
        )

    def tail(self, messages: Sequence[Message], number: int, generated: str, setting: Setting) -> Traced | None:
        """What follows an answer in the text of the messages; None if the template says earlier things after it.

        `generated` is how the model wrote the end of the answer. Raises `InvalidRequestError` as templates do.
        """
        doubled = number.bit_length() < len(messages).bit_length()  # the turn before had `number` messages
        if self.elides and doubled and not self._ends_alike(messages, number, generated, setting):
            logger.warning("the chat template looks far back, so each turn renders its whole conversation")
            self.elides = False
        if self.elides:
            with suppress(InvalidRequestError):  # the whole conversation may do, or is refused in the template's words
                return self._tail(*_elided(messages, number), generated, setting)
        return self._tail([*map(_saying_something, messages[:number]), *messages[number:]], number, generated, setting)

    def _ends_alike(self, messages: Sequence[Message], number: int, generated: str, setting: Setting) -> bool:
        """Whether messages end like the elided ones; those that the template refuses tell nothing."""
        elided, place = _elided(messages, number)
        if len(elided) == len(messages):
            return True
        try:
            tails = [self._tail(*each, generated, setting) for each in ((elided, place), (messages, number))]
        except InvalidRequestError:
            return True
        one, other = (None if tail is None else (str(tail), [*tail.own_runs()]) for tail in tails)
        return one == other

    def _tail(self, messages: Sequence[Message], number: int, generated: str, setting: Setting) -> Traced | None:
        """See `tail`. Where calls, or reasoning alone, don't look as they were generated, some text takes their place.

        So it does for an answer that says nothing, if the template refuses that.
        """
        answer, stand_in = messages[number], Message("assistant", _STAND_IN)
        with_text = [*messages[:number], stand_in, *messages[number + 1 :]]
        try:
            placing = Placing(self.whole(messages, setting), len(messages))
        except InvalidRequestError:
            if _saying_something(answer) is answer:
                raise
            placing, answer, generated = Placing(self.whole(with_text, setting), len(messages)), stand_in, _STAND_IN
        end = placing.end_of(number, answer, generated)
        if end is None and (answer.tool_calls or not answer.text):
            with suppress(InvalidRequestError):
                placing = Placing(self.whole(with_text, setting), len(messages))
                end = placing.end_of(number, stand_in, _STAND_IN)
        return placing.text[end:] if end is not None and placing.divides(end, number) else None


def _elided(messages: Sequence[Message], number: int) -> tuple[list[Message], int]:
    """The messages without those between the system's and the turn before an answer, and that answer's number.

    The turn begins with its question, which may be a while back, and goes on with the answer before.
    """
    lead = next((at for at in range(number) if messages[at].role != "system"), number)
    before = next((at for at in range(number - 1, lead, -1) if messages[at].role == "assistant"), lead)
    asked = next((at for at in range(before - 1, lead - 1, -1) if messages[at].role == "user"), before)
    kept = [*messages[:lead], *messages[asked : min(asked + 1, before)], *messages[before:]]
    return kept, number + len(kept) - len(messages)


def _saying_something(message: Message) -> Message:
    empty = message.role == "assistant" and not message.text and not message.tool_calls
    return replace(message, text=_STAND_IN) if empty else message


def _conversation(shape: str) -> tuple[list[Message], int]:
    """A conversation of a shape, and the number of the answer in question."""
    kinds = shape.lower()
    messages: list[Message] = []
    waiting: list[str] = []
    for number, kind in enumerate(kinds):
        if kind == "c":
            waiting = [f"call{number:04}{at}" for at in range(2 if kinds[number + 1 : number + 3] == "tt" else 1)]
        calls = tuple(ToolCall(id, "look", f'{{"at": "{number}"}}') for id in waiting) if kind == "c" else ()
        thought = f"thought {number}" if kind in "ac" and number % 4 > 1 else ""
        text, call_id = "" if calls else f"text {number}", waiting.pop(0) if kind == "t" else None
        messages.append(Message(_ROLES[kind], text, calls, call_id, reasoning=thought))
    return messages, next(number for number, kind in enumerate(shape) if kind.isupper())
