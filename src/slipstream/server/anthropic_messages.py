"""Anthropic's Messages API: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

import json
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import AfterValidator, BaseModel, Discriminator, Field, PrivateAttr, Tag

from slipstream.chat import NO_TOOLS, Message, Setting, Tool, ToolUse
from slipstream.chat.setting import reasoning_kwargs
from slipstream.engine import SamplingParams
from slipstream.errors import InvalidRequestError
from slipstream.runtime import Runtime
from slipstream.server.access import TenantName
from slipstream.server.anthropic_answer import MessageAnswer
from slipstream.server.anthropic_blocks import CompactionBlock
from slipstream.server.anthropic_compaction import CompactedAnswer, Compaction, is_due, tool_changes
from slipstream.server.anthropic_content import InputMessage, TextContent, conversation, since_compaction
from slipstream.server.anthropic_context import Compact, ContextManagement
from slipstream.server.compaction import summarising
from slipstream.server.errors import given, unsupported
from slipstream.server.extension import SlipstreamOptions, in_session
from slipstream.server.hosted_tools import HostedTool, left_out
from slipstream.server.openapi import WHOLE_OR_STREAM, AnthropicError, errors
from slipstream.server.stream import respond
from slipstream.server.turn import LiveTurn, TurnRunner
from slipstream.turns import TurnRequest

_HOSTED = re.compile(r"(web_search|web_fetch|code_execution|tool_search_tool_\w+|mcp_toolset|advisor)(_\d{8})?")
"""Types of tools that Anthropic runs, or has run."""


def _custom(kind: str | None) -> str | None:
    if kind not in (None, "custom"):
        raise ValueError("it must be 'custom', a tool that is described by its input_schema and run by the client")
    return kind


def _of_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") != "object":
        raise ValueError("its type must be 'object'")
    return schema


class ToolDefinition(BaseModel):
    """A tool that the client runs. Its calls fit its schema; `strict` refuses one that can't be enforced."""

    type: Annotated[str | None, AfterValidator(_custom)] = None  # first, for tools of other types lack the rest
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: Annotated[dict[str, Any], AfterValidator(_of_object)]
    strict: bool | None = None
    defer_loading: bool | None = None

    @property
    def tool(self) -> Tool:
        """The tool in no protocol's terms."""
        return Tool(
            self.name, self.description or "", self.input_schema, bool(self.strict), deferred=bool(self.defer_loading)
        )


