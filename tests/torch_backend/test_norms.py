"""Norms and rotations: known in every class that is taken, with its bits; and as kernels, in Triton's interpreter."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slipstream.backend.torch import hooks
from slipstream.backend.torch.definitions import Norm, Rotation, norm_of, normed, rotated, rotation_of, tiled_mean
from slipstream.backend.torch.hooks import computing
from slipstream.backend.torch.kernel_operators import KernelOperators, UnfusedOperators
from slipstream.backend.torch.operators import Rotating
from slipstream.backend.torch.plain import PlainOperators
from tests.torch_backend.running import logits_of, of_folder, step
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS, tiny_folder

pytestmark = pytest.mark.torch
KERNELS, PLAIN = KernelOperators(), PlainOperators()
BLOCK = 32
NORMS = [Norm(1e-6, *flags) for flags in product((True, False), repeat=3)]
ROTATIONS = [
    Rotation(width, neighbours, by_pair, wide)
    for width, neighbours, by_pair, wide in product((24, 16), *[(False, True)] * 3)
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Counting(PlainOperators):
    """Operators that count the norms of sums, other norms, rotations, activations, and gates of their own kind."""

    def __init__(self) -> None:
        self.sums = self.others = self.rotations = self.activations = self.clamped = 0

    def norm(self, x: torch.Tensor, weight: torch.Tensor, norm: Norm, terms: Any = None) -> torch.Tensor:
        self.sums += terms is not None
        self.others += terms is None
        return super().norm(x, weight, norm, terms)

    def rotate(self, *given: Any) -> None:
        self.rotations += 1
        super().rotate(*given)

    def rotate_and_write(self, *given: Any) -> torch.Tensor:
        self.rotations += 1
        return super().rotate_and_write(*given)

    def gate_clamped(self, *given: Any) -> torch.Tensor:
        self.clamped += 1
        return super().gate_clamped(*given)

    def activate(self, *given: Any, **options: Any) -> torch.Tensor:
        self.activations += 1
        return super().activate(*given, **options)


def in_bfloat16(folder: Path, operators: PlainOperators) -> torch.Tensor:
    """What a model computes where it shows what is rounded."""
    return logits_of(of_folder(folder, operators, torch.bfloat16))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_all_norms_rotations_and_gates_are_known_and_have_the_bits_of_the_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, counting = tiny_folder(tmp_path, name, vocabulary=320), Counting()
    found = in_bfloat16(folder, counting)
    module = AutoModelForCausalLM.from_pretrained(folder)
    layers = module.config.num_hidden_layers
    norms = len([each for each in module.modules() if type(each).__name__.endswith("Norm")])
    assert counting.sums + counting.others == norms
    assert counting.sums == ({"cohere2": 2, "olmo3": 1}.get(name, 2 * layers)), "those behind a residual"
    assert counting.rotations == layers
    assert counting.activations >= layers, "one in each layer"
    assert (counting.clamped > 0) == (name == "gpt_oss")
    monkeypatch.setattr(hooks, "norm_of", lambda _: None)
    monkeypatch.setattr(hooks, "rotation_of", lambda *_: None)
    monkeypatch.setattr(hooks, "gate_of", lambda *_: None)
    unhooked = Counting()
    assert torch.equal(in_bfloat16(folder, unhooked), found)
    assert unhooked.sums + unhooked.others + unhooked.rotations + unhooked.clamped == 0


class OddNorm(torch.nn.Module):  # type: ignore[misc]
    """A norm of no kind that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(random(16))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_what_is_not_known_stays_as_it_is() -> None:
    assert norm_of(OddNorm()) is None
    heads, angles = random(1, 2, 3, 16), random(1, 3, 16)

    def odd(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return query * cos + sin, key * cos + sin

    assert rotation_of(odd, heads, angles) is None


def test_a_sum_waits_for_a_norm_and_for_nothing_else() -> None:
    a, b = random(1, 3, 16), random(1, 3, 16, seed=1)
    with computing(PLAIN, step(), torch.empty(0), []):
        total = a + b
        doubled = total * 2
        first = a + b
        second = first + b
        last = a + b
    assert torch.equal(doubled, (a + b) * 2)
    assert torch.equal(second, a + b + b)
    assert torch.equal(last, a + b)


@dtypes
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms(norm: Norm, dtype: torch.dtype) -> None:
    x, more, weight = random(1, 5, 80, dtype=dtype), random(1, 5, 80, seed=1, dtype=dtype), random(80, seed=2).to(dtype)
    one_in_the_last_place = 2**-10 if dtype == torch.float16 else 1e-6
    close = {"rtol": one_in_the_last_place, "atol": 1e-6}
    torch.testing.assert_close(KERNELS.norm(x, weight, norm), normed(x, weight, norm), **close)
    total = torch.empty_like(x)
    found = KERNELS.norm(total, weight, norm, (x, more))
    assert torch.equal(total, x + more)
    torch.testing.assert_close(found, normed(total, weight, norm), **close)
    whole = KERNELS.norm(x, weight, norm)
    assert torch.equal(torch.cat([KERNELS.norm(x[:, at : at + 1], weight, norm) for at in range(5)], 1), whole)
    heads = random(1, 5, 3, 80, dtype=dtype)[:, :, :2].transpose(1, 2)  # those of a product with more of them
    assert torch.equal(KERNELS.norm(heads, weight, norm), KERNELS.norm(heads.contiguous(), weight, norm))


@dtypes
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_rotations_have_the_same_bits(rotation: Rotation, dtype: torch.dtype) -> None:
    query, key, value, cos, sin = heads_and_angles(rotation, dtype)
    results = torch.empty_like(query), torch.empty_like(key)
    given = Rotating(query, key, cos, sin, rotation)
    KERNELS.rotate(given, *results)
    for found, x in zip(results, (query, key), strict=True):
        assert torch.equal(found, rotated(x, cos, sin, rotation))
    found, expected = (random(4, 2, 2, 2, BLOCK, 24, dtype=dtype)[:, 1] for _ in range(2))
    places = torch.tensor([3, 1, 1]), torch.tensor([31, 0, 7])
    queries = [
        operators.rotate_and_write(given, value, kv, *places) for operators, kv in ((KERNELS, found), (PLAIN, expected))
    ]
    assert torch.equal(*queries)
    assert torch.equal(found, expected)
    assert torch.equal(found[3, 1, :, 31], value[0, :, 0])


def heads_and_angles(rotation: Rotation, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of three tokens, parts of one product, and angles; those of pairs lie side by side for
    all tokens, as some versions of gpt-oss have them."""
    product = random(1, 3, 8, 24, dtype=dtype).transpose(1, 2)
    angles = (1, rotation.width // 2, 3) if rotation.by_pair else (1, 3, rotation.width)
    found = (random(*angles, seed=seed, dtype=dtype) for seed in (2, 3))
    return [*product.split((4, 2, 2), 1), *(each.mT if rotation.by_pair else each for each in found)]


def test_a_rotation_waits_for_attention_and_for_nothing_else() -> None:
    """What a class does with queries in between finds them turned."""
    operators, rotation = Counting(), Rotation(24, False, False, False)
    query, key, _, cos, sin = heads_and_angles(rotation, torch.float32)

    def plain(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return rotated(query, cos, sin, rotation), rotated(key, cos, sin, rotation)

    turn = hooks._rotation(plain)
    with computing(operators, step(), torch.empty(0), []):
        queries, keys = turn(query, key, cos, sin)
        assert not operators.rotations
        doubled = queries * 2
        assert operators.rotations
    assert torch.equal(doubled, 2 * rotated(query, cos, sin, rotation))
    assert torch.equal(keys, rotated(key, cos, sin, rotation))


def test_means_by_tiles_are_means() -> None:
    x = random(3, 200, 24)  # more rows than a tile has, and no multiple
    assert torch.equal(tiled_mean(x), x.mean(-1, keepdim=True))


def test_kernels_without_fused_norms_are_another_kind() -> None:
    unfused, rotation = UnfusedOperators(), ROTATIONS[0]
    assert unfused.recordable
    assert unfused.name != KernelOperators.name
    x, weight = random(1, 5, 80), random(80, seed=1)
    assert torch.equal(unfused.norm(x, weight, NORMS[0]), normed(x, weight, NORMS[0]))
    heads, angles = random(1, 2, 3, 24), random(1, 3, 24, seed=2)
    results = torch.empty_like(heads), torch.empty_like(heads)
    unfused.rotate(Rotating(heads, heads, angles, angles, rotation), *results)
    assert torch.equal(results[1], rotated(heads, angles, angles, rotation))
