"""Each kernel against the plain operators: in Triton's interpreter, which shows the logic, never the bits of a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slipstream.backend.steps import PagedChunk, lay_out
from slipstream.backend.torch import held, kernel_operators
from slipstream.backend.torch.definitions import Rotation
from slipstream.backend.torch.held import Tiling
from slipstream.backend.torch.kernel_operators import KernelOperators, LibraryOperators, UnfusedOperators
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import (
    CHUNK_LENGTHS,
    Activation,
    AttentionShape,
    Operators,
    Rotating,
    Step,
    longest_of,
)
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.quantised import Number, Quantised, interleaved, of_experts, pack
from slipstream.backend.torch.staging import Staging
from slipstream.models import Model
from slipstream.sampling import NO_TOKEN, Sampler, SamplingParams
from slipstream.sampling.sampler import masked

pytestmark = pytest.mark.torch
KERNELS, PLAIN = KernelOperators(), PlainOperators()
CPU = torch.device("cpu")
BLOCK = 32
HEADS, KV_HEADS, DIM = 6, 2, 24  # three heads share keys, and neither is a power of two


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_of(*chunks: tuple[int, int, list[int]]) -> Step:
    """A step of chunks, each with its past, its length and its blocks; padded as a backend's steps are."""
    paged = [PagedChunk(np.ones(n, np.int32), past, np.array(blocks, np.int32), 0) for past, n, blocks in chunks]
    return Step.of(lay_out(paged, sum(max(2, n) for _, n, _ in chunks) + 2, 1), BLOCK, Staging(CPU))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, bias: bool) -> None:
    x, weight = random(1, rows, 80), random(96, 80, seed=1)
    offset = random(96, seed=2) if bias else None
    assert_close(KERNELS.linear(x, weight, offset), PLAIN.linear(x, weight, offset))


def test_products_whose_parts_are_summed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small step's have the bits of a large one's."""
    x, weight, bias = random(20, 1024), random(80, 1024, seed=1), random(80, seed=2)
    assert Tiling().parts(*weight.shape) == 2
    apart = KERNELS.linear(x[:16], weight, bias)
    monkeypatch.setattr(kernel_operators, "TOKEN_TILES", (16,))
    together = KERNELS.linear(x, weight, bias)[:16]
    assert torch.equal(apart, together)
    assert_close(apart, PLAIN.linear(x[:16], weight, bias), tolerance=1e-3)


@pytest.mark.parametrize(
    ("shape", "parts"), [((1024, 4096), 8), ((4096, 4096), 4), ((4096, 12288), 4), ((12288, 4096), 1)]
)
def test_how_many_parts_a_product_has(shape: tuple[int, int], parts: int) -> None:
    assert Tiling().parts(*shape) == parts


def test_a_librarys_products_are_summed_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are computed, and not for others in the process."""
    state, product, seen = torch.backends.cuda, F.linear, []
    libraries = ["cublas"]

    def preferred(library: str | None = None) -> str:
        libraries.append(library or libraries[-1])
        return libraries[-1]

    def settings() -> list[Any]:
        return [
            preferred(),
            *(
                getattr(state.matmul, f"allow_{kind}_reduced_precision_reduction{of}")
                for kind in ("bf16", "fp16")
                for of in ("", "_split_k")
            ),
        ]

    def noted(*given: Any) -> torch.Tensor:
        seen.append(settings())
        return product(*given)

    monkeypatch.setattr(state, "preferred_blas_library", preferred)  # this build of torch may have none
    monkeypatch.setattr(F, "linear", noted)
    before = settings()
    x, weight, bias = (random(*shape).bfloat16() for shape in ((1, 3, 32), (16, 32), (16,)))
    assert torch.equal(LibraryOperators().linear(x, weight, bias), product(x, weight, bias))
    assert seen == [["cublaslt", False, False, False, False]]
    assert settings() == before
    assert_close(LibraryOperators().linear(x.float(), weight.float()), product(x.float(), weight.float()))
    assert len(seen) == 1, "others are our own"


STEP = step_of((100, 3, [1, 2, 3, 4]), (0, 9, [5]), (290, 1, [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]))