def _kind_of_tool(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "[hosted]" if isinstance(kind, str) and _HOSTED.fullmatch(kind) else "[custom]"


AnyTool = Annotated[
    Annotated[ToolDefinition, Tag("[custom]")] | Annotated[HostedTool, Tag("[hosted]")],
    Discriminator(_kind_of_tool),
]


class ToolChoice(BaseModel):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(BaseModel):
    """What an answer must fit."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    """`output_config`."""

    effort: str | None = None
    format: OutputFormat | None = None


class Thinking(BaseModel):
    """`thinking`; its budget is ignored."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    display: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether the model is to reason."""
        return self.type != "disabled"

    def asks_too_much(self, runtime: Runtime) -> bool:
        """Whether the model would have to reason otherwise than it can."""
        if not runtime.dialect.reasoning.expected:
            return False
        stuck = not self.enabled and not runtime.conversations.can_switch_reasoning
        return stuck or self.type == "between_tools"


class PromptFields(BaseModel):
    """The fields that a prompt is made of. What isn't known is ignored; so is `cache_control`: all is kept anyway."""

    model: str | None = None
    messages: list[InputMessage]
    system: TextContent | None = None
    tools: list[AnyTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    compaction: Compaction | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    _applied_edits: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def prompt(self, runtime: Runtime) -> tuple[tuple[Message, ...], Setting]:
        """The conversation and its setting, in no protocol's terms; raises `InvalidRequestError` naming the field."""
        effort = self.output_config.effort if self.output_config else None
        reasoning = reasoning_kwargs(effort, enabled=self.thinking.enabled if self.thinking else None)
        tools = self._tool_use()
        answered = self.compaction is not None  # a summary comes after anything
        messages = conversation(self.system, self._edited(runtime, tools), tools.tools, may_be_answered=answered)
        return messages, Setting(tools, reasoning | (self.chat_template_kwargs or {}))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is left out."""
        return left_out(self.tools) + (self.context_management.warnings if self.context_management else ())

    @property
    def applied_edits(self) -> list[dict[str, Any]] | None:
        """What was cleared from the conversation to make the prompt; None if nobody asked for that."""
        return self._applied_edits if self.context_management is not None else None

    def _edited(self, runtime: Runtime, tools: ToolUse) -> list[InputMessage]:
        """The messages as the model is to read them."""
        messages = since_compaction(self.messages)
        if self.context_management is None or not self.context_management.clears:
            return messages
        described = [tool.as_dict() for tool in tools.tools]
        before = "\n".join((*(block.model_dump_json() for block in self.system or ()), json.dumps(described)))
        edited, self._applied_edits = self.context_management.apply(
            messages, before, lambda text: len(runtime.tokenizer.encode(text))
        )
        return edited

    def _tool_use(self) -> ToolUse:
        """The tools and how they may be used, in no protocol's terms; raises `InvalidRequestError` naming the field.

        A tool that is named by the choice is called once.
        """
        known = tuple(
            replace(tool.tool, place=index)
            for index, tool in enumerate(self.tools or ())
            if isinstance(tool, ToolDefinition)
        )
        choice = self.tool_choice
        if choice is None or (choice.type == "auto" and not known):
            return ToolUse(known) if known else NO_TOOLS
        named = frozenset({given(choice.name, "tool_choice.name")}) if choice.type == "tool" else None
        mode = choice.type if choice.type in ("none", "auto") else "required"
        return ToolUse(known, mode, named, parallel=not (named or choice.disable_parallel_tool_use))


class MessagesRequest(PromptFields):
    """The body of a request for an answer. A null is as good as nothing."""

    max_tokens: Annotated[int, Field(ge=0)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[tuple[Annotated[str, Field(min_length=1)], ...] | None, Field(max_length=16)] = None
    stream: bool | None = None
    output_format: OutputFormat | None = None
    mcp_servers: list[Any] | None = None
    thread: Any = None
    slipstream: SlipstreamOptions | None = None

    def turn(self, runtime: Runtime) -> TurnRequest:
        """What it asks for, in no protocol's terms; raises `InvalidRequestError` naming the field."""
        self._check_support(runtime)
        prompt, setting = self.prompt(runtime)
        system = prompt[0] if prompt and prompt[0].role == "system" else None
        given = self.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
        form = (self.output_config and self.output_config.format) or self.output_format  # as older clients send it
        return TurnRequest(
            prompt=prompt if system is None else prompt[1:],
            system=system,
            params=SamplingParams(**given, max_tokens=max(self.max_tokens, 1), stop=self.stop_sequences or ()),
            setting=setting,
            response_schema=form.schema_ if form is not None else None,
            response_strict=True,  # as the protocol promises, which has no word for it
            answers=self.max_tokens > 0,
            warnings=self.warnings,
            **(self.slipstream or SlipstreamOptions()).model_dump(),
        )

    @property
    def compacts(self) -> Compact | Compaction | None:
        """Whether, and when, the conversation is to be summarised."""
        return self.compaction or (self.context_management.compact if self.context_management is not None else None)

    def summary(self, runtime: Runtime, request: TurnRequest) -> TurnRequest | None:
        """The request for a summary, if the conversation of `request`, this one's, is to be summarised."""
        asked = self.compacts
        alone = replace(request, session_id=None, session_hint=None, continues=None)
        if asked is None or (isinstance(asked, Compact) and not (request.answers and is_due(asked, alone, runtime))):
            return None
        most = self.max_tokens if isinstance(asked, Compaction) else None
        return summarising(runtime, alone, instructions=asked.instructions, most=most)

    def after(self, block: CompactionBlock) -> "MessagesRequest":
        """The same from a summary on, as its client will send it."""
        message = InputMessage.model_validate({"role": "assistant", "content": [block.model_dump()]})
        return self.model_copy(update={"messages": [*self.messages, message]})

    @property
    def shows_thinking(self) -> bool:
        """Whether the client wants to see reasoning."""
        return self.thinking is None or self.thinking.display != "omitted"

    def _check_support(self, runtime: Runtime) -> None:
        """Refuse what would make a difference and can't be had."""
        if self.thread is not None:
            # Its client knows this code, and goes on with whole conversations.
            message = "thread is not supported: send the whole conversation as messages; what is known costs nothing"
            raise InvalidRequestError(message, param="thread", code="thread_unsupported_request")
        if self.mcp_servers:
            raise unsupported("mcp_servers", "can't be called from here: send their tools as tools")
        if self.compaction is not None and self.context_management is not None:
            raise unsupported("compaction", "summarises the conversation as it is: leave context_management out")
        if self.thinking is not None and self.thinking.asks_too_much(runtime):
            advice = "can't be changed so: this model reasons before each answer; leave the field out"
            raise unsupported("thinking", advice)


class OriginalCount(BaseModel):
    """How many tokens a prompt has before anything is cleared from it."""

    original_input_tokens: int


class TokenCount(BaseModel):
    """How many tokens a prompt has."""

    input_tokens: int
    context_management: OriginalCount | None = None


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes of this protocol."""
    runtime = runner.runtime

    @app.post("/v1/messages", responses=WHOLE_OR_STREAM | errors(AnthropicError))
    async def messages(http: Request, body: MessagesRequest, tenant: TenantName) -> Response:
        model = runner.names.check(body.model)

        summary: TurnRequest | None = None

        def first() -> list[TurnRequest]:
            nonlocal summary
            request = replace(in_session(body.turn(runtime), http), tenant=tenant)
            summary = body.summary(runtime, request)
            return [summary or request]

        turn = await runner.start(first, http)
        shown: dict[str, Any] = {"shows_thinking": body.shows_thinking, "edits": body.applied_edits}
        answer = MessageAnswer(model, turn, **shown)
        if summary is not None:

            def rest(block: CompactionBlock) -> list[TurnRequest]:
                return [replace(in_session(body.after(block).turn(runtime), http), continues=False)]

            async def go_on(block: CompactionBlock) -> LiveTurn:
                return await runner.start(lambda: rest(block), http)

            assert body.compacts is not None
            changes = tool_changes(body.messages)
            answer = CompactedAnswer(model, turn, go_on, asked=body.compacts, changes=changes, **shown)
        return await respond(http, answer, stream=body.stream)

    @app.post("/v1/messages/count_tokens", response_model_exclude_none=True, responses=errors(AnthropicError))
    def count_tokens(body: PromptFields, tenant: TenantName) -> TokenCount:
        runner.names.check(body.model)

        def count(body: PromptFields) -> int:
            return len(runtime.conversations.prompt(*body.prompt(runtime), tenant=tenant).tokens)

        counted = count(body)
        if body.context_management is None:
            return TokenCount(input_tokens=counted)
        original = count(body.model_copy(update={"context_management": None}))
        return TokenCount(input_tokens=counted, context_management=OriginalCount(original_input_tokens=original))
