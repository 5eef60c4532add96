"""`slipstream top`, on a real server and on what one said."""

import subprocess
import sys
from dataclasses import replace

import httpx
from rich.console import Console

from slipstream.cli.top import Snapshot, frame
from tests.server.process import MODEL, Server
from tests.waiting import HANG

COMMAND = [sys.executable, "-m", "slipstream", "top", "--once", "--url"]


def shown(now: Snapshot, before: Snapshot | None) -> str:
    """What it shows, with one space between words."""
    console = Console(width=120)
    with console.capture() as capture:
        console.print(frame(now, before))
    return " ".join(capture.get().split())


def test_it_shows_what_a_server_did(server: Server, http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Who is at the top?"}], "max_tokens": 4, "temperature": 0}
    http.post("/v1/chat/completions", json=body).raise_for_status()
    server.wait_until_settled()
    ended = subprocess.run([*COMMAND, server.url], capture_output=True, text=True, timeout=HANG, check=True)
    text, metrics = " ".join(ended.stdout.split()), server.metrics()
    assert text.startswith(f"{MODEL} ok exact running 0 waiting 0")
    assert f"{metrics['slipstream_kv_capacity_tokens']:,.0f} tokens" in text
    assert f"answers {metrics['slipstream_decode_seconds_count']:,.0f} since the start" in text
    assert f"generated {metrics['slipstream_completion_tokens_total']:,.0f} tokens" in text
    assert "first token" in text


def test_between_two_looks_it_shows_what_was_added(http: httpx.Client) -> None:
    before = Snapshot.take(http)
    added = {
        "slipstream_prompt_tokens_total": 2000,
        "slipstream_reused_tokens_total": 1500,
        "slipstream_decode_seconds_count": 8,
        "slipstream_choice_seconds_count": 8,
        "slipstream_choice_seconds_sum": 4,
        "slipstream_engine_busy_seconds_total": 1,
        "slipstream_reuse_breaks_total evicted": 3,
    }
    metrics = {**before.metrics, **{name: before.metrics.get(name, 0) + count for name, count in added.items()}}
    text = shown(replace(before, taken=before.taken + 4, metrics=metrics), before)
    assert "answers 2.0/s in 4.0 s" in text
    assert "prompts 500.0/s tokens, 75% reused" in text
    assert "whole answer 500 ms" in text
    assert "engine 25% busy" in text
    assert "reuse broken 3 evicted" in text
    assert "drafted 0.0/s tokens, - right" in text
    assert shown(before, before).count("reuse broken") == 0


def test_a_server_that_is_not_there(server: Server) -> None:
    ended = subprocess.run([*COMMAND, "http://127.0.0.1:9"], capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode == 1
    assert "no answer from http://127.0.0.1:9" in ended.stderr
    ended = subprocess.run([*COMMAND, f"{server.url}/x"], capture_output=True, text=True, timeout=HANG, check=False)
    assert "there is no /x/health here" in ended.stderr