@pytest.mark.parametrize(
    ("shape", "sinks"),
    [(AttentionShape(0.2), False), (AttentionShape(0.2, softcap=5.0), False), (AttentionShape(0.2, window=40), True)],
    ids=["all", "cap", "window and sinks"],
)
@pytest.mark.parametrize("longest", CHUNK_LENGTHS)
def test_attention(shape: AttentionShape, sinks: bool, longest: int) -> None:
    """In tiles of few queries and of many."""
    query, kv = random(STEP.tokens.shape[1], HEADS, DIM), random(16, 2, KV_HEADS, BLOCK, DIM, seed=1)
    scores = random(HEADS, seed=2) if sinks else None
    found = KernelOperators().attend(query, kv, replace(STEP, longest=longest), shape, scores)
    assert_close(found, PLAIN.attend(query, kv, STEP, shape, scores))


@pytest.mark.parametrize(
    ("chunks", "longest"), [([1], 4), ([1, 3], 4), ([5], 16), ([1, 16], 16), ([17], 64), ([300], 64), ([], 4)]
)
def test_the_longest_chunk_of_a_step(chunks: list[int], longest: int) -> None:
    """Padding is none."""
    paged = [PagedChunk(np.ones(n, np.int32), 0, np.arange(1, 12, dtype=np.int32), 0) for n in chunks]
    size = 40 + sum(max(2, n) for n in chunks)
    assert longest_of(lay_out(paged, size, 1)) == longest
    assert Step.of(lay_out(paged, size, 1), BLOCK, Staging(CPU)).longest == longest


@pytest.mark.parametrize(
    ("wanted", "dims", "rows"), [(8, 128, 16), (17, 128, 32), (500, 128, 64), (500, 256, 32), (500, 1024, 16)]
)
def test_the_queries_of_a_tile_fit_into_a_processor(wanted: int, dims: int, rows: int) -> None:
    assert KERNELS._query_rows(wanted, dims, 2) == rows
    assert UnfusedOperators()._query_rows(wanted, dims, 2) == 16
    assert KERNELS._query_rows(wanted, dims, 4) == 16, "in float32 the order of sums depends on the tile"


@pytest.mark.parametrize("lengths", [[2], [9, 2, 300, 0], [64, 1, 1, 1, 17, 16, 0, 0], [0]])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_tiles_of_queries(lengths: list[int], tokens: int) -> None:
    """Each token is in one; the others are of the last chunk, which is empty."""
    begins = torch.tensor([0, *np.cumsum([*lengths, 0])], dtype=torch.int32)
    found = kernel_operators.query_tiles(begins, sum(lengths), tokens).tolist()
    expected = [[chunk, first] for chunk, length in enumerate(lengths) for first in range(0, length, tokens)]
    assert [tile for tile in found if tile[0] < len(lengths)] == expected
    assert all(tile == [len(lengths), 0] for tile in found if tile not in expected)


def test_attention_of_a_step_too_long_for_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_operators, "_PARTIAL_SUMS", HEADS * DIM * 10)
    step, shape = step_of((3, 23, [1])), AttentionShape(0.2)
    query, kv = random(step.tokens.shape[1], HEADS, DIM), random(2, 2, KV_HEADS, BLOCK, DIM, seed=1)
    assert_close(KERNELS.attend(query, kv, step, shape, None), PLAIN.attend(query, kv, step, shape, None))


def test_plain_attention_keeps_its_bits_over_cuts() -> None:
    kv, table = random(16, 2, KV_HEADS, BLOCK, DIM, seed=1), [*range(1, 11)]
    query, other = random(40, HEADS, DIM), random(2, HEADS, DIM, seed=3)

    def attend(start: int, end: int) -> torch.Tensor:
        step = step_of((70, 2, [11, 12, 13]), (240 + start, end - start, table))
        dummies = random(step.tokens.shape[1] - 2 - (end - start), HEADS, DIM, seed=4)
        rows = torch.cat((other, query[start:end], dummies))
        return PLAIN.attend(rows, kv, step, AttentionShape(0.2), None)[2:][: end - start]

    whole = attend(0, 40)
    assert torch.equal(torch.cat([attend(0, 15), attend(15, 16), attend(16, 19), attend(19, 40)]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 344, 20_000])
