"""One client for all servers: OpenAI's chat completions, streamed, with a clock."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from slipstream_bench.conversation import Answer, Conversation
from slipstream_bench.peers.base import Endpoint, PeerError, Prescribe
from slipstream_bench.records import ConstraintKind, TurnResult
from slipstream_bench.script import Script

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_LONGEST_ERROR = 500


class TurnFailedError(Exception):
    """A turn brought no answer; `result` says why."""

    def __init__(self, result: TurnResult) -> None:
        super().__init__(result.error)
        self.result = result


class Client:
    """Requests to one server, over connections that stay open."""

    def __init__(self, endpoint: Endpoint, *, response_cache: bool) -> None:
        self.endpoint = endpoint
        self._fields = {**endpoint.extra_body, **({} if response_cache else endpoint.without_response_cache)}
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._http = httpx.AsyncClient(
            base_url=endpoint.base_url.rstrip("/") + "/", headers=headers, timeout=_TIMEOUT, trust_env=False
        )

    async def __aenter__(self) -> "Client":
        await self._http.get("models")  # so that the first turn is not the one that connects
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def agent(self, number: int, script: Script, constraint: ConstraintKind, *, rewrites: bool = False) -> "Agent":
        """One that follows a script; raises `PeerError` if its answers can't be prescribed to this server."""
        if constraint == "prescribed" and self.endpoint.prescribed is None:
            raise PeerError("it can't be made to answer a given text; of Slipstream, run slipstream:prescribed")
        prescribed = self.endpoint.prescribed if constraint == "prescribed" else None
        return Agent(self, number, script, Conversation(script, constraint, rewrites=rewrites), prescribed)

    async def ask(self, body: dict[str, Any]) -> "Stream":
        """Send a request and read its answer to the end; raises `httpx.HTTPError`, `ValueError` if it is spoilt."""
        stream = Stream(started=time.perf_counter())
        options = {"model": self.endpoint.model, "stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", "chat/completions", json={**options, **body, **self._fields}) as response:
            if response.is_error:
                text = (await response.aread()).decode(errors="replace")
                raise httpx.HTTPStatusError(
                    f"HTTP {response.status_code}: {text[:_LONGEST_ERROR]}",
                    request=response.request,
                    response=response,
                )
            async for chunk in _events(response):
                stream.take(chunk)
        stream.seconds = time.perf_counter() - stream.started
        return stream


class Agent:
    """A conversation with a server."""

    def __init__(
        self, client: Client, number: int, script: Script, conversation: Conversation, prescribed: Prescribe | None
    ) -> None:
        self.number = number
        self.turns = len(script.turns)
        self._client = client
        self._script = script
        self._conversation = conversation
        self._prescribed = prescribed

    async def take(self, turn: int) -> TurnResult:
        """Ask for the next call; raises `TurnFailedError` if none comes."""
        known: dict[str, Any] = {"agent": self.number, "turn": turn, "tool": self._script.turns[turn].tool}
        body = self._conversation.request(turn)
        if self._prescribed is not None:
            body = self._prescribed(body, self._conversation.prescribed(turn))
        rewritten = self._conversation.rewritten
        started = time.perf_counter()
        try:
            stream = await self._client.ask(body)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - started
            raise TurnFailedError(TurnResult(**known, seconds=seconds, error=reason)) from error
        answer = stream.answer
        result = TurnResult(
            **known,
            seconds=stream.seconds,
            first_token_seconds=stream.first_token_seconds,
            prompt_tokens=stream.usage.get("prompt_tokens"),
            cached_tokens=stream.cached_tokens,
            output_tokens=stream.usage.get("completion_tokens"),
            valid=self._conversation.is_valid(turn, answer),
            rewritten=rewritten,
            answer=answer.text,
            report=stream.report,
        )
        self._conversation.answered(answer)
        return result


@dataclass(slots=True)
class Stream:
    """The chunks of one answer, put together."""

    started: float
    seconds: float = 0.0
    first_token_seconds: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    _timings: dict[str, Any] = field(default_factory=dict)
    _text: str = ""
    _call: dict[str, str] = field(default_factory=lambda: {"id": "", "name": "", "arguments": ""})

    @property
    def answer(self) -> Answer:
        """The call, or the text if there was no call."""
        call = self._call
        return Answer(call["arguments"], call["id"], call["name"]) if call["name"] else Answer(self._text)

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were not computed, if the server says so, in OpenAI's words or in llama-server's."""
        details = self.usage.get("prompt_tokens_details") or {}
        known: int | None = details.get("cached_tokens", self._timings.get("cache_n"))
        return known

    def take(self, chunk: dict[str, Any]) -> None:
        """Add a chunk; raises `ValueError` if it tells of an error."""
        if error := chunk.get("error"):
            raise ValueError(f"the stream ended with an error: {error}")
        self.usage = chunk.get("usage") or self.usage
        self.report = chunk.get("slipstream") or self.report
        self._timings = chunk.get("timings") or self._timings
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            calls = delta.get("tool_calls") or []
            if (delta.get("content") or calls) and self.first_token_seconds is None:
                self.first_token_seconds = time.perf_counter() - self.started
            self._text += delta.get("content") or ""
            for call in calls:
                function = call.get("function") or {}
                self._call["id"] += call.get("id") or ""
                self._call["name"] += function.get("name") or ""
                self._call["arguments"] += function.get("arguments") or ""


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to the last one; raises `ValueError` if the stream breaks off."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
    raise ValueError("the stream ended without [DONE]")
