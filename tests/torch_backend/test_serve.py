"""`slipstream serve` on a folder of safetensors."""

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from slipstream.cli.app import app
from slipstream.models import Model
from tests.server.process import running_server
from tests.server.test_tools import ONE_CALL, QUESTION

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("tiny", ["qwen3"], indirect=True)
def test_a_tool_call_over_http(tiny: Model, home: Path) -> None:
    folder = home / "made" / tiny.name
    with running_server("--kv-memory", "16MiB", "--device", "cpu", "--threads", "1", model=str(folder)) as server:
        assert "(exact" in server.greeting
        client = server.openai()
        answers = [
            client.chat.completions.create(model=tiny.name, messages=QUESTION, temperature=0, max_tokens=80, **ONE_CALL)
            for _ in range(2)
        ]
        calls = [answer.choices[0].message.tool_calls for answer in answers]
        assert calls[0]
        call = calls[0][0].function
        assert call.name in ("get_weather", "get_time")
        assert isinstance(json.loads(call.arguments), dict)
        assert call == calls[1][0].function
        health = httpx.get(f"{server.url}/health").json()
        assert health["exact"] is True


@pytest.mark.parametrize("tiny", ["qwen3"], indirect=True)
def test_doctor(tiny: Model) -> None:
    run = CliRunner().invoke(app, ["doctor", "--model", tiny.name, "--device", "cpu", "--kv-memory", "16MiB", "--json"])
    report = json.loads(run.stdout)
    assert (report["exact"], report["gpu"], report["precision"]) == (True, None, "float32")
    assert report["runtime"].startswith("torch ")
    assert report["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, bytes