@pytest.mark.parametrize("function", [F.silu, partial(F.gelu, approximate="tanh"), torch.sigmoid])
def test_plain_activations_keep_their_bits_over_cuts(function: Any, width: int, dtype: torch.dtype) -> None:
    """The last elements of what a thread computes have another `exp` than the others, which shows in few bits."""
    rows = 16 if width > 1000 else 1000
    x = random(1, rows, width).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        whole = PLAIN.activate(Activation(function, x))
        parts = [PLAIN.activate(Activation(function, part)) for part in x.split((1, 2, rows - 10, 7), 1)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(parts, 1), whole)
    torch.testing.assert_close(whole, function(x))


def test_writing() -> None:
    key, value = (random(KV_HEADS, STEP.tokens.shape[1], DIM, seed=seed).transpose(0, 1) for seed in (1, 2))
    found, expected = (random(16, 3, 2, KV_HEADS, BLOCK, DIM)[:, 1] for _ in range(2))
    KERNELS.write(found, key, value, STEP.blocks[0], STEP.slots)
    PLAIN.write(expected, key, value, STEP.blocks[0], STEP.slots)
    assert torch.equal(found[1:], expected[1:])  # several dummies share a slot of the scratch block


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("operators", [PLAIN, KERNELS], ids=["plain", "kernels"])
def test_values_that_are_no_numbers_reach_those_alone_who_see_them(
    operators: Operators, rotated: bool, wrong: float
) -> None:
    """Tokens before them are summed up beside them, with a weight of 0: in one chunk, or with a draft behind them."""
    query, key, value = (random(1, heads, 12, DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    value = value + 1
    value[0, 1, 11, 5] = wrong

    def attend(count: int) -> torch.Tensor:
        step, kv = step_of((0, count, [1])), random(2, 2, KV_HEADS, BLOCK, DIM)
        size = step.tokens.shape[1]
        queries, keys, values = (F.pad(each[:, :, :count], (0, 0, 0, size - count)) for each in (query, key, value))
        if rotated:
            angles = torch.zeros(1, size, DIM)
            given = Rotating(queries, keys, angles + 1, angles, Rotation(DIM, False, False, False))
            queries = operators.rotate_and_write(given, values, kv, step.blocks[0], step.slots)
        else:
            operators.write(kv, keys[0].transpose(0, 1), values[0].transpose(0, 1), step.blocks[0], step.slots)
        queries = queries[0].transpose(0, 1).contiguous()
        return operators.attend(queries, kv, step, AttentionShape(0.2), None)[:count]

    before, whole = attend(11), attend(12)
    assert before.isfinite().all()
    assert torch.equal(whole[:11], before)
    assert not whole[11].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed: bool) -> None:
    experts, inner, width, top, tokens = 5, 40, 48, 2, 12
    up, down = random(experts, 2 * inner, width, seed=1), random(experts, width, inner, seed=2)
    module: Any = SimpleNamespace(
        num_experts=experts,
        is_transposed=transposed,
        has_bias=transposed,
        gate_up_proj=up.mT.contiguous() if transposed else up,
        down_proj=down.mT.contiguous() if transposed else down,
        gate_up_proj_bias=random(experts, 2 * inner, seed=3),
        down_proj_bias=random(experts, width, seed=4),
        _apply_gate=lambda both: both[..., :inner] * both[..., inner:].tanh(),
    )
    x, weights = random(tokens, width), random(tokens, top, seed=5).softmax(-1)
    index = torch.stack([torch.randperm(experts - 1)[:top] for _ in range(tokens)])  # the last expert has no tokens
    index[:, 0] = torch.where(index[:, 1] != 0, 0, index[:, 0])  # and the first has more than a tile of them
    found = KERNELS.experts(module, x, index, weights)
    assert_close(found, PLAIN.experts(module, x, index, weights), tolerance=1e-4)
    cuts = zip(*(each.split((1, 7, 4)) for each in (x, index, weights)), strict=True)
    assert torch.equal(torch.cat([KERNELS.experts(module, *cut) for cut in cuts]), found), "a token's bits are its own"


@pytest.mark.parametrize("number", ["int4", "e2m1", "e4m3"])
def test_quantised_experts(number: Number) -> None:
    experts, inner, width, top, tokens = 4, 32, 64, 2, 6
    module: Any = SimpleNamespace(
        num_experts=experts,
        is_transposed=False,
        has_bias=False,
        gate_up_proj=of_experts([quantised(number, 2 * inner, width, seed) for seed in range(experts)]),
        down_proj=of_experts([quantised(number, width, inner, 10 + seed) for seed in range(experts)]),
        _apply_gate=lambda both: both[..., :inner] * both[..., inner:].tanh(),
    )
    x, weights = random(tokens, width), random(tokens, top, seed=5).softmax(-1)
    index = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)])
    found = KERNELS.experts(module, x, index, weights)
    assert_close(found, PLAIN.experts(module, x, index, weights), tolerance=1e-4)


