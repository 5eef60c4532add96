"""OpenVINO GenAI behind OpenAI's chat completions, as little as that takes.

It is run as a script by the interpreter of the environment that has `openvino_genai`, fastapi and uvicorn, and imports
nothing of Slipstream. One thread drives GenAI's own continuous batching step by step, so that requests that come in
while others run are batched with them.

    python genai_app.py --model FOLDER --store FOLDER --name NAME --port PORT [--prompt-lookup] [--compact]
"""

import argparse
import asyncio
import itertools
import json
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

DRAFT_TOKENS = 8
LONGEST_NGRAM = 3


@dataclass(slots=True)
class Job:
    """A request on its way through the engine thread."""

    tokens: Any
    config: Any
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[str | BaseException | None] = field(default_factory=asyncio.Queue)
    """Pieces of text; None at the end."""
    handle: Any = None
    generated: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "stop"
    told: int = 0
    """Characters that were handed on."""

    def tell(self, event: str | BaseException | None) -> None:
        """From the engine thread to the request."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Engine:
    """GenAI's pipeline and the thread that drives it."""

    def __init__(self, folder: Path, store: Path, *, prompt_lookup: bool, compact: bool) -> None:
        import openvino_genai as genai  # only the environment that serves has it

        self._genai = genai
        # What LLMPipeline takes by itself: prefix caching, and prompts whole. A plain SchedulerConfig has neither.
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2**31 - 1
        if prompt_lookup:
            scheduler.cache_size = 2  # GB; without it the cache grows, and is copied, as it is needed
        properties = {"prompt_lookup": True} if prompt_lookup else {}
        self._pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
        self.tokenizer = self._pipeline.get_tokenizer()
        self.tokenizer.set_chat_template((store / "chat_template.jinja").read_text(encoding="utf-8"))
        manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
        self._ends = set(manifest["stop_token_ids"])
        self._prompt_lookup = prompt_lookup
        self._compact = compact
        self._jobs: queue.Queue[Job] = queue.Queue()
        threading.Thread(target=self._drive, daemon=True).start()

    def config(self, body: dict[str, Any]) -> Any:
        """The generation config of a request: greedy, as the bench asks for."""
        config = self._genai.GenerationConfig(max_new_tokens=body.get("max_tokens") or 256, apply_chat_template=False)
        config.stop_token_ids = self._ends
        if self._prompt_lookup:
            config.num_assistant_tokens, config.max_ngram_size = DRAFT_TOKENS, LONGEST_NGRAM
        wanted = body.get("response_format") or {}
        if wanted.get("type") == "regex":
            config.structured_output_config = self._genai.StructuredOutputConfig(regex=wanted["regex"])
        if wanted.get("type") == "json_schema":
            schema = wanted["json_schema"]["schema"]
            pattern = compact_pattern(schema) if self._compact else None
            constraint = {"json_schema": json.dumps(schema)} if pattern is None else {"regex": pattern}
            config.structured_output_config = self._genai.StructuredOutputConfig(**constraint)
        return config

    def submit(self, job: Job) -> None:
        """Have it computed; its events tell how it goes."""
        self._jobs.put(job)

    def _drive(self) -> None:
        ids = itertools.count()
        running: list[Job] = []
        while True:
            waiting = [] if running else [self._jobs.get()]
            waiting += [self._jobs.get_nowait() for _ in range(self._jobs.qsize())]
            running += [job for job in waiting if self._add(job, next(ids))]
            try:
                if running:
                    self._pipeline.step()
                running = [job for job in running if not self._read(job)]
            except RuntimeError as error:
                for job in running:
                    job.tell(error)
                running = []

    def _add(self, job: Job, id: int) -> bool:
        """Whether the pipeline took it."""
        try:
            job.handle = self._pipeline.add_request(id, job.tokens, job.config)
        except RuntimeError as error:
            job.tell(error)
        return job.handle is not None

    def _read(self, job: Job) -> bool:
        """Hand on what a step brought; True at the end."""
        while job.handle.can_read():
            for output in job.handle.read().values():
                job.generated += output.generated_ids
                if output.finish_reason == self._genai.GenerationFinishReason.LENGTH:
                    job.finish_reason = "length"
        ended: bool = job.handle.get_status() != self._genai.GenerationStatus.RUNNING
        text = self.tokenizer.decode(job.generated)
        if len(text) > job.told and (ended or not text.endswith("\ufffd")):  # half a character waits for the rest
            job.tell(text[job.told :])
            job.told = len(text)
        if ended:
            job.tell(None)
        return ended


