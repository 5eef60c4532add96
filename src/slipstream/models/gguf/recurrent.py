"""Layers that keep a recurrent state, over the runtime's operators for states in slots.

A state table, float32 [slots, ...], holds the states of a layer. `la.block_indices` names slots for each chunk of a
step: first the one that its state is read from, then those that states along the chunk are written to, one whenever
`la.past_lens` and the tokens so far are together a multiple of `la.cache_interval`, and one at the end. The operators
compute a token at a time in float32, so a token's bits don't depend on how its sequence is cut
(`tests/engine/test_recurrent_operators.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from slipstream.errors import ModelError
from slipstream.models.gguf.parts import Parts, const, i64

IN_FLOAT32 = ".in_float32"
"""How operations' names end that the runtime must compute in float32, though it computes others in bfloat16: see
`convert`. A state has more bits while an operator goes on with it, and would lose them wherever a chunk ends."""
SLOT_INPUTS = ("la.block_indices", "la.block_indices_begins", "la.past_lens", "la.cache_interval")


def short_convolution(parts: Parts, index: int, x: ov.Output) -> ov.Output:
    """LFM2's layer: a convolution over the last few tokens between two gates, for `x` [tokens, 1, size]."""
    block = f"blk.{index}.shortconv."
    before, after, inner = ops.split(parts.projected(x, f"{block}in_proj"), i64(-1), 3).outputs()
    mixed = _convolved(parts, index, ops.multiply(before, inner).output(0), f"{block}conv")
    return parts.projected(ops.multiply(after, mixed).output(0), f"{block}out_proj")


