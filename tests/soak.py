"""Agents of several tenants on one server, far more than its memory holds: `python -m tests.soak SECONDS [SEED]`.

They speak three protocols, call tools, go away in the middle of an answer, and send nonsense. No answer may be a
server's error, each must be what a computation from nothing gives, and in the end all memory must be free again.
"""

import json
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.server.keys import add_key
from tests.fuzz import Fuzzer, fault
from tests.models.clients import CLIENTS, Answer, Client, Mode, Tool
from tests.server.process import MODEL, Server, running_server
from tests.short_model import add_short_model, room_for
from tests.waiting import HANG, wait_until

AGENTS = 64
TENANTS = ("alice", "bob", "carol")
LONG_ENOUGH = 520
"""Tokens after which an agent begins another conversation."""
OPENING = 150
"""Words of a first question, each a token or two, so that a conversation has 250 tokens from its start."""
KV_TOKENS = AGENTS * 250 // 4
"""Memory for a quarter of all conversations when they are shortest."""
OPTIONS = ("--kv-memory", room_for(KV_TOKENS), "--response-cache-memory", "1MiB")
SYSTEM = "You are one of many agents in a harbour, and answer in a few words. " * 2
TOOLS = (
    Tool("tide", "The tide at an hour", {"type": "object", "properties": {"hour": {"enum": [3, 9, 15, 21]}}}),
    Tool("signal", "Hoist a flag", {"type": "object", "properties": {"flag": {"enum": ["red", "blue"]}}}),
)
SHOWN = ("slipstream_kv", "slipstream_memory", "process_", "slipstream_state", "slipstream_sessions")
"""Metrics of memory and what holds it."""
RESIDENT = "process_resident_memory_bytes"
CUT_OFF = ("length", "incomplete", "max_tokens")
"""How protocols say that an answer met its limit."""
FRESH = {"reuse": False, "speculation": False, "jump_forward": False, "response_cache": False}


@dataclass
class Asked:
    """A request that was answered, and what it has to be answered with each time."""

    client: Client
    messages: list[Any]
    mode: Mode
    limit: int
    said: tuple[Any, ...]


@dataclass
class Tally:
    """What all agents did together."""

    goes_on: Callable[[int], bool]
    """Whether there is to be another turn, after so many."""
    vanishes: bool = False
    """Whether the server may be gone at any time, which ends an agent's work."""
    answered: list[Asked] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _turns: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def another(self) -> bool:
        """Whether an agent is to take another turn, which is counted then."""
        with self._lock:
            self._turns += 1
            return not self.faults and self.goes_on(self._turns - 1)

    def add(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)


