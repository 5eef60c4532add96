"""Anthropic's compaction: once it's long, or on demand, a conversation is summarised, and goes on from that."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from slipstream.runtime import Runtime
from slipstream.server.anthropic_answer import MessageAnswer, usage_of
from slipstream.server.anthropic_blocks import CompactionBlock, ToolChange, ToolChangeBlock, ToolReferenceBlock
from slipstream.server.anthropic_content import Block, InputMessage, ToolResultBlock
from slipstream.server.anthropic_context import Compact
from slipstream.server.turn import LiveTurn
from slipstream.turns import Choice, Piece, TurnRequest

GoOn = Callable[[CompactionBlock], Awaitable[LiveTurn]]
_CUT = "compaction: the summary was cut off at its longest"


class Compaction(BaseModel):
    """`compaction`: summarise the conversation now, and answer nothing else."""

    type: Literal["summarize"]
    instructions: str | None = None


def is_due(edit: Compact, request: TurnRequest, runtime: Runtime) -> bool:
    """Whether a conversation is to be summarised before it's answered.

    The model's context may be smaller than the trigger, so it's also done before a conversation fills it.
    """
    assert isinstance(request.prompt, tuple)
    tokens, most = runtime.turns.count(request), runtime.core.limits.max_sequence
    if tokens >= edit.trigger.value:
        return True
    full = tokens >= most * 3 // 4 or tokens + (request.params.max_tokens or 0) > most
    return full and any(message.role == "assistant" for message in request.prompt)


def tool_changes(messages: Sequence[InputMessage]) -> list[ToolChangeBlock]:
    """The last that messages say of each tool that they add or take away."""
    changes = [change for message in messages for block in message.content for change in _changes(block)]
    return list({change.tool.name: change for change in changes}.values())


def _changes(block: Block) -> Iterator[ToolChangeBlock]:
    match block:
        case ToolChangeBlock():
            yield block
        case CompactionBlock():
            yield from block.tool_changes or ()
        case ToolReferenceBlock():
            yield ToolChangeBlock(type="tool_addition", tool=ToolChange(type="tool_reference", name=block.tool_name))
        case ToolResultBlock():
            for part in block.content or ():
                yield from _changes(part)


class CompactedAnswer(MessageAnswer):
    """A message that begins with a summary, and goes on from it unless it was `asked` to pause.

    Its first turn makes the summary, and `go_on` starts the next one.
    """

    def __init__(
        self,
        model: str,
        turn: LiveTurn,
        go_on: GoOn,
        *,
        asked: Compact | Compaction,
        changes: list[ToolChangeBlock],
        shows_thinking: bool,
        edits: list[dict[str, Any]] | None,
    ) -> None:
        super().__init__(model, turn, shows_thinking=shows_thinking, edits=edits)
        self._on_demand = isinstance(asked, Compaction)
        self._go_on = None if isinstance(asked, Compaction) or asked.pause_after_compaction else go_on
        self._changes = changes or None
        self._block = CompactionBlock()
        self._spent: dict[str, int] = {}
        self._cut = False

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """Those of what comes after the summary; meanwhile there are empty ones."""
        async for batch in self.turn.batches():
            if not batch:
                yield batch
        (choice,) = self.turn.choices
        self._block = CompactionBlock(content=choice.reader.message.text.strip() or None, tool_changes=self._changes)
        self._spent = usage_of(choice)
        self._cut = choice.outputs[-1].finish_reason == "length"
        if self._go_on is not None:
            self.turn = await _started(self._go_on(self._block))
            async for batch in self.turn.batches():
                yield batch

    async def end(self) -> bytes:
        """The summary, if nothing came after it, and the end of the message."""
        (choice,) = self.turn.choices
        begun = b"" if self._go_on is not None else self._start(choice)
        return begun + await super().end()

    def _start(self, choice: Choice) -> bytes:
        summary = self._summary()
        empty = {name: None if name == "content" else value for name, value in summary.items()}
        opened = super()._start(choice) + self._open(empty)
        return opened + self._delta({"type": "compaction_delta", "content": summary["content"]})

    def _summary(self) -> dict[str, Any]:
        return self._block.model_dump(exclude={"tool_changes"} if self._block.tool_changes is None else None)

    def _content(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._summary(), *([] if self._go_on is None else super()._content(choice))]

    def _ending(self, choice: Choice) -> dict[str, str | None]:
        if self._go_on is None:
            return {"stop_reason": "compaction", "stop_sequence": None}
        return super()._ending(choice)

    def _usage(self, choice: Choice) -> dict[str, Any]:
        """Without what an edit's summary cost, which is listed apart."""
        if self._on_demand:
            return self._spent
        iterations = [{"type": "compaction", **self._spent}]
        if self._go_on is None:
            return {**dict.fromkeys(self._spent, 0), "iterations": iterations}
        usage = super()._usage(choice)
        return {**usage, "iterations": [*iterations, {"type": "message", **usage}]}

    def _report(self) -> dict[str, Any]:
        report = super()._report()
        return {**report, "warnings": [*report["warnings"], _CUT]} if self._cut else report


async def _started(starting: Awaitable[LiveTurn]) -> LiveTurn:
    """A turn, once it's started; if nobody waits for it by then, it's cancelled."""
    task = asyncio.ensure_future(starting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
        raise