def gated_delta_net(parts: Parts, index: int, x: ov.Output) -> ov.Output:
    """Qwen's layer, for `x` [tokens, 1, size]; see Gated Delta Networks (arXiv 2412.06464)."""
    block, sizes = f"blk.{index}.", parts.decoder.recurrent
    heads, groups, state, size = sizes.heads, sizes.groups, sizes.state, sizes.head
    mixed = _convolved(parts, index, parts.projected(x, f"{block}attn_qkv"), f"{block}ssm_conv1d")
    lengths = [groups * state, groups * state, heads * size]
    query, key, value = ops.variadic_split(ops.swish(mixed), i64(-1), i64(lengths)).outputs()
    query, key, value = (_by_head(each, n) for each, n in ((query, groups), (key, groups), (value, heads)))
    if parts.decoder.family.tiled_heads:  # the operator takes neighbouring heads for those of a group
        query, key = (ops.tile(each, i64([1, heads // groups, 1])).output(0) for each in (query, key))
    if f"{block}ssm_ba.weight" in parts.weights:
        both = _by_head(parts.projected(x, f"{block}ssm_ba"), groups)
        beta, alpha = (ops.reshape(each, i64([0, heads]), True) for each in ops.split(both, i64(-1), 2).outputs())
    else:
        beta, alpha = (ops.squeeze(parts.projected(x, f"{block}ssm_{name}"), i64(1)) for name in ("beta", "alpha"))
    rate = ops.multiply(_time_step(parts, block, alpha.output(0)), _small(parts, f"{block}ssm_a"))
    states = _states(parts, f"gated_delta_state_table.{index}", (heads, size, state))
    attributes = {"use_qk_l2norm": True, "q_l2_norm_eps": 1e-6, "k_l2_norm_eps": 1e-6}
    out = _operator(parts, "PagedGatedDeltaNet", [query, key, value, states, rate, ops.sigmoid(beta)], attributes)
    gate = ops.swish(_by_head(parts.projected(x, f"{block}attn_gate"), heads))
    return _out(parts, block, ops.multiply(parts.norm(out, f"{block}ssm_norm.weight"), gate).output(0))


def mamba2(parts: Parts, index: int, x: ov.Output) -> ov.Output:
    """Mamba-2's layer, for `x` [tokens, 1, size]; see arXiv 2405.21060."""
    block, sizes = f"blk.{index}.", parts.decoder.recurrent
    heads, groups, state, size = sizes.heads, sizes.groups, sizes.state, sizes.head
    inner, around = heads * size, groups * state
    lengths = i64([inner, inner + 2 * around, heads])
    gate, mixed, time = ops.variadic_split(parts.projected(x, f"{block}ssm_in"), i64(-1), lengths).outputs()
    mixed = ops.swish(_convolved(parts, index, mixed, f"{block}ssm_conv1d")).output(0)
    value, into, out_of = ops.variadic_split(mixed, i64(-1), i64([inner, around, around])).outputs()
    value, into, out_of = (_by_head(each, n) for each, n in ((value, heads), (into, groups), (out_of, groups)))
    step = _time_step(parts, block, ops.squeeze(time, i64(1)).output(0))
    states = _states(parts, f"selective_ssm_state_table.{index}", (heads, size, state))
    decay = const(_small(parts, f"{block}ssm_a"), np.float32)
    out = _operator(parts, "PagedSelectiveSSM", [decay, step, into, value, out_of, states])
    passed = ops.multiply(value, const(_small(parts, f"{block}ssm_d")[:, None], np.float32))
    gated = ops.multiply(ops.add(out, passed), ops.swish(_by_head(gate, heads)))
    grouped = ops.reshape(gated, i64([0, groups, inner // groups]), True).output(0)
    return _out(parts, block, parts.norm(grouped, f"{block}ssm_norm.weight"))


def _convolved(parts: Parts, index: int, x: ov.Output, name: str) -> ov.Output:
    """A convolution of each channel over its last tokens; its state is those tokens, [channels, width]."""
    weight = parts.weights.array(f"{name}.weight")
    assert weight is not None
    bias = parts.weights.array(f"{name}.bias")
    channels, width = weight.shape
    arguments = [
        ops.squeeze(x, i64(1)),
        parts.input(f"conv_state_table.{index}", [-1, channels, width], np.float32),
        const(weight.reshape(channels, 1, width), np.float32),
        const(() if bias is None else bias, np.float32),
    ]
    return ops.unsqueeze(_operator(parts, "PagedCausalConv1D", arguments), i64(1)).output(0)


def _states(parts: Parts, name: str, shape: tuple[int, ...]) -> ov.Node:
    """The states of a layer, [slots, *shape], that keep every bit of what the operator computes.

    Where the runtime computes in bfloat16, it would give the table that type if the operator read from it at once.
    """
    table = parts.input(name, [-1, math.prod(shape)], np.float32)
    states = ops.reshape(table, i64([0, *shape]), True)
    states.set_friendly_name(f"{name}{IN_FLOAT32}")
    return states


def _time_step(parts: Parts, block: str, x: ov.Output) -> ov.Output:
    """How far a token moves the state of each head, [tokens, heads]."""
    return ops.softplus(ops.add(x, _small(parts, f"{block}ssm_dt.bias"))).output(0)


def _out(parts: Parts, block: str, x: ov.Output) -> ov.Output:
    """The projection of what heads or groups [tokens, parts, size] say."""
    sizes = parts.decoder.recurrent
    flat = ops.reshape(x, i64([0, 1, sizes.heads * sizes.head]), True).output(0)
    return parts.projected(flat, f"{block}ssm_out")


def _by_head(x: ov.Output, heads: int) -> ov.Output:
    """[tokens, 1, heads * size] as [tokens, heads, size]."""
    return ops.reshape(x, i64([0, heads, -1]), True).output(0)


def _small(parts: Parts, name: str) -> npt.NDArray[np.float32]:
    """A number for each head."""
    values = parts.weights.array(name)
    if values is None:
        raise ModelError(f"the GGUF has no tensor {name!r}: it is not a whole language model")
    return values.reshape(-1)


def _operator(
    parts: Parts, kind: str, arguments: Sequence[ov.Node | ov.Output], attributes: Mapping[str, Any] | None = None
) -> ov.Output:
    """An operator over slots, of these arguments and those that say where a step's states are."""
    step = [parts.inputs["subsequence_begins"], *(parts.input(name, [-1], np.int32) for name in SLOT_INPUTS)]
    node = make_operator(kind, [*arguments, *step], attributes or {})
    if kind != "PagedCausalConv1D":  # whose state is what goes in, as it comes
        node.set_friendly_name(f"{node.get_friendly_name()}{IN_FLOAT32}")
    return node.output(0)


def make_operator(kind: str, arguments: Sequence[ov.Node | ov.Output], attributes: Mapping[str, Any]) -> ov.Node:
    """One of the operators that the CPU plugin brings, which no opset has."""
    return _operators().create(kind, list(arguments), dict(attributes))


@cache
def _operators() -> NodeFactory:
    factory = NodeFactory()
    (plugin,) = (Path(ov.__file__).parent / "libs").glob("*openvino_intel_cpu_plugin*")
    factory.add_extension(str(plugin))
    return factory


RECURRENT: Mapping[str, Callable[[Parts, int, ov.Output], ov.Output]] = {
    "short convolution": short_convolution,
    "delta net": gated_delta_net,
    "mamba 2": mamba2,
}
"""What makes the layers of a family, by `Family.recurrent`."""