_CHARACTER = r'([^"\\\x00-\x1f]|\\["\\/bfnrt])'
_KNOWN = frozenset(
    {
        *("type", "description", "title", "default", "enum", "maxLength", "minimum", "maximum"),
        *("properties", "required", "additionalProperties"),
    }
)


def compact_pattern(schema: dict[str, Any]) -> str | None:
    """A regular expression for a schema's JSON without white space; None for schemas that say more than it can.

    GenAI's grammar for a JSON schema leaves white space to the model, which writes a lot of it.
    """
    pattern: str | None = None
    match schema:
        case {"enum": [*values]}:
            pattern = _any_of(re.escape(json.dumps(value, ensure_ascii=False)) for value in values)
        case {"type": "boolean"}:
            pattern = "(true|false)"
        case {"type": "string", "maxLength": int(longest)}:
            pattern = f'"{_CHARACTER}{{0,{longest}}}"'
        case {"type": "integer", "minimum": int(low), "maximum": int(high)} if 0 <= low <= high:
            pattern = _integers(low, high)
        case {"type": "object", "additionalProperties": False}:
            pattern = _members(schema.get("properties", {}), set(schema.get("required", ())))
    return pattern if set(schema) <= _KNOWN else None


def _members(properties: dict[str, dict[str, Any]], required: set[str]) -> str | None:
    patterns = [compact_pattern(value) for value in properties.values()]
    if not properties or None in patterns or required != set(properties):
        return None
    members = (f"{re.escape(json.dumps(name))}:{pattern}" for name, pattern in zip(properties, patterns, strict=True))
    return rf"\{{{','.join(members)}\}}"


def _any_of(patterns: Iterable[str]) -> str:
    return f"({'|'.join(patterns)})"


def _integers(low: int, high: int) -> str:
    """The numbers from `low` to `high`: those of each length by themselves."""
    lengths = range(len(str(low)), len(str(high)) + 1)
    bounds = ((max(low, 10 ** (digits - 1) if digits > 1 else 0), min(high, 10**digits - 1)) for digits in lengths)
    return _any_of(_digits(str(first), str(last)) for first, last in bounds)


def _digits(low: str, high: str) -> str:
    """The strings of digits from `low` to `high`, which are of one length."""
    if low[:1] == high[:1]:
        return low[:1] + _digits(low[1:], high[1:]) if low else ""
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    patterns = []
    if low[1:].strip("0"):
        patterns.append(low[0] + _digits(low[1:], "9" * rest))
        first += 1
    if high[1:].strip("9"):
        patterns.append(high[0] + _digits("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        patterns.append(f"[{first}-{last}]" + "[0-9]" * rest)
    return _any_of(patterns)


def create_app(engine: Engine, name: str) -> FastAPI:
    """The app."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "openvino-genai"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        if not body.get("stream") or body.get("temperature") != 0 or body.get("tools"):
            reason = "only streamed, greedy requests without `tools` are served: stream true, temperature 0"
            return JSONResponse({"error": {"message": reason, "type": "invalid_request_error"}}, 400)
        prompt = engine.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        tokens = engine.tokenizer.encode(prompt, add_special_tokens=False).input_ids
        job = Job(tokens, engine.config(body), asyncio.get_running_loop())
        engine.submit(job)
        return StreamingResponse(_events(job, name), media_type="text/event-stream")

    return app


async def _events(job: Job, name: str) -> AsyncIterator[str]:
    """The chunks of an answer, then its usage."""
    head = {
        "id": f"chatcmpl-{id(job):x}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": name,
    }
    while (piece := await job.events.get()) is not None:
        if isinstance(piece, BaseException):
            yield _event({"error": {"message": str(piece), "type": "server_error"}})
            return
        yield _event({**head, "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": job.finish_reason}]})
    prompt, generated = job.tokens.shape[-1], len(job.generated)
    usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    yield _event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True, help="Slipstream's folder of the model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prompt-lookup", action="store_true")
    parser.add_argument("--compact", action="store_true", help="JSON without white space, as far as a schema allows")
    options = parser.parse_args()
    engine = Engine(options.model, options.store, prompt_lookup=options.prompt_lookup, compact=options.compact)
    uvicorn.run(create_app(engine, options.name), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
