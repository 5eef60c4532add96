"""What keeping state saves: results appended while a tool runs, sessions read back from disk, answers from memory.

    python -m slipstream_bench.measurements.state_costs

Appended: a session of about 1,500 tokens calls a tool that brings 600 tokens. The result is sent with the request for
the next answer, or appended to the session as soon as it's there, a second before the agent asks; alternately, with
the time to the first token of each. Repeated: the server's time for an exact repeat of a prompt of 2,000 tokens.
Restored: a session of 4,000 tokens whose KV is read from disk, or computed, alternately, each time into empty memory.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track

from slipstream import Engine, EngineConfig, SamplingParams
from slipstream.engine.commands import Clear
from slipstream.models import DEFAULT_MODEL
from slipstream_bench.measurements.turn_costs import words
from slipstream_bench.peers.slipstream import serving

RESULT_TOKENS = 600
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"properties": {"path": {"type": "string"}}}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    console = Console(width=120)
    with (
        serving(DEFAULT_MODEL, "--kv-memory", "1GiB", log="state_costs") as endpoint,
        httpx.Client(base_url=endpoint.base_url.removesuffix("/v1"), timeout=600) as http,
    ):
        appended(http, options.rounds, console)
        repeated(http, console)
    restored(options.rounds, console)


def appended(http: httpx.Client, rounds: int, console: Console) -> None:
    """The time to the first token after a tool's result that was sent, or appended before."""
    rng = random.Random(0)
    first_tokens: dict[bool, list[float]] = {False: [], True: []}
    for number in track(range(2 * rounds + 2), "Appended", console=console):
        early = bool(number % 2)
        name = f"agent-{number}"
        question = {"role": "user", "content": words(rng, 1400)}
        call = {"role": "assistant", "content": "", "tool_calls": [_call("call_1")]}
        created = http.post("/v1/sessions", json={"id": name, "messages": [question, call], "tools": [TOOL]})
        created.raise_for_status()
        _wait_until_computed(http, name)
        result = {"role": "tool", "tool_call_id": "call_1", "content": words(rng, RESULT_TOKENS)}
        if early:
            http.post(f"/v1/sessions/{name}/messages", json={"messages": [result]}).raise_for_status()
        time.sleep(1)
        seconds = _first_token(http, name, [] if early else [result])
        if number >= 2:  # the first of each kind warms up
            first_tokens[early].append(seconds)
    sent, ahead = (statistics.median(first_tokens[early]) * 1e3 for early in (False, True))
    console.print(
        f"a result of {RESULT_TOKENS} tokens: first token {sent:.0f} ms when it's sent with the request, "
        f"{ahead:.0f} ms when it was appended before ({sent / ahead:.1f}x); medians of {rounds}"
    )


def repeated(http: httpx.Client, console: Console) -> None:
    """The server's time for an exact repeat."""
    messages = [{"role": "user", "content": words(random.Random(1), 2000)}]
    body = {"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "max_tokens": 40}
    assert http.post("/v1/chat/completions", json=body).json()["slipstream"]["response_cache"] == "miss"
    hits, trips = [], []
    for _ in range(50):
        started = time.perf_counter()
        report = http.post("/v1/chat/completions", json=body).json()["slipstream"]
        hits.append(time.perf_counter() - started)
        assert report["response_cache"] == "hit"
        started = time.perf_counter()
        http.get("/health")
        trips.append(time.perf_counter() - started)
    hit, trip = statistics.median(hits) * 1e3, statistics.median(trips) * 1e3
    console.print(f"an exact repeat: {hit:.1f} ms at the client, of which {trip:.1f} ms are HTTP (a health check's)")


def restored(rounds: int, console: Console) -> None:
    """A session read from disk, and computed."""
    params = SamplingParams(temperature=0, max_tokens=1)
    loaded: list[float] = []
    computed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig.model_validate({"state_dir": Path(folder)})
        text = words(random.Random(2), 4000)
        with Engine(DEFAULT_MODEL, config) as engine:
            session = engine.session(id="long")
            session.send(text, params=params)
            session.save()
            tokens = session.info().state.tokens
            for _ in track(range(rounds), "Restored", console=console):
                for times, seconds in ((loaded, _load(engine)), (computed, _compute(engine))):
                    times.append(seconds)
    ours, afresh = statistics.median(loaded) * 1e3, statistics.median(computed) * 1e3
    console.print(
        f"a session of {tokens:,} tokens: read from disk in {ours:.0f} ms, computed in {afresh:.0f} ms "
        f"({afresh / ours:.1f}x); medians of {rounds}"
    )


def _load(engine: Engine) -> float:
    engine.core.call(Clear())
    session = engine.session(id="long")
    started = time.perf_counter()
    session.load()
    seconds = time.perf_counter() - started
    info = session.info()
    assert info.kv_tokens == info.state.tokens, "not all of it came back"
    return seconds


def _compute(engine: Engine) -> float:
    engine.core.call(Clear())
    tokens = engine.sessions.get("", "long").token_ids
    assert tokens is not None
    started = time.perf_counter()
    engine.generate(np.asarray(tokens).tolist(), SamplingParams(temperature=0, max_tokens=1), reuse=False)
    return time.perf_counter() - started


def _first_token(http: httpx.Client, name: str, messages: list[dict[str, str]]) -> float:
    body = {"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, "stream": True}
    started = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Session-Id": name}) as response:
        response.raise_for_status()
        next(line for line in response.iter_lines() if '"content":"' in line and '"content":""' not in line)
        return time.perf_counter() - started


def _wait_until_computed(http: httpx.Client, name: str) -> None:
    while True:
        session = http.get(f"/v1/sessions/{name}").json()
        if session["kv_tokens"] == session["tokens"]:
            return
        time.sleep(0.05)


def _call(id: str) -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": "read", "arguments": '{"path": "notes.txt"}'}}


if __name__ == "__main__":
    main()
