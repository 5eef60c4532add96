"""What a turn may ask for, whatever protocol it came by."""

from dataclasses import dataclass

from slipstream.chat import NO_SETTING, Message, Schema, Setting
from slipstream.engine import SamplingParams
from slipstream.types import IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TurnRequest:
    """One prompt and what is wanted of its answer; knows no protocol.

    `prompt` is a conversation that waits for the assistant, a plain text, or token ids, int32 [n]. With several
    `choices` and a seed, choice i is what the seed + i gives alone.
    """

    prompt: tuple[Message, ...] | str | IntArray
    params: SamplingParams
    setting: Setting = NO_SETTING
    response_schema: Schema | None = None
    """What an answer that is no call must fit."""
    response_strict: bool = False
    """Whether a schema that a grammar can't hold is refused; otherwise the answer is checked once it's there."""
    choices: int = 1
    tenant: str = ""
    weight: float = 1.0
    """The tenant's share of the machine, see `EngineRequest`; so is the priority."""
    priority: int = 0
    session_id: str | None = None
    """The session that it is a turn of, which has no other turn meanwhile; then the messages may be its next alone."""
    session_hint: str | None = None
    """What to call the session if it has no name; the messages are the whole conversation all the same."""
    continues: bool | None = None
    """Whether the messages are the session's next ones, or the whole conversation; None if they have to tell."""
    system: Message | None = None
    """The system message, where a protocol keeps it apart from the others."""
    reuse: bool = True
    speculation: bool = True
    jump_forward: bool = True
    response_cache: bool = True
    progress: bool = False
    """Whether the client wants to see how much of the prompt is computed."""
    answers: bool = True
    """Whether there is to be an answer; without, the prompt is computed for later ones, and one token is dropped."""
    warnings: tuple[str, ...] = ()
    """What of the request was left out or loosened, for the client to read."""
