"""The torch backend on plain operators: the contract of a backend, exactness, and agreement with `transformers`."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slipstream import EngineConfig
from slipstream.backend import Chunk
from slipstream.backend.paged import PagedBackend
from slipstream.backend.torch.backend import TorchBackend
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.plain import PlainOperators
from slipstream.errors import ModelError
from slipstream.models import Model
from slipstream.runtime import BACKENDS
from slipstream.types import IntArray
from tests.conformance.backends import check_backend
from tests.engine import exactness
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS

pytestmark = pytest.mark.torch
each = pytest.mark.parametrize("tiny", ARCHITECTURES, indirect=True)
and_others = pytest.mark.parametrize("tiny", [*ARCHITECTURES, *OTHERS], indirect=True)


def backend_of(model: Model, **options: Any) -> PagedBackend[Any]:
    config = EngineConfig.model_validate({"kv_memory": "16MiB"} | options)
    backend = BACKENDS[model.weights](model, config)(lambda _: None)
    assert isinstance(backend, PagedBackend)
    return backend


def random_tokens(count: int, *, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(17, 49_000, count).astype(np.int32)


@and_others
def test_logits_are_those_of_transformers(tiny: Model) -> None:
    tokens = random_tokens(300)  # more than one segment
    reference = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = reference.eval()(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    backend = backend_of(tiny)
    found = []
    state = backend.store.open(len(tokens))
    for part in (tokens[:100], tokens[100:]):
        ticket = backend.launch([Chunk(state, part, len(part))])
        ticket.wait()
        found.append(ticket.logits)
    error = np.abs(np.concatenate(found) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@each
def test_it_is_a_backend(tiny: Model) -> None:
    backend = backend_of(tiny)
    assert backend.exact
    check_backend(backend, seed=1, longest=90, rounds=3)


@each
def test_the_same_tokens_whatever_happens(tiny: Model) -> None:
    assert exactness.run(8, 3, tiny, longest=320) >= 8


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_saved_state_is_read_back(tiny: Model) -> None:
    backend = backend_of(tiny)
    tokens = random_tokens(70)
    state = backend.store.open(80)
    backend.launch([Chunk(state, tokens, 1)]).wait()
    blob = backend.store.export(state, 0, 64)
    copy = backend.store.open(80)
    backend.store.install(copy, 64, blob)
    assert np.array_equal(backend.store.export(copy, 0, 64), blob)
    logits = []
    backend.store.rewind(state, 64)
    for each_state in (state, copy):
        ticket = backend.launch([Chunk(each_state, tokens[64:], 2)])
        ticket.wait()
        logits.append(ticket.logits.copy())
    assert np.array_equal(*logits)


class ByPlace(PlainOperators):
    """Operators whose results depend on where in a step a token stands."""

    name = "by place"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = super().linear(x, weight, bias)
        places = torch.arange(found.numel() // found.shape[-1], dtype=found.dtype) * 1e-3
        return found + places.view(*found.shape[:-1], 1)


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_the_next_operators_are_taken_if_the_first_are_not_exact(tiny: Model) -> None:
    model = TorchModel.load(tiny.path, torch.device("cpu"), ByPlace())
    backend = TorchBackend(model, [ByPlace()], kv_memory=2**24)
    assert not backend.exact
    backend = TorchBackend(model, [ByPlace(), PlainOperators()], kv_memory=2**24)
    assert backend.exact
    assert model.operators.name == PlainOperators.name


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_a_gpu_that_is_not_there(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="--device cpu"):
        backend_of(tiny, device="cuda")
