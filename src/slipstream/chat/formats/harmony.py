"""Harmony, of gpt-oss: an answer is a sequence of channels, and calls are messages to a function."""

from typing import Any

from slipstream.chat.formats.base import ToolFormat, with_json_arguments
from slipstream.chat.formats.json_calls import read_json_arguments
from slipstream.chat.messages import Message
from slipstream.chat.reading import Reading, Steps, comes_next, skip, skip_space, text_until, whole_until
from slipstream.chat.reasoning import Reasoning
from slipstream.chat.schema import Written, literal
from slipstream.chat.setting import Tool, ToolUse
from slipstream.chat.tags import Tags, rule_until

_FUNCTIONS = "functions."


class HarmonyReasoning(Reasoning):
    """The channel for analysis, which comes before others. Templates leave the choice of a channel to the model."""

    def grammar(self, answer: str, *, opened: bool) -> str:  # noqa: ARG002
        """See `Reasoning.grammar`."""
        thought = rule_until(self.end, "thought")
        return f"start: (reasoning)? {answer}\nreasoning: {self.begin.expression} thought\n{thought}"

    def read(self, reading: Reading, *, opened: bool) -> Steps[None]:  # noqa: ARG002
        """See `Reasoning.read`."""
        while (yield from skip(reading, self.begin.mark)):
            if not (yield from text_until(reading, self.end.mark, reading.think)):
                reading.think(reading.take().rstrip())


class Harmony(ToolFormat):
    """Text in the channel `final`, or before a call in `commentary`; one call an answer, which it ends."""

    name = "harmony"
    SIGNS = ("<|channel|>", "<|call|>")

    def __init__(self, tags: Tags) -> None:
        self._next = tags("<|end|>", "<|start|>", "assistant")
        self.reasoning = HarmonyReasoning(tags("<|channel|>", "analysis", "<|message|>"), self._next)
        self._channel, self._message, self._call = tags("<|channel|>"), tags("<|message|>"), tags("<|call|>")
        self._final = tags("<|channel|>", "final", "<|message|>")
        self.before_text = self._final.expression
        self._said = tags("<|channel|>", "commentary", "<|message|>")
        self._call_begin = tags("<|channel|>", f"commentary to={_FUNCTIONS}")
        self._json = tags(" ", "<|constrain|>", "json", "<|message|>")

    def message(self, message: Message) -> dict[str, Any]:
        """What was thought goes by another name; text before a call takes its place, since there's room for one."""
        made = super().message(message)
        if message.reasoning and not (message.text and message.tool_calls):
            made["thinking"] = message.reasoning
        return made

    def _start(self, use: ToolUse) -> str:
        """The token that ends a call ends the answer too."""
        if use.mode == "required":
            return "start: call"
        said = f"said: {self._said.expression} preamble\n{rule_until(self._next, 'preamble')}"
        return f"start: {self.before_text} TEXT | said? call\n{said}\nTEXT: /(.|\\n)*/"

    def _call_rules(self, rule: str, tool: Tool) -> Written:
        head = f"{self._call_begin.expression} {literal(tool.name)} {self._json.expression}"
        return with_json_arguments(rule, tool, head)

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:  # noqa: ARG002
        """See `ToolFormat.read`."""
        while True:
            if (yield from skip(reading, self._final.mark)):
                yield from reading.say_all()
            if (yield from skip(reading, self._said.mark)):
                if not (yield from text_until(reading, self._next.mark, reading.say)):
                    reading.say(reading.take())
                    return
                continue
            if not (yield from comes_next(reading, self._channel.mark)):
                yield from reading.say_all()
            reading.attempt(before="")
            header = yield from whole_until(reading, self._message.mark)
            if header is None:
                reading.take()
            name = (header or "").partition(f"to={_FUNCTIONS}")[2]
            if not name.strip():
                reading.gave_up()
                continue
            reading.begin_call(name.split()[0].partition(str(self._channel))[0])
            if not (yield from read_json_arguments(reading)):
                return
            yield from skip(reading, self._call.mark)
            yield from skip_space(reading)
