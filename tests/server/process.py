"""A real server in a process of its own, and a look at its metrics."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

from tests.short_model import room_for
from tests.waiting import HANG, wait_until

MODEL = "smollm2-135m"
_SAMPLE = re.compile(r"^([\w:]+)(?:{(.*)})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    api_key: str = "none"
    greeting: str = ""
    """What it printed when it was ready."""

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=HANG)

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=HANG)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=HANG)

    def metrics(self) -> dict[str, float]:
        """Values by sample name and labels' values, by the labels' names: `slipstream_choices_total stop`."""
        with self.http() as http:
            samples = _SAMPLE.findall(http.get("/metrics").text)
        return {
            " ".join([name, *(value for _, value in sorted(_LABEL.findall(labels)))]): float(value)
            for name, labels, value in samples
        }

    def wait_for(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The metrics, once they meet the condition."""
        metrics: dict[str, float] = {}

        def met() -> bool:
            metrics.update(self.metrics())
            return condition(metrics)

        wait_until(met)
        return metrics

    def wait_until_idle(self) -> dict[str, float]:
        """The metrics, once no answer is under way or about to be."""
        return self.wait_for(
            lambda metrics: metrics["slipstream_choices_running"] == metrics["slipstream_choices_waiting"] == 0
        )

    def wait_until_settled(self) -> dict[str, float]:
        """The metrics, once nothing is computed ahead of time any more either."""
        self.wait_until_idle()
        self.wait_for(lambda metrics: metrics["slipstream_idle_waiting"] == 0)
        return self.wait_until_idle()

    def wait_for_end(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(HANG)


@contextmanager
def running_server(
    *options: str,
    model: str = MODEL,
    api_key: str | None = None,
    log: Path | None = None,
    command: Sequence[str] = (sys.executable, "-m", "slipstream"),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """`slipstream serve` on a free port; what it logs is added to the file `log`, if there is one."""
    command = [*command, "serve", "--model", model, "--port", "0", "--kv-memory", room_for(11_600), *options]
    if api_key is not None:
        command += ["--api-key", api_key]
    with log.open("a") if log is not None else nullcontext() as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **environment}
        )
    try:
        url, greeting = _greeting(process, Path(model).name)
        yield Server(process, url, api_key or "none", greeting)
    finally:
        process.terminate()
        try:
            process.wait(HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _greeting(process: subprocess.Popen[str], model: str) -> tuple[str, str]:
    """Where the server is, and the whole line that says so."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(rf"Slipstream serves {re.escape(model)} on (http://\S+)", line):
            return match[1], line
    raise AssertionError(f"the server ended with status {process.wait()} before it was ready")


def assert_reused(turn: Any, before: Any) -> None:
    """That a turn computed nothing again of the turn before; of its own, the first few tokens may be there already."""
    ahead = turn.usage.prompt_tokens_details.cached_tokens - before.usage.total_tokens
    assert 0 <= ahead <= 12, f"{ahead} tokens more than the turn before"
