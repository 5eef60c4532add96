"""What a client should know of schemas that were loosened: which keywords, and whether the answer fits nevertheless."""

from collections.abc import Iterable, Iterator, Sequence

from slipstream.chat import Message, Schema, ToolUse
from slipstream.chat.schema import Loss
from slipstream.chat.schema.judging import misfit, repeated_key


def warnings_of(losses: Iterable[Loss]) -> Iterator[str]:
    """A sentence for each keyword that isn't enforced."""
    for loss in losses:
        if loss.of_text:
            yield f"the grammar of the tool {loss.tool!r} is not enforced: {loss.keyword}"
            continue
        whose = "the response schema" if loss.tool is None else f"the parameters of the tool {loss.tool!r}"
        what = loss.keyword if " " in loss.keyword else f"{loss.keyword!r}"
        yield f"{whose}: {what} is not enforced, and the answer is checked once it's complete"


def misfits(message: Message, losses: Sequence[Loss], use: ToolUse, schema: Schema | None) -> Iterator[str]:
    """A sentence for each part of a complete answer that doesn't fit a schema that was loosened, or repeats a key."""
    loosened = {loss.tool for loss in losses}
    parameters = {tool.name: tool.parameters for tool in use.tools}
    for call in message.tool_calls:
        if call.name in loosened and (fault := misfit(call.arguments, parameters[call.name])) is not None:
            yield f"the call {call.id!r} of {call.name!r} does not fit its schema: {fault}"
        if (key := repeated_key(call.arguments)) is not None:
            yield f"the call {call.id!r} of {call.name!r} has the key {key!r} twice: readers take the last"
    if message.tool_calls or schema is None:
        return
    if None in loosened and (fault := misfit(message.text, schema)) is not None:
        yield f"the answer does not fit its schema: {fault}"
    if (key := repeated_key(message.text)) is not None:
        yield f"the answer has the key {key!r} twice: readers take the last"
