"""The log has a line for each turn, with what it cost and never what it said."""

import json
from pathlib import Path

import httpx

from slipstream.models import Model
from tests.server.process import running_server
from tests.waiting import HANG, wait_until

SECRET = "Marmalade is hidden under the third stair"


def test_a_line_of_json_for_each_turn_without_what_was_said(model: Model, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def turns() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["logger"] == "slipstream.turns"]

    with running_server("--log-format", "json", api_key="s3cret-key", log=log) as server, server.http() as http:
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "slipstream": {"session_id": "s1"}}
        said = http.post("/v1/chat/completions", json=body).json()
        wait_until(lambda: len(turns()) == 1)
        for name in ("prompt_tokens", "reused_tokens", "delta_tokens", "forced_tokens", "drafted_tokens", "session_id"):
            assert turns()[0][name] == said["slipstream"][name]
        assert turns()[0]["outcome"] == "length"
        assert turns()[0]["tenant"] == ""
        assert 0 < float(str(turns()[0]["first_token_ms"])) <= float(str(turns()[0]["total_ms"]))

        endless = {"prompt": "Count", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        headers = {"Authorization": f"Bearer {server.api_key}"}
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=endless, headers=headers, timeout=HANG
        ) as stream:
            next(stream.iter_lines())
        wait_until(lambda: len(turns()) == 2)
        assert turns()[1]["outcome"] == "cancelled"
    text = log.read_text()
    assert SECRET not in text
    assert said["choices"][0]["message"]["content"] not in text
    assert "s3cret-key" not in text
    assert all(line.startswith("{") for line in text.splitlines())
