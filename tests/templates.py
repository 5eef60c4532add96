"""Runs chat templates through the whole chat layer: `python -m tests.templates FOLDER`.

Each template, over a vocabulary with the control tokens that it names, has conversations of three turns with tools. The
model is the engine itself over random logits, so that an answer is anything that the grammar lets through. A line of
the table says of a template: the format and the reasoning that it was taken for; whether calls are valid; whether the
turns after a call and after a text compute their delta alone, and end as a rendering of the whole conversation does.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema

from slipstream.chat import ChatTemplate, Conversations, Message, Setting, Tool, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.conversations import Prompt
from slipstream.engine.grammar import GrammarCompiler
from slipstream.errors import SlipstreamError
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.tokenizer import Tokenizer
from tests.rambling import Answer, Rambler
from tests.vocabularies import with_tags

_TAG = re.compile(r"<[|｜][^|｜<>\s{}]+[|｜]?>|<[a-z_]+\|>|</?(?:think|tool_call|arg_\w+|\w+_of_turn)>|\[/?[A-Z_]+\]")
_BOS, _EOS = "<s>", "</s>"
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<end_of_turn>",
    "<turn|>",
    _EOS,
)

_SAID = {"const": "It is sunny."}
_WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "unit"],
    },
)
_PING = Tool("ping", "Nothing", {"type": "object", "properties": {}})
_TOOLS = (_WEATHER, _PING)


@dataclass(slots=True)
class Report:
    """What became of a template."""

    name: str
    format: str = ""
    reasoning: str = ""
    calls: str = ""
    delta: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.error and self.calls == "valid" and all("≠" not in way for way in self.delta.values())


class _Trial:
    """A template, and what a model that writes as it wants makes of it."""

    def __init__(self, name: str, source: str) -> None:
        self.report = Report(name)
        tags = [*_TAG.findall(source), *_ENDS, _BOS]
        self._tokenizer = Tokenizer(with_tags(ModelStore().ensure(DEFAULT_MODEL).tokenizer_path, tags, "special"))
        self._template = ChatTemplate(source, {"bos_token": _BOS, "eos_token": _EOS})
        self._dialect = Dialect(self._template.shown, self._tokenizer)
        stops = [id for end in _ENDS if (id := self._tokenizer.control_token(end)) is not None]
        inner = self._tokenizer.control_token("<|end|>") if "<|channel|>" in source else None
        self._stops = [id for id in stops if id != inner]
        self._conversations = self._new_conversations()
        compiler = GrammarCompiler(
            self._tokenizer,
            vocab_size=self._tokenizer.vocab_size,
            stop_token_ids=self._stops,
            ends=self._dialect.ends,
        )
        self._model = Rambler(self._tokenizer, self._dialect, compiler, self._stops)

    def _new_conversations(self) -> Conversations:
        return Conversations(self._template, self._tokenizer, self._dialect)

    def run(self) -> Report:
        """Have the conversations."""
        self.report.format = self._dialect.tool_format.name
        self.report.reasoning = str(self._dialect.reasoning.end) if self._dialect.reasoning.expected else "-"
        try:
            self._talk()
        except SlipstreamError as error:
            self.report.error = str(error).partition("\n")[0]
        finally:
            self._model.close()
        return self.report

    def _talk(self) -> None:
        system, question = Message("system", "Be brief."), Message("user", "Weather in Bern?")
        for tool in (_WEATHER, _PING):
            messages = [system, question]
            use = ToolUse(_TOOLS, "required", frozenset({tool.name}), parallel=False)
            for _ in range(2):
                messages += self._turn(messages, use)
                self._check(f"{tool.name} again" if "call" in self.report.delta else "call", messages, use)
            messages += self._turn(messages, ToolUse(_TOOLS, "none"))
            messages.append(Message("user", "Thank you. And tomorrow?"))
            self._check("text", messages, ToolUse(_TOOLS, "none"))

    def _turn(self, messages: Sequence[Message], use: ToolUse) -> list[Message]:
        """An answer, and the results of its calls."""
        prompt = self._conversations.prompt(messages, Setting(use))
        schema = None if use.callable else _SAID
        answer = self._model.answer(use, schema, opened=prompt.opens_reasoning, max_tokens=300)
        self._conversations.record(prompt, answer.message, answer.tokens, answer.text)
        if use.mode == "required":
            self.report.calls = "valid" if self._valid(answer, use) else f"INVALID: {answer.text!r}"
        results = [
            Message("tool", '{"ok": true}', tool_call_id=call.id, name=call.name) for call in answer.message.tool_calls
        ]
        return [answer.message, *results]

    @staticmethod
    def _valid(answer: Answer, use: ToolUse) -> bool:
        (tool,) = use.callable
        try:
            for call in answer.message.tool_calls:
                jsonschema.validate(json.loads(call.arguments), dict(tool.parameters))
        except (ValueError, jsonschema.ValidationError):
            return False
        return answer.complete and {call.name for call in answer.message.tool_calls} == {tool.name}

    def _check(self, kind: str, messages: Sequence[Message], use: ToolUse) -> None:
        """Note how the next prompt is made, and whether it ends as a rendering in full does."""
        setting = Setting(use)
        prompt = self._conversations.prompt(messages, setting)
        whole = self._text(self._new_conversations().prompt(messages, setting))
        way = "delta" if prompt.parent is not None else "full"
        tail = self._tokenizer.decode(prompt.tokens.ids[prompt.parent_length :], skip_special=False)
        if prompt.parent is not None and not whole.endswith(tail):
            way += f"≠ {_difference(tail, whole)}"
        elif prompt.parent is not None and not _ends_an_answer(whole[: len(whole) - len(tail)]):
            way += f"? {tail[:40]!r}"
        self.report.delta[kind] = way

    def _text(self, prompt: Prompt) -> str:
        return self._tokenizer.decode(prompt.tokens.ids, skip_special=False)


def _difference(tail: str, whole: str) -> str:
    at = next((at for at in range(1, len(tail)) if tail[-at] != whole[-at]), len(tail))
    return f"{tail[-at - 20 : len(tail) - at + 20]!r} ≠ {whole[-at - 20 : len(whole) - at + 20]!r}"


def _ends_an_answer(before: str) -> bool:
    """Whether text may be the end of an answer: there's no turn end yet."""
    return not before.rstrip().endswith(_ENDS)


def reports(folder: Path) -> Iterator[Report]:
    """What becomes of each template in a folder."""
    for path in sorted(folder.glob("*.jinja")):
        try:
            trial = _Trial(path.stem, path.read_text(encoding="utf-8"))
        except SlipstreamError as error:
            yield Report(path.stem, error=str(error).partition("\n")[0])
        else:
            yield trial.run()


def main() -> int:
    """Print the table; 1 if anything is wrong with a template."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="templates, *.jinja")
    folder = parser.parse_args().folder
    wrong = 0
    print("| template | format | reasoning ends with | calls | after a call | after a text |")
    print("| --- | --- | --- | --- | --- | --- |")
    for report in reports(folder):
        after_call = {way for kind, way in report.delta.items() if kind != "text"}
        cells = [report.name, report.format, report.reasoning.replace("|", "\\|"), report.calls]
        cells += [", ".join(sorted(after_call)), report.delta.get("text", "")]
        print(f"| {' | '.join(cells)} |{' ' + report.error if report.error else ''}", flush=True)
        wrong += not report.sound
    print(f"\n{wrong} templates with something wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
