"""Products of the same rows are one, and what a class does with their parts is the same as before."""

import gc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slipstream.backend.torch import joined
from slipstream.backend.torch.hooks import computing
from slipstream.backend.torch.kernel_operators import KernelOperators, UnfusedOperators
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Activation
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.quantised import Quantised, Weight, pack
from tests.torch_backend.running import logits_of, of_folder, step
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS, tiny_folder

pytestmark = pytest.mark.torch
KERNELS, PLAIN = KernelOperators(), PlainOperators()
CPU = torch.device("cpu")
BY_TANH = partial(F.gelu, approximate="tanh")
OF_EXPERTS = {"qwen3_moe", "gpt_oss"}
"""Architectures none of whose layers have a gate beside their experts'."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Counting(PlainOperators):
    """Operators that count products by how many rows their weight has, and gates."""

    def __init__(self) -> None:
        self.products: Counter[int] = Counter()
        self.gates = 0

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.products[weight.shape[0]] += 1
        return super().linear(x, weight, bias)

    def gate(self, given: Activation, x: torch.Tensor) -> torch.Tensor:
        self.gates += 1
        return super().gate(given, x)


def model_of(folder: Path, operators: PlainOperators) -> TorchModel:
    return of_folder(folder, operators, torch.float32)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_every_class_has_one_product_for_each_of_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counting = tiny_folder(tmp_path, name, vocabulary=320), Counting()
    model = model_of(folder, counting)
    layers = model._model.config.num_hidden_layers
    counting.products.clear()
    counting.gates = 0
    found = logits_of(model)
    attention = (4 + 2 + 2) * 16
    assert counting.products[attention] == layers
    assert counting.products[64] >= layers, "what attention gives"
    assert not counting.products[32], "keys and values alone"
    if name not in OF_EXPERTS:
        assert counting.products[2 * 96] == (1 if name == "glm4_moe" else layers)
        assert counting.gates >= layers
    monkeypatch.setattr("slipstream.backend.torch.model.join", lambda _: None)
    torch.testing.assert_close(found, logits_of(model_of(folder, PLAIN)), rtol=1e-4, atol=1e-5)


def test_weights_take_no_more_memory_and_nothing_is_kept_of_a_step(tmp_path: Path) -> None:
    model = model_of(tiny_folder(tmp_path, "llama", vocabulary=320), PLAIN)
    attention = model._model.model.layers[0].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1
    logits_of(model)
    gc.collect()
    products = [each for each in gc.get_objects() if type(each) is joined._Joined]
    assert products
    assert all(each._x is None and not each._parts for each in products)


class Pair(nn.Module):  # type: ignore[misc]
    """A class that has a gate and what it gates."""

    device = CPU

    def __init__(self, *, bias: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(48, 80, bias=each) for each in bias)
        self.requires_grad_(False)


def test_parts_belong_to_their_rows() -> None:
    pair, x, other = Pair(), random(1, 20, 48), random(1, 20, 48, seed=1)
    expected = {(part, rows): getattr(pair, part)(rows) for part in ("gate_proj", "up_proj") for rows in (x, other)}
    joined.join(pair)
    counting = Counting()
    with computing(counting, step(), torch.empty(0), []):
        for part, rows in (("up_proj", x), ("gate_proj", x), ("gate_proj", x), ("gate_proj", other), ("up_proj", x)):
            torch.testing.assert_close(getattr(pair, part)(rows), expected[part, rows])
    assert counting.products == {160: 4}


@pytest.mark.parametrize("case", ["bias of one", "codes of one", "codes in another order"])
def test_products_that_are_not_alike_stay_apart(case: str) -> None:
    pair = Pair(bias=(True, case != "bias of one"))
    order = torch.randperm(48) if case == "codes in another order" else None
    if case.startswith("codes"):
        for product in (pair.gate_proj, pair.up_proj)[: 1 + (order is not None)]:
            del product.weight
            product.weight = codes(80, order)
    joined.join(pair)
    assert "forward" not in vars(pair.gate_proj)
    assert "forward" not in vars(pair.up_proj)


def codes(n: int, order: torch.Tensor | None = None) -> Quantised:
    numbers = pack(torch.randint(0, 16, (n, 48)))
    return Quantised.of_codes("int4", numbers, torch.rand(n, 3), 16, torch.full((n, 3), 8, dtype=torch.int8), order)


def test_quantised_products_are_joined_and_their_parts_given_back() -> None:
    pair, x = Pair(), random(1, 20, 48)
    weights = codes(80), codes(80)
    for product, weight in zip((pair.gate_proj, pair.up_proj), weights, strict=True):
        del product.weight
        product.weight = weight
    joined.join(pair)
    assert not hasattr(pair.gate_proj, "weight"), "it would be there twice"
    with computing(PLAIN, step(), torch.empty(0), []):
        found = pair.gate_proj(x), pair.up_proj(x)
    for part, product, weight in zip(found, (pair.gate_proj, pair.up_proj), weights, strict=True):
        torch.testing.assert_close(part, PLAIN.linear(x, weight, product.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off
@pytest.mark.parametrize("function", [F.silu, BY_TANH, F.gelu])
def test_gates(function: Any, dtype: torch.dtype) -> None:
    both = (2 * random(1, 5, 2 * 1100)).to(dtype)
    x, factor = both.chunk(2, -1)  # parts of one product
    options = {"approximate": "tanh"} if function is BY_TANH else {}
    given = Activation(F.gelu if function is BY_TANH else function, x, options)
    expected = function(x) * factor
    assert torch.equal(UnfusedOperators().gate(given, factor), expected)
    torch.testing.assert_close(KERNELS.gate(given, factor), expected)
    if function is F.gelu:  # by torch
        return
    row = Activation(given.function, x[:, 2:3], options)
    assert torch.equal(KERNELS.gate(row, factor[:, 2:3]), KERNELS.gate(given, factor)[:, 2:3])


def test_an_activation_waits_for_what_it_gates_and_for_nothing_else() -> None:
    a, b, counting = random(1, 3, 16), random(1, 3, 16, seed=1), Counting()
    activated = F.silu(a)
    with computing(counting, step(), torch.empty(0), []):
        found = [F.silu(a) * b, b * F.gelu(a, approximate="tanh")]
        assert counting.gates == 2
        others = [F.silu(a) * 2, F.silu(a) * b[:, :1], F.silu(a) * b.double(), F.silu(a) + b, (a + b) * b]
        last = F.silu(a)
    assert counting.gates == 2
    expected = [activated * 2, activated * b[:, :1], activated * b.double(), activated + b, (a + b) * b]
    for one, other in zip(found, (activated * b, b * BY_TANH(a)), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip([*others, last], [*expected, activated], strict=True):
        torch.testing.assert_close(one, other)
