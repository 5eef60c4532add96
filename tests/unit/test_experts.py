"""Mixtures of experts: who computes which token. Needs no model."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from slipstream.models.gguf.experts import mixture
from slipstream.models.gguf.families import Decoder, Family
from slipstream.models.gguf.parts import Parts
from slipstream.models.gguf.weights import Weights
from slipstream.types import FloatArray, IntArray

EXPERTS, USED, SIZE, INNER = 6, 2, 16, 24
SHUNNED = 4
"""The expert that no token is sent to, but those with a large last value."""


class Tensors:
    """Weights of a layer, by name."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.gate, self.up = (random.normal(size=(EXPERTS, INNER, SIZE)).astype(np.float32) for _ in range(2))
        self.down = random.normal(size=(EXPERTS, SIZE, INNER)).astype(np.float32)
        self.router = random.normal(size=(EXPERTS, SIZE)).astype(np.float32)
        self.router[:, -1] = 0
        self.router[SHUNNED] = 0
        self.router[SHUNNED, -1] = 1

    def array(self, name: str) -> None:
        assert name.endswith(".bias")

    def product(self, x: ov.Output, name: str) -> ov.Output:
        assert name == "blk.0.ffn_gate_inp.weight"
        return ops.matmul(x, self.router, False, True).output(0)

    def matrices(self, name: str) -> list[ov.Output]:
        values = getattr(self, name.removeprefix("blk.0.ffn_").removesuffix("_exps.weight"))
        return [ops.constant(each).output(0) for each in values]

    def expected(self, tokens: FloatArray) -> FloatArray:
        """What a mixture makes of tokens, [tokens, size]: every expert computed, most with no share."""
        scores = np.exp(tokens @ self.router.T)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :USED]
        shares = np.zeros_like(scores)
        np.put_along_axis(shares, chosen, np.take_along_axis(scores, chosen, 1), 1)
        shares /= shares.sum(axis=1, keepdims=True)
        total = np.zeros_like(tokens)
        for number in set(chosen.ravel().tolist()):
            gate = tokens @ self.gate[number].T
            hidden = gate / (1 + np.exp(-gate)) * (tokens @ self.up[number].T)
            total += shares[:, number : number + 1] * (hidden @ self.down[number].T)
        return total


class Layer:
    """A compiled mixture."""

    def __init__(self, tensors: Tensors) -> None:
        parts = Parts.__new__(Parts)
        decoder = SimpleNamespace(family=Family(), experts_used=USED, expert_scale=1.0)
        parts.decoder, parts.weights, parts.inputs = cast(Decoder, decoder), cast(Weights, tensors), {}
        x = ops.parameter([-1, 1, SIZE], np.float32)
        out = ops.result(mixture(parts, "blk.0.", x.output(0)))
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        model = ov.Model([out], [x, *parts.inputs.values()], "mixture")
        self._compiled = ov.Core().compile_model(model, "CPU", options)

    def __call__(self, tokens: FloatArray, is_real: IntArray | None = None) -> FloatArray:
        real = np.ones(len(tokens), np.int32) if is_real is None else is_real
        found = self._compiled([tokens[:, None], real])[0]
        return np.asarray(found)[:, 0].copy()


@pytest.fixture(scope="module")
def tokens() -> FloatArray:
    found = np.random.default_rng(1).normal(size=(40, SIZE)).astype(np.float32)
    found[:, -1] = -9
    return found


@pytest.mark.parametrize("count", [1, 5, 8, 23, 40])
def test_tokens_are_computed_by_those_that_they_are_sent_to(tokens: FloatArray, count: int) -> None:
    tensors = Tensors()
    assert Layer(tensors)(tokens[:count]) == pytest.approx(tensors.expected(tokens[:count]), rel=1e-4, abs=1e-4)


def test_an_expert_that_no_token_is_sent_to_is_not_computed(tokens: FloatArray) -> None:
    tensors = Tensors()
    expected = Layer(tensors)(tokens)
    tensors.down[SHUNNED] = np.nan
    layer = Layer(tensors)
    assert np.array_equal(layer(tokens), expected)
    sent = tokens.copy()
    sent[3, -1] = 9
    assert np.isnan(layer(sent)[3]).all(), "this one is sent there"


@pytest.mark.parametrize("count", [1, 8, 40])
def test_of_experts_with_one_score_the_first_are_chosen(tokens: FloatArray, count: int) -> None:
    tensors = Tensors()
    tensors.router[:] = 0
    assert Layer(tensors)(tokens[:count]) == pytest.approx(tensors.expected(tokens[:count]), rel=1e-4, abs=1e-4)


def test_padding_is_sent_nowhere(tokens: FloatArray) -> None:
    tensors = Tensors()
    tensors.down[SHUNNED] = np.nan
    padded, is_real = tokens[:16].copy(), np.ones(16, np.int32)
    padded[12:, -1], is_real[12:] = 9, 0
    found = Layer(tensors)(padded, is_real)
    assert found[:12] == pytest.approx(tensors.expected(tokens[:12]), rel=1e-4, abs=1e-4)
    assert not found[12:].any()
