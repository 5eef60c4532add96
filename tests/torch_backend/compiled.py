"""Compile the kernels for GPUs that this machine need not have, and list the kinds of their matrix instructions.

`python -m tests.torch_backend.compiled cuda:90 …` prints JSON: by target and kernel, the kinds for each tile of tokens.
A kind leaves out how wide the instruction is on the tokens' side: each number of its result is summed alike.
"""

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slipstream.backend.torch.held import OPTIONS, Tiling, held_of
from slipstream.backend.torch.kernel_operators import KEYS, QUERY_TILES, TOKENS, KernelOperators
from slipstream.backend.torch.kernels import attention, by_row, experts, products
from slipstream.backend.torch.operators import SEGMENT, TOKEN_TILES
from slipstream.backend.torch.quantised import Quantised, Weight

_INSTRUCTION = re.compile(r"wgmma\.mma_async[.\w]*|mma\.sync[.\w]*|tcgen05\.mma[.\w]*|v_mfma_\w*")
_LOAD = re.compile(r"ld\.global|cp\.async\.c[ag]")
_NARROW = re.compile(r"cp\.async\.ca.* 0x4, ")
_INTEGERS = {
    "rows",
    "n_size",
    "k_size",
    "scale_rows",
    "first_token",
    "end_token",
    "segments",
    "share",
    "pairs",
    "width",
    "words",
}
_INDICES = {
    "table",
    "table_begins",
    "pasts",
    "begins",
    "tiles",
    "order",
    "masks",
    "firsts",
}
_LONG_INDICES = {"blocks", "slots", "positions", "index", "row_numbers", "likeliest"}
_FLOATS = {"part", "part_peak", "part_sum", "parts", "peaks"}
_TYPES: dict[str, dict[str, str]] = {
    "": {},
    "int4": {"weight": "*i32", "zeros": "*i8"},
    "e2m1": {"weight": "*i32"},
    "e4m3": {"weight": "*u8", "scales": "*fp32"},
}
"""Of what is held of a weight, by what its numbers are."""
_ROOM = {"cuda": 99 << 10, "hip": 64 << 10}
"""Bytes that a program may have on the smallest GPUs of a maker."""


def _weights() -> dict[str, Weight]:
    """One of each kind, as they are mostly stored."""
    words, zeros = torch.zeros(64, 64, dtype=torch.int32), torch.zeros(64, 4, dtype=torch.int8)
    return {
        "": torch.zeros(64, 512, dtype=torch.bfloat16),
        "int4": Quantised.of_codes("int4", words, torch.zeros(64, 4), 128, zeros),
        "e2m1": Quantised.of_codes("e2m1", words, torch.zeros(64, 16), 32),
        "e4m3": Quantised("e4m3", torch.zeros(64, 512, dtype=torch.uint8), torch.zeros(1, 4), 128, 128),
    }


def _signature(name: str, constants: dict[str, Any], target: GPUTarget, floats: str) -> tuple[str, list[Any]]:
    """The type of a kernel's argument as in a model of such floats, and what is known of its value."""
    divisible = [["tt.divisibility", 16]]
    if name == "weight" and constants.get("NUMBER") == "e4m3" and target.backend == "cuda" and target.arch >= 89:
        return "*fp8e4nv", divisible
    if held := _TYPES[constants.get("NUMBER", "")].get(name):
        return held, divisible
    if name in _INTEGERS:
        return "i32", divisible if name.endswith("_size") else []
    if name in ("scale", "eps", "alpha", "limit"):
        return "fp32", []
    if name.startswith("stride") or name.endswith("_stride"):
        return "i32", divisible
    kinds = {"*i32": _INDICES, "*i64": _LONG_INDICES, "*fp32": _FLOATS}
    return next((kind for kind, names in kinds.items() if name in names), f"*{floats}"), divisible


