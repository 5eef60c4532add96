"""GGUF import, judged by llama.cpp on the same files, at a few places of a prompt.

It is compiled once, which takes minutes; `LLAMA_SERVER=/path/to/llama-server` names one that is there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from slipstream.models import SILENT, Model
from slipstream.types import FloatArray
from slipstream_bench.peers.llama_server import LlamaServer
from slipstream_bench.peers.process import free_port, server_process
from tests.models.judged import FAMILIES, WINDOW
from tests.models.test_gguf import computed

pytestmark = pytest.mark.long

PLACES = (1, 40, 100, 160)
"""Tokens of the prompt: one, within a sliding window, and beyond it."""
CLOSE = 0.03
"""llama.cpp rounds what it multiplies to fewer bits than float32 in places: keys and values are 16 bits wide."""


@pytest.fixture(scope="session")
def binary(whole_model: Model) -> Path:
    if named := os.environ.get("LLAMA_SERVER"):
        return Path(named)
    peer = LlamaServer(whole_model)
    if not peer.environment.complete:
        peer.environment.create()
        peer.install(peer.environment, SILENT)
        peer.environment.mark_complete()
    return peer.binaries / "llama-server"


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_llama_cpps_probabilities(judged: Path, binary: Path, family: str, tmp_path: Path) -> None:
    path = judged / f"{family}.gguf"
    assert deviation_from_llama_cpp(binary, path, computed(path), tmp_path / "log") < CLOSE


def deviation_from_llama_cpp(binary: Path, path: Path, ours: FloatArray, log: Path) -> float:
    """The largest, among its ten likeliest tokens at each of a few places, of which the first must be ours as well."""
    tokens = np.load(path.with_suffix(".npz"))["tokens"].tolist()
    deviations = []
    with _serving(binary, path, log) as http:
        for start in PLACES:
            if path.stem == "phi" and start > WINDOW - _NEAR:
                continue  # llama.cpp says that it leaves out Phi's window
            place, first = next(
                (place, found[0])
                for place in range(start, start + _NEAR)
                if (found := _probabilities(http, tokens[:place]))
            )
            likeliest = {each["id"]: each["logprob"] for each in first["top_logprobs"]}
            assert len(likeliest) == 10
            assert ours[place - 1].argmax() == first["id"]
            deviations += [abs(ours[place - 1, id] - logarithm) for id, logarithm in likeliest.items()]
    return float(max(deviations))


_NEAR = 24
"""Places that are tried: it gives no probabilities for a token that ends the answer, or a character's first bytes."""


def _probabilities(http: httpx.Client, prompt: list[int]) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0, "cache_prompt": False}
    found: list[dict[str, Any]] = (
        http.post("/completion", json=body).raise_for_status().json().get("completion_probabilities", [])
    )
    return found


@contextmanager
def _serving(binary: Path, model: Path, log: Path) -> Iterator[httpx.Client]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "512", "--no-webui"]
    with server_process([*command, "-np", "1"], f"{url}/health", log), httpx.Client(base_url=url, timeout=600) as http:
        yield http
