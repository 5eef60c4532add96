"""vLLM and SGLang on the GPU that is checked: the same weights in one folder, the same agents, the same answers.

They are not installed here, since each wants a torch of its own: whatever Python has them is used. A grammar of the
answer's tokens, one by one, has them give the answer that is prescribed, so each token costs them a pass and a mask, as
it does Slipstream without forced tokens and drafts.
"""

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.models import Model
from slipstream.tokenizer import Tokenizer
from slipstream_bench.client import Agent, Client, TurnFailedError
from slipstream_bench.coding import coding_script
from slipstream_bench.peers.base import Endpoint, PeerError
from slipstream_bench.peers.export import export_tokenizer
from slipstream_bench.peers.process import free_port, server_process
from slipstream_bench.records import TurnResult

_VERSION = "from importlib.metadata import version; print(version({!r}))"


@dataclass(frozen=True, slots=True)
class GPUPeer:
    """How a server is started, and how it takes a grammar."""

    name: str
    """Of its package."""
    module: str
    model_flag: str
    flags: tuple[str, ...]
    grammar_field: str
    grammar: Callable[[str], Any]
    """What the field holds for a grammar in Lark's syntax."""

    def command(self, python: Path, folder: Path, port: int) -> list[str]:
        """How its process is started."""
        where = [self.model_flag, str(folder), "--served-model-name", "random", "--host", "127.0.0.1"]
        return [str(python), "-m", self.module, *where, "--port", str(port), *self.flags]


PEERS = (
    GPUPeer(
        "vllm",
        "vllm.entrypoints.openai.api_server",
        "--model",
        (
            *("--max-model-len", "16384", "--enable-prompt-tokens-details"),
            *("--structured-outputs-config", '{"backend": "guidance"}'),
        ),
        "structured_outputs",
        lambda grammar: {"grammar": grammar},
    ),
    GPUPeer(
        "sglang",
        "sglang.launch_server",
        "--model-path",
        ("--context-length", "16384", "--enable-cache-report", "--grammar-backend", "llguidance"),
        "ebnf",
        lambda grammar: grammar,
    ),
)
"""With their defaults: prefixes are cached, small steps are CUDA graphs. Nothing is drafted."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A peer, the Python that has it, and its version."""

    peer: GPUPeer
    python: Path
    version: str

    @property
    def name(self) -> str:
        """As in results."""
        return f"{self.peer.name} {self.version}"


def find(peer: GPUPeer, given: Path | None = None) -> Installed | None:
    """A peer where it is installed: in the Python that is given, in this one, or beside its program on the path."""
    program = shutil.which(peer.name)
    beside = [Path(program).resolve().parent / "python"] if program is not None else []
    for python in [given] if given is not None else [Path(sys.executable), *beside]:
        try:
            asked = subprocess.run(
                [str(python), "-c", _VERSION.format(peer.name)], capture_output=True, text=True, check=False
            )
        except OSError:
            continue
        if asked.returncode == 0:
            return Installed(peer, python, asked.stdout.strip())
    return None


def write_folder(module: Any, model: Model, folder: Path) -> None:
    """A model of `transformers` with the tokenizer and template of one of the store, as model hubs have it."""
    module.save_pretrained(folder)
    export_tokenizer(model, folder)


@contextmanager
def serving(installed: Installed, folder: Path, tokenizer: Tokenizer, *, timeout: float) -> Iterator[Endpoint]:
    """The server, ready to answer; raises `PeerError`."""
    port, peer = free_port(), installed.peer

    def prescribed(body: Mapping[str, Any], answer: str) -> dict[str, Any]:
        tokens = " ".join(f"<[{token}]>" for token in tokenizer.encode(answer, begins=False))
        unconstrained = {name: value for name, value in body.items() if name != "response_format"}
        return {**unconstrained, peer.grammar_field: peer.grammar(f"start: {tokens}")}

    command, log = peer.command(installed.python, folder, port), folder / f"{peer.name}.log"
    with server_process(command, f"http://127.0.0.1:{port}/health", log, timeout=timeout) as group:
        yield Endpoint(f"http://127.0.0.1:{port}/v1", "random", group, installed.version, prescribed=prescribed)


def turns(endpoint: Endpoint, agents: int, count: int, seed: str) -> list[TurnResult]:
    """The turns of some agents that talk at once, each of another task; raises `PeerError` if an answer is wrong."""
    return asyncio.run(_turns(endpoint, agents, count, random.Random(seed)))


async def _turns(endpoint: Endpoint, agents: int, count: int, rng: random.Random) -> list[TurnResult]:
    async def follow(agent: Agent) -> list[TurnResult]:
        return [await agent.take(turn) for turn in range(agent.turns)]

    scripts = [coding_script(rng, count, lines=(1, 4)) for _ in range(agents)]
    async with Client(endpoint, response_cache=False) as client:
        following = [follow(client.agent(number, script, "prescribed")) for number, script in enumerate(scripts)]
        try:
            found = [result for results in await asyncio.gather(*following) for result in results]
        except TurnFailedError as error:
            raise PeerError(str(error)) from error
    for result in found:
        if not result.valid:
            raise PeerError(f"an answer was not the one that was prescribed: {result.answer!r}")
    return found