def _kinds(kernel: Any, target: GPUTarget, given: dict[str, Any], floats: str = "bf16") -> list[str]:
    names = kernel.arg_names
    constants = {name: value for name, value in given.items() if name in names}
    options = OPTIONS | {name: value for name, value in given.items() if name not in names}
    signature = {
        name: "constexpr" if name in constants else _signature(name, constants, target, floats)[0] for name in names
    }
    attributes = {
        (at,): facts
        for at, name in enumerate(names)
        if name not in constants and (facts := _signature(name, constants, target, floats)[1])
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    if target.backend == "hip":
        options = OPTIONS | {"matrix_instr_nonkdim": 16}
    compiled = triton.compile(source, target=target, options=options)
    code = compiled.asm
    if "NUMBER" in constants:
        taken = compiled.metadata.shared
        assert taken <= _ROOM[target.backend], f"{kernel.__name__} takes {taken:,} bytes, which not every GPU has"
    if "NUMBER" in constants and floats != "fp32" and target.backend == "cuda":
        loads = len(_LOAD.findall(code["ptx"]))
        assert loads < 64, f"{loads} loads in {kernel.__name__}: what numbers share is loaded for each of them"
        assert not _NARROW.search(code["ptx"]), f"{kernel.__name__} copies weights four bytes at a time"
    found = _INSTRUCTION.findall(code.get("ptx") or code["amdgcn"])
    kinds = {re.sub(r"(wgmma\S*\.m64)n\d+", r"\1", each) for each in found}
    return sorted(kinds | (_sums(code["ttgir"]) if kinds or floats == "fp32" else set()))


def _sums(code: str) -> set[str]:
    """How sums over the rows of a matrix are spread over threads, which decides their order."""
    found = set()
    for layout in re.findall(r"\(tensor<\d+x\d+xf32, (#\w+)>\) -> tensor", code):
        definition = re.search(rf"^{layout} = (.*)$", code, re.M)
        assert definition is not None
        if warps := re.search(r"warpsPerCTA = \[(\d+), \d+\]", definition.group(1)):
            of_warp = re.findall(r"(sizePerThread|threadsPerWarp) = \[(\d+), \d+\]", definition.group(1))
            found.add(f"sums by {warps.group(1)} warps {of_warp}")
        else:
            kinds = re.findall(r"(register|lane|warp) = (\[\[.*?\]\])", definition.group(1))
            assert kinds
            found.add(f"sums by {[(kind, [row for row, _ in json.loads(bases) if row]) for kind, bases in kinds]}")
    return found


def main() -> None:
    report: dict[str, dict[str, list[list[str]]]] = {}
    common = {"BIAS": False, "stride_k": 1}
    whole = [common | {"BLOCK_M": tile, "SPLIT": 4, "APART": False} for tile in TOKEN_TILES]
    multiplying = {
        products.linear: [*whole, whole[0] | {"APART": True}],
        experts.experts_linear: [common | {"BLOCK_M": TOKEN_TILES[0]}],
    }
    weights = {number: held_of(weight) for number, weight in _weights().items()}
    x = torch.zeros(1, dtype=torch.bfloat16)
    for name in sys.argv[1:]:
        backend, _, architecture = name.partition(":")
        cuda = backend == "cuda"
        target = GPUTarget(backend, int(architecture) if cuda else architecture, 32 if cuda else 64)
        attending = {
            "HEADS": 32, "GROUP": 4, "DIM": 128, "DIMS": 128, "BLOCK": 32,
            "KEYS": KEYS, "SEGMENT": SEGMENT, "WINDOW": 0, "CAP": 0.0,
        }  # fmt: skip
        tiles = [attending | {"ROWS": rows} for rows in (QUERY_TILES if cuda else QUERY_TILES[:1])]
        report[name] = {
            f"{kernel.__name__} {number}".strip(): [
                _kinds(kernel, target, each | weight.options(Tiling(), each["BLOCK_M"], x))
                for each in (variants[::3] if number else variants)  # the extremes of tiles
            ]
            for kernel, variants in multiplying.items()
            for number, weight in weights.items()
            if kernel is products.linear or number in ("", "int4")  # they take weights apart alike
        } | {"attend": [_kinds(attention.attend, target, each) for each in tiles]}
        if architecture in ("80", "gfx942"):  # no other has less room
            of_float32 = weights["int4"].options(Tiling(), TOKEN_TILES[-1], x.float())
            _kinds(products.linear, target, whole[-1] | of_float32, "fp32")
        if cuda:  # matrix units don't multiply them
            rows = {KernelOperators()._query_rows(wanted, attending["DIMS"], 4) for wanted in QUERY_TILES}
            wide = [attending | {"ROWS": each} for each in sorted(rows)]
            report[name]["attend float32"] = [_kinds(attention.attend, target, each, "fp32") for each in wide]
        head = {"DIM": 128, "DIMS": 128}
        combined = head | {"HEADS": 32, "SEGMENT": SEGMENT, "WINDOW": 40, "SINKS": True}
        normed = {"ADD": True, "ROUNDS_FIRST": True, "OFFSET": True, "CENTRED": True, "SIZE": 3000, "BLOCK": 4096}
        turned = head | {
            "HEADS": 32, "KV_HEADS": 8, "WIDTH": 64, "NEIGHBOURS": True, "BY_PAIR": True, "WIDE": False, "WRITE": True,
        }  # fmt: skip
        added = {"BIAS": False, "BLOCK_N": Tiling().block_n, "BLOCK_M": TOKEN_TILES[0], "SPLIT": 4}
        looked_at = {"MASKED": True, "SIZE": 151_936, "BLOCK": TOKENS}
        others = (
            (products.add_parts, added),
            (attention.combine, combined),
            (attention.query_tiles, {"TOKENS": 4, "BLOCK": 64}),
            (attention.write, head),
            (by_row.norm, normed),
            (by_row.gate, {"BY_TANH": True, "BLOCK": 1024}),
            (by_row.gate_clamped, {"BLOCK": 1024}),
            (attention.rotate, turned),
            (attention.rotate, turned | {"WRITE": False}),
            (experts.expert_tiles, {"TILE": TOKEN_TILES[0], "BLOCK": 1024}),
            (experts.sum_experts, {"TOP": 8, "BLOCK": 512}),
            (by_row.argmax_parts, looked_at),
            (by_row.argmax_parts, looked_at | {"MASKED": False, "SIZE": 32_001}),
            (by_row.argmax, {"PARTS": 75, "BLOCK": 128}),
        )
        for kernel, constants in others:
            assert not _kinds(kernel, target, constants), "these multiply no matrices"
    print(json.dumps(report))


if __name__ == "__main__":
    main()
