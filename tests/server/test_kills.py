"""A server under load that is killed again and again, each time on the same state."""

import json
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.models import Model
from tests.server.process import MODEL, Server, running_server
from tests.server.test_persistence import go_on, session, user, wait_until_saved
from tests.short_model import room_for
from tests.soak import AGENTS, Tally, crew, harbour

SYSTEM = {"role": "system", "content": "You are one of many, and answer in a few words. " * 4}
OPTIONS = ("--kv-memory", room_for(1400))  # less than all conversations together
A_TURN = 64
"""Tokens of a turn, at most. With so little memory, its KV may be evicted before it is known what it belongs to."""
LONG_ENOUGH = 700
"""Tokens after which an agent starts anew."""


@dataclass
class Agent:
    """One conversation, and what of it the client has seen."""

    number: int
    random: random.Random
    name: str | None
    """Its session; one without a name sends everything each time, and is told."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tokens_saved: int = 0
    """So many were on disk when the load began."""

    @property
    def named(self) -> bool:
        return self.name is not None and self.name.startswith("agent")

    def talk(self, server: Server, stop: threading.Event, faults: list[str]) -> None:
        """Turn after turn until the server is gone, or nobody wants more."""
        try:
            with server.http() as http:
                while not stop.is_set():
                    self.turn(http)
        except httpx.TransportError:
            pass
        except Exception as fault:
            faults.append(repr(fault))

    def turn(self, http: httpx.Client) -> None:
        new = [user(f"{self.number}, tell me about {self.random.randrange(10**6)}.")]
        new = new if self.messages else [SYSTEM, *new]
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": new if self.named else [*self.messages, *new],
            "max_tokens": self.random.randrange(8, 17),
            **self.random.choice(({"temperature": 0}, {"temperature": 0.9}, {"temperature": 0.9, "seed": 3})),
            "stream": self.random.random() < 0.5,
        }
        headers = {"X-Session-Id": self.name or ""} if self.named else {}
        response = http.post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        if body["stream"]:
            *chunks, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            assert done == "[DONE]"
            pieces = [json.loads(chunk) for chunk in chunks]
            text = "".join(choice["delta"].get("content") or "" for piece in pieces for choice in piece["choices"])
            report = pieces[-1]["slipstream"]
        else:
            text, report = response.json()["choices"][0]["message"]["content"], response.json()["slipstream"]
        self.name = report["session_id"]
        self.messages += [*new, {"role": "assistant", "content": text}]

    def check(self, http: httpx.Client, *, all_saved: bool) -> None:
        """Find everything that was answered, and go on as if nothing had been."""
        if self.name is None or not (self.messages or http.get(f"/v1/sessions/{self.name}").is_success):
            return
        kept = session(http, self.name)["messages"]
        assert kept[: len(self.messages)] == self.messages, "what was answered is lost"
        report = go_on(http, self.name, named=self.named, new=[user("Go on.")])
        if all_saved:
            assert report["reused_tokens"] >= report["known"] - A_TURN, (self.name, report)
        assert report["reused_tokens"] >= self.tokens_saved, (self.name, report)

    def prepare(self, http: httpx.Client) -> None:
        """Agree with the server on where the conversation is; start anew if it is long."""
        self.tokens_saved = 0
        if self.name is None or not http.get(f"/v1/sessions/{self.name}").is_success:
            return
        known = session(http, self.name)
        self.messages, self.tokens_saved = known["messages"], known["tokens"]
        if known["tokens"] > LONG_ENOUGH:
            assert http.delete(f"/v1/sessions/{self.name}").status_code == 200
            self.messages, self.tokens_saved = [], 0
            self.name = self.name if self.named else None


def kill_again_and_again(folder: Path, rounds: int, seed: int) -> None:
    print(f"seed {seed}")
    chance, log = random.Random(seed), folder / "log"
    agents = [
        Agent(number, random.Random(seed + number), f"agent-{number}" if number < 5 else None) for number in range(7)
    ]
    all_saved = False
    for number in range(rounds + 1):
        started = time.monotonic()
        with running_server("--state-dir", str(folder / "state"), *OPTIONS, log=log) as server, server.http() as http:
            up = time.monotonic()
            listed = [each["id"] for each in http.get("/v1/sessions").json()["data"]]
            assert len(listed) == len(set(listed))
            for agent in agents:
                agent.check(http, all_saved=all_saved)
            if number == rounds:
                return
            wait_until_saved(server)
            for agent in agents:
                agent.prepare(http)
            checked = time.monotonic()

            stop, faults = threading.Event(), list[str]()
            threads = [threading.Thread(target=agent.talk, args=(server, stop, faults)) for agent in agents]
            for thread in threads:
                thread.start()
            time.sleep(load := chance.uniform(0.2, 3))
            if all_saved := number % 3 == 1:
                stop.set()
                for thread in threads:
                    thread.join()
                wait_until_saved(server)
            server.process.kill()
            server.process.wait()
            for thread in threads:
                thread.join()
            assert faults == []
            answered = sum(len(agent.messages) for agent in agents)
        assert "Traceback" not in log.read_text()
        times = f"start {up - started:.1f} s, check {checked - up:.1f} s, load {load:.1f} s"
        print(f"round {number}: {times}, {answered} messages", flush=True)


@pytest.mark.long
def test_killed_twice(model: Model, tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, rounds=2, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_again_and_again(model: Model, tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, rounds=20, seed=random.randrange(2**32))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_killed_twenty_times_under_the_load_of_all_agents(model: Model, tmp_path: Path) -> None:
    """Agents of three tenants and protocols, who go away and talk nonsense, too; what was answered them is there."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, agents = random.Random(seed), crew(seed)
    for number in range(21):
        with harbour(tmp_path) as place:
            place.connect(agents)
            for agent in agents:
                agent.check()
            most = chance.randrange(AGENTS, 3 * AGENTS)

            def goes_on(turns: int, most: int = most, server: Server = place.server) -> bool:
                if turns == most:
                    server.process.kill()
                return turns < most

            if number < 20:
                tally = place.soak(agents, Tally(goes_on, vanishes=True))
                print(f"round {number}: {dict(tally.counts)}", flush=True)
