"""A conversation of 131,072 tokens, through a server: as attention written out says, and the same when computed afresh.

The model has one layer, so that a position's logits follow from all tokens in time that grows with their number alone,
and sharp attention, so that they depend on few of them, wherever these are. Its rotation is YaRN's, from 32,768 tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from slipstream.models import ModelStore
from slipstream.types import FloatArray, IntArray
from slipstream_bench.random_models import add_vocabulary
from tests.server.process import Server, running_server

pytestmark = pytest.mark.long

CONTEXT = 131_072
ANSWER = 8
"""Tokens."""
HIDDEN, HEAD, VOCABULARY = 64, 32, 49_152
BASE, BEFORE = 1e6, 32_768
EPSILON = 1e-6
SHARPNESS = 4.0
"""What each element of queries and keys is about as large as; their products come to the square of it."""
CLOSE = 0.05
"""In the logarithm of a probability, of the five likeliest tokens: keys and values are rounded to 16 bits."""


@dataclass(frozen=True)
class Weights:
    """Those of the only layer, [out, in], and of the vocabulary."""

    embedding: FloatArray
    query: FloatArray
    key: FloatArray
    value: FloatArray
    output: FloatArray
    gate: FloatArray
    up: FloatArray
    down: FloatArray


@pytest.fixture(scope="module")
def weights() -> Weights:
    random = np.random.default_rng(5)

    def drawn(rows: int, columns: int) -> FloatArray:
        matrix: FloatArray = (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        return matrix

    return Weights(
        embedding=np.float32(2) * drawn(VOCABULARY, HIDDEN),
        query=drawn(HEAD, HIDDEN),
        key=drawn(HEAD, HIDDEN),
        value=drawn(HEAD, HIDDEN),
        output=drawn(HIDDEN, HEAD),
        gate=drawn(HIDDEN, HIDDEN),
        up=drawn(HIDDEN, HIDDEN),
        down=drawn(HIDDEN, HIDDEN),
    )


@pytest.fixture(scope="module")
def path(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(BASE)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(CONTEXT / BEFORE)
    writer.add_rope_scaling_orig_ctx_len(BEFORE)
    add_vocabulary(writer, VOCABULARY)
    ones = np.ones(HIDDEN, np.float32)
    tensors = {
        "token_embd": weights.embedding,
        "output_norm": ones,
        "blk.0.attn_norm": ones,
        "blk.0.ffn_norm": ones,
        "blk.0.attn_q_norm": np.full(HEAD, SHARPNESS, np.float32),
        "blk.0.attn_k_norm": np.full(HEAD, SHARPNESS, np.float32),
        "blk.0.attn_q": weights.query,
        "blk.0.attn_k": weights.key,
        "blk.0.attn_v": weights.value,
        "blk.0.attn_output": weights.output,
        "blk.0.ffn_gate": weights.gate,
        "blk.0.ffn_up": weights.up,
        "blk.0.ffn_down": weights.down,
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tokens() -> list[int]:
    drawn: list[int] = np.random.default_rng(6).integers(1000, VOCABULARY, CONTEXT).tolist()
    return drawn


def test_agrees_with_attention_written_out_and_with_itself_afresh(
    weights: Weights, path: Path, tokens: list[int], tmp_path: Path
) -> None:
    whole, name = CONTEXT - ANSWER, ModelStore(tmp_path).ensure(str(path)).name
    store = {"SLIPSTREAM_HOME": str(tmp_path)}
    with running_server("--kv-memory", "32MiB", model=name, environment=store) as server:
        # Grown, forked from an earlier place, and grown again to the very end.
        for length, known in ((40_000, 0), (100_000, 40_000), (70_001, 70_000), (whole, 100_000)):
            grown = _answered(server, name, tokens[:length])
            assert grown["usage"]["prompt_tokens_details"]["cached_tokens"] == known
            _assert_close(grown, _logarithms(weights, np.array(tokens[:length], np.int32)))
    with running_server("--kv-memory", "32MiB", model=name, environment=store) as server:
        afresh = _answered(server, name, tokens[:whole])
    assert afresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert afresh["choices"] == grown["choices"]


def _answered(server: Server, model: str, prompt: list[int]) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER, "logprobs": 5, "temperature": 0, "ignore_eos": True}
    with server.http() as http:
        answer: dict[str, Any] = http.post("/v1/completions", json=body).raise_for_status().json()
    return answer


def _assert_close(answer: dict[str, Any], logarithms: FloatArray) -> None:
    """The likeliest first tokens are as likely as they should be."""
    found = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
    assert len(found) == 5
    assert np.abs(found - np.sort(logarithms)[:-6:-1]).max() < CLOSE


def _logarithms(weights: Weights, tokens: IntArray) -> FloatArray:
    """What the model says after the last of these tokens: logarithms of probabilities, [vocabulary]."""
    stream = weights.embedding[tokens]
    x, last = _normed(stream), stream[-1]
    keys = _turned(SHARPNESS * _normed(x @ weights.key.T), np.arange(len(tokens), dtype=np.int32)).astype(np.float16)
    values = (x @ weights.value.T).astype(np.float16)
    query = _turned(SHARPNESS * _normed(x[-1:] @ weights.query.T), np.array([len(tokens) - 1], np.int32))
    scores = keys.astype(np.float64) @ query[0] * HEAD**-0.5
    likely = np.exp(scores - scores.max())
    last = last + weights.output @ (likely / likely.sum() @ values.astype(np.float64))
    x = _normed(last)
    gate = weights.gate @ x
    last = last + weights.down @ (gate / (1 + np.exp(-gate)) * (weights.up @ x))
    logits = weights.embedding @ _normed(last)
    found: FloatArray = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    return found


def _normed(x: FloatArray) -> FloatArray:
    found: FloatArray = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + EPSILON)
    return found


def _turned(x: FloatArray, positions: IntArray) -> FloatArray:
    """With the two halves of each row turned by its position: YaRN (arXiv 2309.00071)."""
    factor, pairs = CONTEXT / BEFORE, np.arange(HEAD // 2)
    low, high = (HEAD * np.log(BEFORE / (turns * 2 * np.pi)) / (2 * np.log(BASE)) for turns in (32, 1))
    ramp = np.clip((pairs - np.floor(low)) / (np.ceil(high) - np.floor(low)), 0, 1)
    frequencies = BASE ** (-2 * pairs / HEAD) * (1 - ramp + ramp / factor)
    angles = positions[:, None] * frequencies
    cos, sin = ((1 + 0.1 * np.log(factor)) * each(angles) for each in (np.cos, np.sin))
    left, right = x[:, : HEAD // 2], x[:, HEAD // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)
