"""`slipstream serve` on a folder of safetensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import InternalServerError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from slipstream.cli.app import app
from slipstream.models import Model
from slipstream.models.safetensors import WEIGHTS_FILE
from slipstream.tokenizer import Tokenizer
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
def test_sums_that_overflow_end_their_request_with_an_error(tiny: Model, home: Path, tmp_path: Path) -> None:
    """Those of one word, with a grammar or without; another conversation goes on as before."""
    folder = tmp_path / "overflowing"
    shutil.copytree(home / "made" / tiny.name, folder)
    weights = load_file(folder / WEIGHTS_FILE)
    word = Tokenizer.from_file(tiny.tokenizer_path).encode(" %")
    weights["model.embed_tokens.weight"][word] = torch.inf
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    options = {"model": "overflowing", "max_tokens": 40}
    with running_server("--kv-memory", "16MiB", "--device", "cpu", "--threads", "1", model=str(folder)) as server:
        client = server.openai()
        expected = client.chat.completions.create(messages=QUESTION, temperature=0, **options)
        overflowing = [{"role": "user", "content": "How much is 50 %"}]
        forced = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"const": "as it was"}}}
        kinds: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 1},
            {"temperature": 0, **ONE_CALL},
            {"temperature": 0, "logprobs": True, "response_format": forced},
        ]
        for more in kinds:
            with pytest.raises(InternalServerError, match="infinite or no numbers"):
                client.chat.completions.create(messages=overflowing, **options, **more)
        beside = [{"role": "user", "content": "How much is 50 apples"}]
        client.chat.completions.create(messages=beside, temperature=0, **options)  # whose beginning it shares
        found = client.chat.completions.create(messages=QUESTION, temperature=0, **options)
        assert found.choices[0].message.content == expected.choices[0].message.content
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


@pytest.mark.parametrize("tiny", ["qwen3"], indirect=True)
def test_doctor(tiny: Model) -> None:
    run = CliRunner().invoke(app, ["doctor", "--model", tiny.name, "--device", "cpu", "--kv-memory", "16MiB", "--json"])
    report = json.loads(run.stdout)
    assert (report["exact"], report["gpu"], report["precision"]) == (True, None, "float32")
    assert report["runtime"].startswith("torch ")
    assert report["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, bytes
