"""The messages that an agent's client sends: its script, and the server's own earlier answers."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema

from slipstream.errors import SlipstreamError
from slipstream_bench.coding import sensible_call
from slipstream_bench.records import ConstraintKind
from slipstream_bench.script import Script

_MAX_TOKENS = 256
_RECENT_RESULTS = 2
_DROPPED = "(This result was dropped to save room.)"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: text where it was asked for JSON, else a call."""

    text: str
    call_id: str = ""
    call_name: str = ""


class Conversation:
    """One agent's messages, turn by turn: `request`, then `answered`.

    With `response_format`, tools are described in the system message, results come in as the user's, and an answer is a
    JSON object with the name of the tool and its arguments: it asks nothing of a model's chat template. With `tools`,
    it's all in OpenAI's own fields. With `prescribed`, all is as with `response_format`, and each answer is known.
    """

    def __init__(self, script: Script, constraint: ConstraintKind, *, rewrites: bool = False) -> None:
        self.rewritten: Literal["nothing", "answer", "results"] = "nothing"
        self._script = script
        self._constraint = constraint
        self._rewrites = rewrites
        self._result_places: list[int] = []
        self._call_id = ""
        system = script.system if constraint == "tools" else f"{script.system}\n\n{_tools_as_text(script)}"
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": system}]

    def request(self, turn: int) -> dict[str, Any]:
        """The body of a turn's request, but the model and what a server wants besides."""
        scripted = self._script.turns[turn]
        self._messages += self._incoming(scripted.result, scripted.user)
        if self._rewrites and turn == len(self._script.turns) // 2:
            self._drop_old_results()
        body = {"messages": self._messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        if self._constraint == "tools":
            choice = {"type": "function", "function": {"name": scripted.tool}}
            return {**body, "tools": list(self._script.tools), "tool_choice": choice}
        schema = {"name": scripted.tool, "schema": self._answer_schema(scripted.tool), "strict": True}
        return {**body, "response_format": {"type": "json_schema", "json_schema": schema}}

    def prescribed(self, turn: int) -> str:
        """The answer that the turn's request must get; raises `SlipstreamError` if there is none."""
        scripted = self._script.turns[turn]
        text = prescribed_answer(f"{scripted.result} {scripted.user}")
        if text is None:
            raise SlipstreamError("only coding workloads have answers to prescribe: agent-6, coding-35, fleet-8, …")
        return text

    def is_valid(self, turn: int, answer: Answer) -> bool:
        """Whether an answer calls the turn's tool as its schema says; or is the one that was prescribed."""
        if self._constraint == "prescribed":
            return answer.text == self.prescribed(turn)
        tool = self._script.turns[turn].tool
        by_name = self._constraint == "tools"
        schema = self._script.parameters(tool) if by_name else self._answer_schema(tool)
        try:
            value = json.loads(answer.text)
        except ValueError:
            return False
        fits: bool = jsonschema.Draft202012Validator(schema).is_valid(value)
        return fits and (not by_name or answer.call_name == tool)

    def answered(self, answer: Answer) -> None:
        """The server's answer is part of the conversation from now on."""
        text = _in_other_words(answer.text) if self._rewrites else answer.text
        self.rewritten = "answer" if self._rewrites else "nothing"
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._constraint == "tools":
            self._call_id = answer.call_id
            function = {"name": answer.call_name, "arguments": text}
            call = {"id": answer.call_id, "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        self._messages.append(message)

    def _incoming(self, result: str, user: str) -> list[dict[str, Any]]:
        if result:
            self._result_places.append(len(self._messages))
        if self._constraint != "tools":
            text = "\n\n".join(part for part in (result and f"Result:\n{result}", user) if part)
            return [{"role": "user", "content": text}]
        results = [{"role": "tool", "tool_call_id": self._call_id, "content": result}] if result else []
        return [*results, {"role": "user", "content": user}] if user else results

    def _drop_old_results(self) -> None:
        for place in self._result_places[:-_RECENT_RESULTS]:
            self._messages[place] = {**self._messages[place], "content": _DROPPED}
        self.rewritten = "results"

    def _answer_schema(self, tool: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": [tool]}, "arguments": self._script.parameters(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }


def prescribed_answer(prompt: str) -> str | None:
    """The answer to a prompt, or to the end of one, of a coding workload: a sensible call, as compact as a server's."""
    call = sensible_call(prompt)
    return None if call is None else json.dumps({"name": call[0], "arguments": call[1]}, ensure_ascii=False)


def _tools_as_text(script: Script) -> str:
    functions = (tool["function"] for tool in script.tools)
    lines = [f"{f['name']}: {f['description']} Arguments: {json.dumps(f['parameters'])}" for f in functions]
    return "\n".join(
        ["You have these tools:", *lines, 'Answer with a JSON object: {"name": the tool, "arguments": its arguments}.']
    )


def _in_other_words(text: str) -> str:
    """The same JSON as another client would write it."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, indent=1)
    except ValueError:  # an answer that was cut off is handed back as it came
        return text
