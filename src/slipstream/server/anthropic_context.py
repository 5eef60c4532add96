"""Anthropic's context management: what a client has cleared from its conversation before the model reads it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field

from slipstream.server.anthropic_blocks import TextBlock
from slipstream.server.anthropic_content import Block, InputMessage, ToolResultBlock, ToolUseBlock
from slipstream.server.by_type import ByType, Unknown

CLEARED = "[This result was cleared to save room.]"
"""What the model reads in place of a result."""
_CLEAR_THINKING = "clear_thinking_20251015"


class InputTokens(BaseModel):
    """A number of tokens."""

    type: Literal["input_tokens"]
    value: Annotated[int, Field(ge=0)]


class ToolUses(BaseModel):
    """A number of calls."""

    type: Literal["tool_uses"]
    value: Annotated[int, Field(ge=0)]


class ClearToolUses(BaseModel):
    """Clear the results of old calls once there is too much; the defaults are Anthropic's."""

    type: Literal["clear_tool_uses_20250919"]
    trigger: Annotated[InputTokens | ToolUses, Discriminator("type")] = InputTokens(type="input_tokens", value=100_000)
    keep: ToolUses = ToolUses(type="tool_uses", value=3)
    clear_at_least: InputTokens | None = None
    exclude_tools: frozenset[str] | None = None
    clear_tool_inputs: bool | frozenset[str] | None = None

    def clears_input(self, name: str) -> bool:
        """Whether the arguments of a call of this tool go with its result."""
        wanted = self.clear_tool_inputs
        return name in wanted if isinstance(wanted, frozenset) else bool(wanted)


class Compact(BaseModel):
    """Have the conversation summarised once it is too long; the default is Anthropic's."""

    type: Literal["compact_20260112"]
    trigger: InputTokens = InputTokens(type="input_tokens", value=150_000)
    pause_after_compaction: bool = False
    instructions: str | None = None


class ContextManagement(BaseModel):
    """`context_management`."""

    edits: list[Annotated[ClearToolUses | Compact | Unknown, ByType()]] = []

    @property
    def clears(self) -> bool:
        """Whether messages have to be looked at; some clients ask for other edits alone, with every request."""
        return any(isinstance(edit, ClearToolUses) for edit in self.edits)

    @property
    def compact(self) -> Compact | None:
        """Whether and when to summarise the conversation."""
        return next((edit for edit in self.edits if isinstance(edit, Compact)), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is left out. What reasoning of earlier turns a model reads is its chat template's business."""
        others = [edit.type for edit in self.edits if isinstance(edit, Unknown) and edit.type != _CLEAR_THINKING]
        return tuple(f"context_management: an edit of type {kind!r} is not made" for kind in others)

    def apply(
        self, messages: Sequence[InputMessage], before: str, count: Callable[[str], int]
    ) -> tuple[list[InputMessage], list[dict[str, Any]]]:
        """The messages as the model is to read them, and the edits that were made, as answers report them.

        `before` is what precedes the messages; `count` gives the tokens of a text.
        """
        edited, applied = list(messages), []
        for edit in self.edits:
            if isinstance(edit, ClearToolUses):
                clearing = _Clearing(edit, count)
                edited = clearing.edited(edited, before)
                if clearing.cleared:
                    counts = {"cleared_tool_uses": len(clearing.cleared), "cleared_input_tokens": clearing.tokens}
                    applied.append({"type": edit.type, **counts})
        return edited, applied


@dataclass
class _Clearing:
    """The conversation is walked through request by request, and cleared whenever it had grown too large by then.

    A client sends all that it ever said, each time. If each request were looked at by itself, one more result would be
    cleared by each, and all that follows it computed again.
    """

    edit: ClearToolUses
    count: Callable[[str], int]
    cleared: set[str] = field(default_factory=set)
    """The ids of calls."""
    tokens: int = 0
    """What they took."""
    _size: int = 0
    _left: int = 0
    """The tokens of what the model reads in place of a result."""
    _gains: dict[str, int] = field(default_factory=dict)
    """Of the calls that may be cleared, the oldest first: the tokens that this saves."""

    def edited(self, messages: Sequence[InputMessage], before: str) -> list[InputMessage]:
        """The messages, cleared."""
        self._size, self._left = self.count(before), self.count(CLEARED)
        for message in messages:
            if message.role == "assistant":  # it answers a request for all before it
                self._clear()
            for block in message.content:
                self._add(block)
        self._clear()
        return [
            message.model_copy(update={"content": [self._read(block) for block in message.content]})
            for message in messages
        ]

    def _add(self, block: Block) -> None:
        tokens = self.count(_text(block))
        self._size += tokens
        if isinstance(block, ToolUseBlock):
            if block.name not in (self.edit.exclude_tools or ()):
                self._gains[block.id] = tokens if self.edit.clears_input(block.name) else 0
        elif isinstance(block, ToolResultBlock) and block.tool_use_id in self._gains:
            self._gains[block.tool_use_id] += max(0, tokens - self._left)

    def _clear(self) -> None:
        trigger, keep = self.edit.trigger, self.edit.keep.value
        if (self._size if isinstance(trigger, InputTokens) else len(self._gains)) <= trigger.value:
            return
        old = list(self._gains)[: max(0, len(self._gains) - keep)]
        gain = sum(self._gains[each] for each in old)
        least = self.edit.clear_at_least.value if self.edit.clear_at_least is not None else 1
        if gain < max(1, least):
            return
        self.cleared.update(old)
        self.tokens += gain
        self._size -= gain
        for each in old:
            del self._gains[each]

    def _read(self, block: Block) -> Block:
        """A block as the model is to read it."""
        if isinstance(block, ToolResultBlock) and block.tool_use_id in self.cleared:
            return block.model_copy(update={"content": [TextBlock(type="text", text=CLEARED)]})
        if isinstance(block, ToolUseBlock) and block.id in self.cleared and self.edit.clears_input(block.name):
            return block.model_copy(update={"input": {}})
        return block


def _text(block: Block) -> str:
    match block:
        case TextBlock():
            return block.text
        case ToolUseBlock():
            return f"{block.name} {json.dumps(block.input, ensure_ascii=False)}"
        case ToolResultBlock():
            return "\n".join(_text(part) for part in block.content or ())
    return block.model_dump_json(exclude={"type"})
