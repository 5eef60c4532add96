"""Nobody's stream waits for a disk: the event loop's thread never touches the database."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream import Engine, EngineConfig
from slipstream.config import ServerConfig
from slipstream.models import Model
from slipstream.server.app import create_app
from slipstream.server.keys import KeyRing
from slipstream.sessions import Database
from tests.server.process import MODEL
from tests.short_model import room_for

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
RESPONSE = {"model": MODEL, "input": "Hello?", "max_output_tokens": 4}


def test_the_database_is_used_on_other_threads_alone(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses: list[Any] = []
    on_the_loop: list[Any] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            try:
                on_the_loop.append(asyncio.get_running_loop())
            except RuntimeError:  # there is none on this thread
                uses.append(method)
            return method(*args, **kwargs)

        return watching

    async def use(http: httpx.AsyncClient) -> None:
        for stream in (False, True):
            named = {"X-Session-Id": f"named-{stream}"}
            ids = []
            for path, body in (("chat/completions", CHAT), ("responses", RESPONSE), ("messages", CHAT)):
                response = await http.post(f"/v1/{path}", json={**body, "stream": stream}, headers=named)
                assert response.status_code == 200, response.text
                ids.append(response.json()["id"] if not stream else "")
            await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        body = {**RESPONSE, "previous_response_id": ids[1] or None}
        name = (await http.post("/v1/responses", json=body)).json()["id"]
        for method, path, sent in (
            ("GET", f"/v1/responses/{name}", None),
            ("GET", f"/v1/responses/{name}/input_items", None),
            ("DELETE", f"/v1/responses/{name}", None),
            ("POST", "/v1/sessions", {"id": "made"}),
            ("POST", "/v1/sessions/made/messages", {"messages": CHAT["messages"]}),
            ("POST", "/v1/sessions/made/fork", {"id": "forked"}),
            ("POST", "/v1/sessions/made/rollback", {"keep": 0}),
            ("PATCH", "/v1/sessions/made", {"ttl_seconds": 60}),
            ("GET", "/v1/sessions", None),
            ("GET", "/v1/sessions/made", None),
            ("GET", "/v1/conversations/made", None),
            ("DELETE", "/v1/sessions/made", None),
            ("GET", "/metrics", None),
        ):
            response = await http.request(method, path, json=sent)
            assert response.is_success, (method, path, response.text)

    async def serve(engine: Engine) -> None:
        transport = httpx.ASGITransport(create_app(engine, ServerConfig(), KeyRing()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            await use(http)

    config = EngineConfig.model_validate({"kv_memory": room_for(2000), "state_dir": tmp_path})
    with Engine(model, config) as engine:
        transactions = {name: method for name, method in vars(Database).items() if hasattr(method, "__wrapped__")}
        for name, method in transactions.items():
            monkeypatch.setattr(Database, name, watched(method))
        asyncio.run(serve(engine))
    assert len(uses) > 50
    assert on_the_loop == []
