"""The body of a request to the Responses API, and what it asks for."""

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slipstream.chat import Message, Setting
from slipstream.chat.setting import reasoning_kwargs
from slipstream.server.errors import unsupported
from slipstream.server.extension import SessionId, session_hint
from slipstream.server.openai_common import AtLeastOne, SamplingFields
from slipstream.server.openai_tools import (
    FunctionChoice,
    JSONSchemaFormat,
    response_schema,
    tool_use,
)
from slipstream.server.responses_items import InputItem
from slipstream.server.responses_tools import AnyTool, Toolbox
from slipstream.turns import TurnRequest

_REFUSED = {
    "background": "responses are made while the client waits: leave it out",
    "prompt": "there are no stored prompt templates here: send instructions and input",
    "moderation": "nothing is moderated here: leave it out",
    "top_logprobs": "log-probabilities are part of /v1/chat/completions alone",
}
_LOGPROBS = "message.output_text.logprobs"


class TextFormat(JSONSchemaFormat):
    """The form of an answer that is no call."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextConfig(BaseModel):
    """`text`. The model knows one `verbosity`, its own."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(BaseModel):
    """`reasoning`. Summaries are not made; reasoning is shown as it is."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None


def _as_items(value: object) -> object:
    if value is None:
        return []
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _as_id(value: object) -> object:
    return value["id"] if isinstance(value, dict) and "id" in value else value


class PromptRequest(SamplingFields):
    """The body of a request. Most of `include` asks for what makes no difference here."""

    input: Annotated[list[InputItem], BeforeValidator(_as_items)] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Annotated[SessionId | None, BeforeValidator(_as_id)] = None
    store: bool | None = None
    max_output_tokens: AtLeastOne | None = None
    max_tool_calls: int | None = None
    tools: list[AnyTool] | None = None
    tool_choice: FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    prompt: Any = None
    moderation: Any = None
    top_logprobs: int | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @cached_property
    def toolbox(self) -> Toolbox:
        """The tools, as the model knows them."""
        return Toolbox(self.tools or ())

    @property
    def text_format(self) -> TextFormat:
        """The form of an answer that is no call, text by default."""
        return (self.text and self.text.format) or TextFormat()

    def check(self) -> None:
        """Raise `InvalidRequestError` for what can't be had, naming the field."""
        for name, advice in _REFUSED.items():
            if getattr(self, name):
                raise unsupported(name, f"is not supported: {advice}")
        if _LOGPROBS in (self.include or ()):
            raise unsupported("include", f"has {_LOGPROBS!r}, but {_REFUSED['top_logprobs']}")
        if self.previous_response_id is not None and self.conversation is not None:
            raise unsupported("previous_response_id", "and conversation both say what came before: send one")

    def turn(self, messages: tuple[Message, ...]) -> TurnRequest:
        """What it asks for, in no protocol's terms, where `messages` are the conversation without instructions.

        They are all of it, but with a `conversation`, which is a session, its next ones.
        """
        text = self.text_format
        switches = self.switches()
        if self.conversation is not None:
            switches |= {"session_id": self.conversation, "continues": True}
        elif self.previous_response_id is not None:
            switches |= {"continues": False}
        tools = tool_use(self.toolbox.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)
        reasoning = reasoning_kwargs(self.reasoning.effort if self.reasoning else None)
        return TurnRequest(
            prompt=messages,
            system=Message("system", self.instructions) if self.instructions else None,
            params=self.sampling_params(max_tokens=self.max_output_tokens, logprobs=None),
            setting=Setting(tools, reasoning | (self.chat_template_kwargs or {})),
            response_schema=response_schema(text.type, text),
            response_strict=bool(text.strict),
            session_hint=session_hint(self.prompt_cache_key),
            warnings=self.toolbox.warnings,
            **switches,
        )

    def echo(self) -> dict[str, Any]:
        """The fields that a response repeats, with the defaults of those that are null."""
        choice = self.tool_choice or "auto"
        return {
            "conversation": {"id": self.conversation} if self.conversation else None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": self.reasoning.model_dump(exclude_unset=True) if self.reasoning else None,
            "safety_identifier": self.safety_identifier,
            "store": self.store is not False,
            "text": {"format": self.text_format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump(exclude_unset=True) for tool in self.tools or ()],
            "user": self.user,
        }


class ResponseRequest(PromptRequest):
    """The body of a request for a response, which has to bring something."""

    input: Annotated[list[InputItem], BeforeValidator(_as_items), Field(min_length=1)]
