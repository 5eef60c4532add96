"""`python -m tests.clients.serve RUNS RECORDS`: Slipstream with the scripted model, which writes down each request.

RUNS is a JSON file of runs by name; to RECORDS a line is added for each request that was answered.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream import runtime
from slipstream.config import ServerConfig
from slipstream.embedded import Engine
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.server import app, serve
from slipstream.tokenizer import Tokenizer
from tests.clients.bench import BEGUN
from tests.clients.scripted import CONTEXT, Call, Scripted, script_answer

_REPORT = re.compile(r'"slipstream": ?(?={"session_id")')
_CALLED = re.compile(rb'"name": ?"([^"]+)"')


class Recorder:
    """ASGI middleware that writes down what was asked, how it was answered and what it cost."""

    def __init__(self, inner: ASGIApp, records: Path) -> None:
        self._inner = inner
        self._records = records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent, got, status = bytearray(), bytearray(), 0

        async def receiving() -> Message:
            message = await receive()
            got.extend(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            sent.extend(message.get("body", b""))
            await send(message)

        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        self._write(BEGUN)
        try:
            await self._inner(scope, receiving, sending)
        finally:
            self._note(scope, bytes(got), bytes(sent), status)

    def _note(self, scope: Scope, got: bytes, sent: bytes, status: int) -> None:
        text = sent.decode(errors="replace")
        reports = [match.end() for match in _REPORT.finditer(text)]
        record: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": status}
        if status >= 400:
            record["error"] = text[:600]
        if reports:
            report, _ = json.JSONDecoder().raw_decode(text, reports[-1])
            record |= {name: report[name] for name in ("prompt_tokens", "reused_tokens", "warnings")}
            record["called"] = [name.decode() for name in dict.fromkeys(_CALLED.findall(sent.split(b'"tools":')[0]))]
        if got and scope["method"] == "POST":
            record["tools"] = bool(json.loads(got).get("tools"))
        self._write(json.dumps(record))

    def _write(self, line: str) -> None:
        with self._records.open("a") as file:
            file.write(line + "\n")


def long_model() -> Model:
    """The default model's tokenizer and template, as if it had been trained on a long context."""
    model = ModelStore().ensure(DEFAULT_MODEL)
    return Model(model.path, model.manifest.model_copy(update={"context_length": CONTEXT}))


def main(runs_file: str, records: str, *names: str) -> None:
    """Serve until a signal ends it."""
    given = json.loads(Path(runs_file).read_text())
    runs = {
        name: [step if isinstance(step, str) else Call(step["tool"], step["arguments"]) for step in steps]
        for name, steps in given.items()
    }
    model = long_model()
    backend = Scripted(
        Tokenizer.from_file(model.tokenizer_path), model.manifest.vocab_size, partial(script_answer, runs)
    )
    runtime.BACKENDS["openvino"] = lambda _model, _config: lambda _progress: backend
    create_app = app.create_app
    app.create_app = lambda *given: Recorder(create_app(*given), Path(records))  # type: ignore[assignment,return-value]
    serve.run(lambda: Engine(model), ServerConfig(port=0, served_model_name=names))


if __name__ == "__main__":
    main(*sys.argv[1:])