@pytest.mark.parametrize("columns", [8, 16, 32, 48, 96, 192])
@pytest.mark.parametrize("number", ["int4", "e2m1", "e4m3"])
def test_quantised_weights_are_taken_apart_to_the_bit(number: Number, columns: int) -> None:
    """Whatever part of a row shares a scale: more than a tile has, less, or one that is no power of two."""
    weight = quantised(number, 72, 192, seed=3, columns=columns)
    assert torch.equal(KERNELS.linear(torch.eye(192), weight), weight.unpacked(0, 72, torch.float32).T)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", ["int4", "e2m1", "e4m3"])
def test_weights_with_short_scales_are_taken_apart_to_the_bit(number: Number, precision: torch.dtype) -> None:
    weight = quantised(number, 72, 192, seed=3, columns=32)
    weight = replace(weight, scales=(weight.scales - 0.06).to(precision))  # of either sign
    assert torch.equal(KERNELS.linear(torch.eye(192), weight), weight.unpacked(0, 72, torch.float32).T)


@pytest.mark.parametrize("columns", [8, 104, 512])
def test_interleaving(columns: int) -> None:
    codes = torch.randint(0, 16, (3, columns), generator=torch.Generator().manual_seed(0))
    held = interleaved(pack(codes))
    assert held.shape == (3, -(-columns // 128) * 16)
    second = [(int(held[2, 1]) >> 4 * place) & 15 for place in range(8)]
    neighbours = [*codes[2, 2:32:8].tolist(), *[0] * 4][:4], [*codes[2, 3:32:8].tolist(), *[0] * 4][:4]
    assert second == [*neighbours[0], *neighbours[1]]
    weight = Quantised("int4", held, torch.ones(3, columns // 8), 1, 8, torch.zeros(3, columns // 8, dtype=torch.int8))
    assert torch.equal(weight.unpacked(0, 3, torch.float32), codes.float())


@pytest.mark.parametrize("number", ["int4", "e2m1", "e4m3"])
def test_tiles_of_other_sizes(number: Number) -> None:
    operators = KernelOperators(Tiling(block_n=32, block_k=32, quantised_k=64, part=64))
    weight, x = quantised(number, 72, 192, seed=3), random(20, 192)
    assert operators.name != KERNELS.name
    assert torch.equal(operators.linear(torch.eye(192), weight), weight.unpacked(0, 72, torch.float32).T)
    assert_close(operators.linear(x, weight), PLAIN.linear(x, weight))
    whole = weight.unpacked(0, 72, torch.float32)
    assert_close(operators.linear(x, whole), PLAIN.linear(x, whole))


def test_numbers_of_8_bits_may_be_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has an instruction for them."""
    weight = quantised("e4m3", 72, 192, seed=3)
    assert not held.has_e4m3(CPU)
    monkeypatch.setattr(held, "has_e4m3", lambda _: True)
    assert torch.equal(KERNELS.linear(torch.eye(192), weight), weight.unpacked(0, 72, torch.float32).T)


def quantised(number: Number, n: int, k: int, seed: int, columns: int = 16) -> Quantised:
    """A random weight [n, k]; for 8 rows and some columns there is a scale, and of codes a zero."""
    generator = torch.Generator().manual_seed(seed)
    if number == "e4m3":
        held = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        held = interleaved(pack(torch.randint(0, 16, (n, k), generator=generator)))
    scales = torch.rand(n // 8, k // columns, generator=generator) / 8
    zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.int8) if number == "int4" else None
    return Quantised(number, held, scales, 8, columns, zeros)


@pytest.mark.parametrize("size", [5, 2048, 2049, 5000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_tokens(size: int, dtype: torch.dtype) -> None:
    rows = 3 if size < 100_000 else 1
    logits = (random(rows, size) * 2).round().to(dtype)  # with ties, in one part and between parts
    expected = logits.float().numpy().argmax(1).tolist()
    assert PLAIN.argmax(logits).tolist() == expected
    found = KERNELS.argmax(logits)
    assert (found.dtype, found.tolist()) == (torch.int64, expected)
    numbers = [rows - 1, 0]
    masks = np.random.default_rng(0).integers(-(2**31), 2**31, (2, -(-size // 32))).astype(np.int32)
    masks[1, : size // 64] = 0
    masks[1, -1] |= 1
    expected = [masked(logits[row].float().numpy(), mask).argmax() for row, mask in zip(numbers, masks, strict=True)]
    for operators in (PLAIN, KERNELS):
        of_masked = operators.argmax(logits, (torch.tensor(numbers), torch.from_numpy(masks)))
        assert (of_masked.dtype, of_masked.tolist()) == (torch.int64, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_of_strange_logits(dtype: torch.dtype) -> None:
    """Those of the host: none if the highest is infinite or no number."""
    logits = torch.full((6, 5000), -torch.inf)
    logits[1, 4999] = -60_000
    logits[2, [2500, 4500]] = torch.nan
    logits[2, 7] = 9
    logits[3, [4000, 4001]] = torch.tensor([-0.0, 0.0])
    logits[4, [3000, 3001]] = torch.inf
    logits[5] = torch.nan
    expected = [NO_TOKEN, 4999, NO_TOKEN, 4000, NO_TOKEN, NO_TOKEN]
    logits = logits.to(dtype)
    sampler = Sampler(SamplingParams(temperature=0), 0, np.empty(0, np.int32), 5000)
    assert [sampler.sample(row, 0) for row in logits.float().numpy()] == expected
    for operators in (PLAIN, KERNELS):
        assert operators.argmax(logits).tolist() == expected
        masks = torch.zeros(6, 157, dtype=torch.int32)
        masks[1:, 0] = -1
        masks[4, 2500 // 32] = -1
        logits[4, 2501] = -5
        found = operators.argmax(logits, (torch.arange(6), masks)).tolist()
        assert found == [NO_TOKEN, NO_TOKEN, 7, NO_TOKEN, 2501, NO_TOKEN], "what isn't allowed doesn't matter"


@pytest.mark.parametrize("tiny", ["gpt_oss", "qwen3_moe"], indirect=True)
def test_a_whole_model(tiny: Model) -> None:
    model = TorchModel.load(tiny.path, CPU, PLAIN)
    chunk = PagedChunk(np.arange(5, 12, dtype=np.int32), 0, np.array([1], np.int32), 2)
    inputs = lay_out([chunk], 8, 2, windows=model.window_tables)
    found = []
    for operators in (PLAIN, KERNELS):
        model.operators = operators
        model.allocate(4)
        model.start(inputs)
        found.append(torch.from_numpy(model.finish().host().copy()))
    assert_close(found[1], found[0])


TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]


def test_one_kind_of_matrix_instruction_for_all_tiles_of_tokens(tmp_path: Path) -> None:
    """Compiled, on a machine without a GPU: an instruction of another shape adds up in another order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.torch_backend.compiled", *TARGETS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, list[list[str]]]] = json.loads(run.stdout)
    assert [*found] == TARGETS
    for target, kernels in found.items():
        for kernel, by_tile in kernels.items():
            assert by_tile[0], f"{kernel} has no matrix instruction on {target}"
            assert all(kinds == by_tile[0] for kinds in by_tile), (target, kernel, by_tile)
        assert len({tuple(kinds) for kinds in kernels["linear"]}) == 1