class Agent:
    """One agent with one conversation at a time; every other one names its session."""

    _client: Client
    _http: httpx.Client

    def __init__(self, number: int, seed: int) -> None:
        self.tenant = TENANTS[number % len(TENANTS)]
        self.protocol = list(CLIENTS)[number // len(TENANTS) % len(CLIENTS)]
        self._number = number
        self._conversations = 0
        self._random = random.Random(seed * AGENTS + number)
        self._fuzzer = Fuzzer(seed * AGENTS + number)
        self._messages: list[Any] = []
        self._new: list[Any] = []
        self._seen: list[Answer] = []
        """The answers of this conversation."""

    @property
    def _name(self) -> str | None:
        """The session of this conversation: a next one's first message may count as new in it."""
        return f"agent-{self._number}-{self._conversations}" if self._number % 2 else None

    def connect(self, client: Client, http: httpx.Client) -> None:
        """Talk to this server from now on."""
        self._client, self._http = client, http

    def work(self, tally: Tally) -> None:
        """Turn after turn; what goes wrong ends all agents."""
        try:
            while tally.another():
                kind = self._random.random()
                if kind < 0.05:
                    self._talk_nonsense(tally)
                elif kind < 0.15:
                    self._leave()
                    tally.add(left=1)
                else:
                    self._turn(tally)
        except Exception as error:
            if not (tally.vanishes and _is_broken_connection(error)):
                tally.faults.append(traceback.format_exc())

    def check(self) -> None:
        """Find all answers of this conversation in its session."""
        if not self._seen:
            return
        response = self._http.get(f"/v1/sessions/{self._seen[-1].report['session_id']}")
        assert response.status_code == 200, response.text
        kept = [message for message in response.json()["messages"] if message["role"] == "assistant"]
        assert len(kept) >= len(self._seen), "an answer is lost"
        for message, answer in zip(kept, self._seen, strict=False):
            whole = answer.ended not in CUT_OFF
            calls = [(call.name, _parsed(call.arguments) if whole else None) for call in answer.calls]
            assert _said(message, whole=whole) == (answer.text, calls), "what was answered is lost"

    def _talk_nonsense(self, tally: Tally) -> None:
        status, wrong = fault(self._http, self._fuzzer.request())
        assert wrong is None or (tally.vanishes and not status), (status, wrong)
        tally.add(nonsense=1, **{f"status {status // 100}xx": 1})

    def _turn(self, tally: Tally) -> None:
        mode: Mode = "required" if self._random.random() < 0.4 else "auto"
        limit, messages = self._random.randrange(12, 24), [*self._messages, *self._next()]
        answer = self._ask(messages, mode, limit)
        tally.answered.append(Asked(self._client, messages, mode, limit, answer.said))
        tally.add(turns=1, reused=answer.report["reused_tokens"], computed=answer.report["delta_tokens"])
        self._messages, self._new = messages + answer.as_message, []
        self._seen.append(answer)
        if answer.report["prompt_tokens"] > LONG_ENOUGH:
            self._messages, self._seen = [], []
            self._conversations += 1
        elif answer.calls:
            self._new = self._client.results(answer.calls, ["high water"] * len(answer.calls))

    def _next(self) -> list[Any]:
        """The messages to send next: a question, unless there are results of calls."""
        if not self._new:
            self._new = self._client.question(self._words(8 if self._messages else OPENING))
        return self._new

    def _ask(self, messages: list[Any], mode: Mode, limit: int) -> Answer:
        """An answer, as soon as the session has no other turn, such as one that nobody waits for any more."""
        answers: list[Answer] = []
        stream = self._random.random() < 0.5

        def answered() -> bool:
            try:
                answers.append(self._client.ask(messages, mode, stream=stream, limit=limit, session_id=self._name))
            except (openai.APIStatusError, anthropic.APIStatusError) as error:
                if error.status_code != 409:
                    raise
            return bool(answers)

        wait_until(answered)
        return answers[0]

    def _leave(self) -> None:
        """Ask, and go away in the middle of the answer or before it."""
        messages = [*self._messages, *self._next()]
        path, body = self._client.request(messages, "auto", limit=100, session_id=self._name)
        with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code in (200, 409), response.read()
            for _, _line in zip(range(self._random.randrange(8)), response.iter_lines(), strict=False):
                pass

    def _words(self, count: int) -> str:
        return " ".join(self._random.choice(("ship", "lamp", "rope", "salt", "nine", "gull")) for _ in range(count))


def _is_broken_connection(error: Exception) -> bool:
    """Whether a connection broke; in the middle of a stream, clients pass on errors of their own transport."""
    if isinstance(error, openai.APIConnectionError | anthropic.APIConnectionError):
        return True
    return any(kind.__name__ == httpx.TransportError.__name__ for kind in type(error).__mro__)


def crew(seed: int) -> list[Agent]:
    """All agents."""
    return [Agent(number, seed) for number in range(AGENTS)]


def _said(message: dict[str, Any], *, whole: bool) -> tuple[str, list[tuple[str, Any]]]:
    """What a message of a session says. Clients make various things of arguments that were cut off."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return message["content"] or "", [(call["name"], _parsed(call["arguments"]) if whole else None) for call in calls]


def _parsed(arguments: str) -> Any:
    """A call's arguments; of one that was cut off, Anthropic's client has none."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


@dataclass
class Harbour:
    """A server with keys for all tenants."""

    server: Server
    keys: dict[str, str]
    log: Path

    def http(self, tenant: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=HANG, limits=httpx.Limits())

    def connect(self, agents: list[Agent]) -> None:
        """Have agents talk to this server, those of a tenant and protocol by one client."""
        https = {tenant: self.http(tenant) for tenant in TENANTS}
        clients = {
            (tenant, protocol): make(self._as(tenant), MODEL, SYSTEM, TOOLS, ())
            for tenant in TENANTS
            for protocol, make in CLIENTS.items()
        }
        for agent in agents:
            agent.connect(clients[agent.tenant, agent.protocol], https[agent.tenant])

    def soak(self, agents: list[Agent], tally: Tally) -> Tally:
        """Let all agents work at the same time, until the tally ends; raises `AssertionError` at the first fault."""
        self.connect(agents)
        threads = [threading.Thread(target=agent.work, args=(tally,)) for agent in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        complaints = [line for line in self.log.read_text().splitlines() if " INFO " not in line]
        assert not tally.faults, "\n".join([*tally.faults[:3], *complaints[:100]])
        assert "Traceback" not in "".join(complaints)
        return tally

    def errors(self) -> list[str]:
        """The metrics of answers that were a server's error."""
        names = [name for name in self.server.metrics() if name.startswith("slipstream_http_requests_total")]
        return [name for name in names if name.split()[-1].startswith("5")]

    def forget_everything(self) -> dict[str, float]:
        """Delete all sessions, and have one request take all of the memory; the metrics afterwards."""
        self.server.wait_until_settled()
        for tenant in TENANTS:
            with self.http(tenant) as http:
                forget_sessions(http)
        with self.http(TENANTS[0]) as http:
            room = http.get("/health").json()["kv_tokens"] - 2
            body = {"prompt": [5] * room, "max_tokens": 2, "slipstream": {"reuse": False}}
            response = http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
        return self.server.wait_until_settled()

    def _as(self, tenant: str) -> Server:
        return Server(self.server.process, self.server.url, self.keys[tenant])


def forget_sessions(http: httpx.Client) -> None:
    """Delete all sessions of a tenant."""
    while listed := http.get("/v1/sessions").json()["data"]:
        for each in listed:
            assert http.delete(f"/v1/sessions/{each['id']}").status_code == 200


def compile_copies(http: httpx.Client, log: Path) -> None:
    """Have a small model's copies compiled for all small steps, which take memory for good; see `OpenVINOBackend`."""

    def complete(choices: int, tokens: int) -> None:
        alone = {"reuse": False, "speculation": False, "response_cache": False}
        body = {"prompt": [5], "n": choices, "ignore_eos": True, "max_tokens": tokens, "slipstream": alone}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text

    def compiled() -> bool:
        complete(1, 4)  # a step takes the copy that is ready, and the next one has another begun
        lines = log.read_text()
        return lines.count("compiling a copy of the model") == lines.count("run on a copy of the model now")

    for choices in range(1, 17):
        complete(choices, 204)
    wait_until(compiled)


@contextmanager
def harbour(folder: Path) -> Iterator[Harbour]:
    """A server for all of this, which keeps its keys, state and log in a folder."""
    file, log = folder / "keys.toml", folder / "log"
    keys = {tenant: add_key(file, tenant) for tenant in TENANTS}
    operator = add_key(file, "harbour", operator=True)
    options = ("--api-keys-file", str(file), "--state-dir", str(folder / "state"), *OPTIONS)
    with running_server(*options, log=log) as server:
        server.api_key = operator
        yield Harbour(server, keys, log)


def compare(answered: list[Asked]) -> None:
    """Ask everything again, a few at a time, computed from nothing; raises `AssertionError` for another answer."""

    def check(asked: Asked) -> None:
        fresh = asked.client.ask(asked.messages, asked.mode, stream=False, limit=asked.limit, **FRESH)
        assert fresh.said == asked.said, (asked.messages, fresh.said, asked.said)

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(check, answered):
            pass


def soak_for(seconds: float, seed: int, folder: Path) -> None:
    """Soak a server for so long, compare all answers, and print what was done and what memory was taken.

    Raises `AssertionError` unless memory is as it was, but for a tenth of what the process takes, or soon is.
    """
    print(f"seed {seed}")
    with harbour(folder) as place:
        place.soak(crew(seed + 1), Tally(lambda turns: turns < 3 * AGENTS))
        with place.http(TENANTS[0]) as http:
            compile_copies(http, place.log)
        before = place.forget_everything()
        end = time.monotonic() + seconds
        tally = place.soak(crew(seed), Tally(lambda _: time.monotonic() < end))
        print(dict(tally.counts), flush=True)
        compare(tally.answered)
        assert not place.errors()
        place.forget_everything()
        after = place.server.wait_for(lambda metrics: metrics[RESIDENT] < 1.1 * before[RESIDENT])  # soon after
    for name in sorted(before):
        if name.startswith(SHOWN):
            print(f"{name}: {before[name]:,.0f} before, {after[name]:,.0f} after")
    assert after["slipstream_kv_free_tokens"] == before["slipstream_kv_free_tokens"]
    assert after["slipstream_sessions"] == after["slipstream_state_bytes"] == 0


def main() -> None:
    """Soak a server of the short model for as many seconds as the command line says."""
    seconds, *rest = sys.argv[1:]
    whole = ModelStore().ensure(DEFAULT_MODEL)
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_HOME", home)
        add_short_model(Path(home), whole)
        soak_for(float(seconds), int(rest[0]) if rest else random.randrange(2**32), Path(home))


if __name__ == "__main__":
    main()
