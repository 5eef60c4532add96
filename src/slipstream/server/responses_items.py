"""Input items of the Responses API: what they mean, and how they are listed later."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from slipstream.chat import Message, ToolCall
from slipstream.errors import InvalidRequestError
from slipstream.server.compaction import introduced, unsealed
from slipstream.server.custom_tools import custom_arguments
from slipstream.server.errors import given
from slipstream.server.openai_messages import ContentPart, parts_text
from slipstream.server.openai_tools import flat_name
from slipstream.server.responses_tools import SHELL_NAME, Item, shell_arguments
from slipstream.sessions import StoredResponse

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "local_shell_call": "lsh",
    "local_shell_call_output": "lsho",
    "reasoning": "rs",
    "compaction": "cmp",
}
_KINDS = (*_PREFIXES, "item_reference")
_SILENT = re.compile(r"(web_search|file_search|code_interpreter|image_generation|computer|mcp|tool_search)_\w+")
"""Items of tools that another server ran, in a conversation that began there: they say nothing here."""
_OWN_ID = re.compile(r"[a-z]+_([0-9a-f]{24})_i?\d+")
_TEXTS = ("input_text", "output_text", "text", "refusal")


class Part(ContentPart):
    """A part of an item's content or output."""

    model_config = ConfigDict(extra="allow")


class InputItem(BaseModel):
    """An item of a request's input. What its type has no use for is ignored, and listed later as it came."""

    model_config = ConfigDict(extra="allow")

    type: str
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    action: dict[str, Any] | None = None
    output: list[Part] | None = None
    encrypted_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, item: Any) -> Any:
        """The item with what clients may leave out: its type, and the parts around a single text."""
        if not isinstance(item, dict):
            return item
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        kind = "compaction" if kind == "compaction_summary" else kind
        if isinstance(kind, str) and _SILENT.fullmatch(kind):
            return {"type": kind}
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"an item must be of type {', '.join(_KINDS)}")
        answer = {"type": "output_text", "annotations": []}
        part = answer if item.get("role") == "assistant" else {"type": "input_text"}
        texts = {name: item[name] for name in ("content", "output") if isinstance(item.get(name), str)}
        parts = {name: [{**part, "text": text}] for name, text in texts.items()}
        return {**item, **parts, "type": kind}


def item_id(response_id: str, kind: str, place: int | str) -> str:
    """The id of an item at a place of a response's output (0, 1, ...) or input (i0, i1, ...)."""
    return f"{_PREFIXES[kind]}_{response_id.removeprefix('resp_')}_{place}"


def resolved(items: Sequence[InputItem], find: Callable[[str], StoredResponse | None]) -> list[InputItem]:
    """The items that say something; in place of a reference, the item of that id in the response that `find` gives."""
    return [
        _referred(item, f"input[{index}].id", find) if item.type == "item_reference" else item
        for index, item in enumerate(items)
        if not _SILENT.fullmatch(item.type)
    ]


def item_messages(items: Sequence[InputItem], field: str, known_calls: Iterable[str] | None) -> tuple[Message, ...]:
    """The items of a body's `field` in no protocol's terms; raises `InvalidRequestError` naming what is wrong in it.

    Calls, and reasoning and text before them, are one message, as the answer was that they came from. Results need a
    call before them, or one of the `known_calls` (None if those can't be told).
    """
    messages: list[Message] = []
    calls = None if known_calls is None else set(known_calls)
    thought = ""
    for index, item in enumerate(items):
        param = f"{field}[{index}]"
        match item.type:
            case "reasoning":
                thought = "\n".join(part.text or "" for part in item.content or ())
            case "message":
                message = _message(item, param)
                messages.append(replace(message, reasoning=thought) if message.role == "assistant" else message)
                thought = ""
            case "compaction":
                summary = unsealed(given(item.encrypted_content, f"{param}.encrypted_content"), param)
                messages.append(Message("user", introduced(summary)))
            case "function_call" | "custom_tool_call" | "local_shell_call":
                call = _call(item, param)
                if calls is not None:
                    calls.add(call.id)
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message("assistant", reasoning=thought))
                    thought = ""
                messages[-1] = replace(messages[-1], tool_calls=(*messages[-1].tool_calls, call))
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                result = _result(item, param)
                if calls is not None and result.tool_call_id not in calls:
                    complaint = f"{param}.call_id is {result.tool_call_id!r}, but there is no such call before it: "
                    advice = "send its function_call item too, or the previous_response_id of the response that made it"
                    raise InvalidRequestError(complaint, advice, param=f"{param}.call_id")
                messages.append(result)
    return tuple(messages)


def listed(items: Sequence[InputItem], response_id: str) -> list[Item]:
    """The items of a response's input as they are listed later: each has an id and a status."""
    return [
        {
            "id": item_id(response_id, item.type, f"i{index}"),
            "status": "completed",
            **item.model_dump(exclude_unset=True, exclude_none=True),
        }
        for index, item in enumerate(items)
    ]


def _referred(reference: InputItem, param: str, find: Callable[[str], StoredResponse | None]) -> InputItem:
    own = _OWN_ID.fullmatch(given(reference.id, param))
    record = find(f"resp_{own[1]}") if own else None
    stored = [*json.loads(record.response)["output"], *json.loads(record.input_items)] if record else []
    item = next((item for item in stored if item["id"] == reference.id), None)
    if item is None:
        message = f"{param} is {reference.id!r}, but no stored response has that item: send the item itself"
        raise InvalidRequestError(message, param=param, code="item_not_found")
    return InputItem.model_validate(item)


def _message(item: InputItem, param: str) -> Message:
    role = given(item.role, f"{param}.role")
    text = parts_text(given(item.content, f"{param}.content"), f"{param}.content", _TEXTS, in_result=False)
    return Message("system" if role == "developer" else role, text)


def _call(item: InputItem, param: str) -> ToolCall:
    call_id = given(item.call_id, f"{param}.call_id")
    if item.type == "local_shell_call":
        return ToolCall(call_id, SHELL_NAME, shell_arguments(given(item.action, f"{param}.action")))
    name = flat_name(item.namespace, given(item.name, f"{param}.name"))
    if item.type == "custom_tool_call":
        return ToolCall(call_id, name, custom_arguments(given(item.input, f"{param}.input")))
    return ToolCall(call_id, name, given(item.arguments, f"{param}.arguments"))


def _result(item: InputItem, param: str) -> Message:
    text = parts_text(given(item.output, f"{param}.output"), f"{param}.output", _TEXTS, in_result=True)
    call_id = item.call_id if item.type != "local_shell_call_output" else item.call_id or item.id
    return Message("tool", text, tool_call_id=given(call_id, f"{param}.call_id"))
