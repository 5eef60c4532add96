"""Mixtures of experts, in which a token is computed by the experts that it is sent to, and by no others.

Each expert is a branch of the graph. It runs if the step has a token for it, over the rows of those tokens alone. A
product's bits depend on how many rows it has, so rows are filled up to a multiple of 8, or to all rows of the step, by
tokens that are not sent there: their share is 0. Such numbers of rows are of one class where steps of such sizes are,
and the self-test of step classes compares them, too. Experts are added in their order, whichever run.
"""

from collections.abc import Callable

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from slipstream.models.gguf.parts import Parts, f32, i64

_ROWS = 8

Expert = Callable[[ov.Output], ov.Output]
"""What an expert makes of tokens, [rows, size]."""


def mixture(parts: Parts, block: str, x: ov.Output) -> ov.Output:
    """The sum of the experts that tokens are sent to, each by its share, for `x` [tokens, 1, size]."""
    size = x.get_partial_shape()[-1].get_length()
    tokens = ops.reshape(x, i64([-1, size]), False).output(0)
    experts = _experts(parts, block)
    shares, order, rows = _sent(parts, tokens, *_routes(parts, block, tokens), len(experts))
    by_expert = zip(*(ops.split(each, i64(0), len(experts)).outputs() for each in (shares, order, rows)), strict=True)
    total = ops.multiply(tokens, f32(0)).output(0)
    for expert, inputs in zip(experts, by_expert, strict=True):
        total = _if_any_is_sent(expert, size, total, tokens, *inputs)
    return ops.unsqueeze(total, i64(1)).output(0)


def _routes(parts: Parts, block: str, tokens: ov.Output) -> tuple[ov.Output, ov.Output]:
    """Shares and numbers of the experts that tokens are sent to, both [tokens, experts used]."""
    decoder, family = parts.decoder, parts.decoder.family
    scores = parts.projected(tokens, f"{block}ffn_gate_inp")
    if family.gate == "softmax":
        scores = ops.softmax(scores, -1).output(0)
    elif family.gate == "sigmoid":
        scores = ops.sigmoid(scores).output(0)
    ranked = scores
    if (bias := parts.weights.array(f"{block}exp_probs_b.bias")) is not None:
        ranked = ops.add(scores, bias[None]).output(0)
    best = ops.topk(ranked, np.int64(decoder.experts_used), -1, "max", "value", "i64", stable=True)
    chosen, shares = best.output(1), best.output(0)
    if bias is not None:
        shares = ops.gather_elements(scores, chosen, 1).output(0)
    if family.gate == "softmax of the chosen":
        shares = ops.softmax(shares, -1).output(0)
    elif family.normalised_experts:
        shares = ops.divide(shares, ops.reduce_sum(shares, i64([-1]), True)).output(0)
    if decoder.expert_scale != 1:
        shares = ops.multiply(shares, f32(decoder.expert_scale)).output(0)
    return shares, chosen


def _sent(
    parts: Parts, tokens: ov.Output, shares: ov.Output, chosen: ov.Output, count: int
) -> tuple[ov.Output, ov.Output, ov.Output]:
    """For each expert the tokens, those that are sent there first: their shares and places, [experts, tokens], and how
    many of them it computes, [experts]. Padding is sent nowhere. Tokens are counted in integers: a runtime that
    computes in bfloat16 would round what exceeds 256.
    """
    is_real = ops.convert(ops.unsqueeze(parts.input("is_real", [-1], np.int32), i64(1)), "f32")
    shape = ops.shape_of(tokens, "i64")
    length = ops.gather(shape, i64(0), i64(0))
    nothing = ops.broadcast(f32(0), ops.concat([ops.unsqueeze(length, i64(0)), i64([count])], 0))
    spread = ops.scatter_elements_update(nothing, chosen, ops.multiply(shares, is_real), i64(1))
    first = ops.topk(ops.transpose(spread, i64([1, 0])), length, 1, "max", "value", "i64", stable=True)
    sent = ops.reduce_sum(ops.convert(ops.greater(first.output(0), f32(0)), "i64"), i64([1]), False)
    filled = ops.bitwise_and(ops.add(sent, i64(_ROWS - 1)), i64(-_ROWS))
    rows = ops.minimum(filled, length)
    return first.output(0), first.output(1), rows.output(0)


def _experts(parts: Parts, block: str) -> list[Expert]:
    weights = parts.weights
    names = [f"{block}ffn_{name}_exps" for name in ("gate", "up", "down")]
    matrices = [weights.matrices(f"{name}.weight") for name in names]
    biases = [weights.array(f"{name}.bias") for name in names]

    def expert(number: int) -> Expert:
        def product(rows: ov.Output, part: int) -> ov.Output:
            out = ops.matmul(rows, matrices[part][number], False, True)
            bias = biases[part]
            return (out if bias is None else ops.add(out, bias[number][None])).output(0)

        return lambda rows: product(parts.activated(product(rows, 0), product(rows, 1)), 2)

    return [expert(number) for number in range(len(matrices[0]))]


def _if_any_is_sent(
    expert: Expert,
    size: int,
    total: ov.Output,
    tokens: ov.Output,
    shares: ov.Output,
    order: ov.Output,
    count: ov.Output,
) -> ov.Output:
    """`total`, [tokens, size], with what an expert adds to the first `count` of the tokens in `order`."""

    def cut(row: ov.Node) -> ov.Output:
        return ops.reshape(ops.slice(row, i64([0]), counted, i64([1]), i64([1])), i64([-1]), False).output(0)

    before, seen = ops.parameter([-1, size], np.float32), ops.parameter([-1, size], np.float32)
    shared, ordered = ops.parameter([1, -1], np.float32), ops.parameter([1, -1], np.int64)
    counted = ops.parameter([1], np.int64)
    places, axis = cut(ordered), i64(0)
    added = ops.multiply(expert(ops.gather(seen, places, axis).output(0)), ops.unsqueeze(cut(shared), i64(1)))
    after = ops.scatter_update(before, places, ops.add(ops.gather(before, places, axis), added), axis)
    then = ov.Model([ops.result(after)], [before, seen, shared, ordered, counted], "expert")
    same = ops.parameter([-1, size], np.float32)
    otherwise = ov.Model([ops.result(same)], [same], "none")

    node = ops.if_op(ops.greater(count, i64(0)).output(0))
    node.set_then_body(then)
    node.set_else_body(otherwise)
    node.set_input(total, before, same)
    for value, parameter in ((tokens, seen), (shares, shared), (order, ordered), (count, counted)):
        node.set_input(value, parameter, None)
    return node.set_output(then.get_results()[0], otherwise.get_results()[0])
