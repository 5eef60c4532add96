"""The graph of a decoder with paged attention, built from a GGUF's tensors.

Activations are float32 [tokens, 1, size]; weights stay compressed, in the form that OpenVINO's kernels take as it is.
Inputs and attention are those that OpenVINO's own paged transformation makes, so one backend runs both kinds of model.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import _PagedAttentionExtension as PagedAttention

from slipstream.models.gguf.experts import mixture
from slipstream.models.gguf.families import Decoder, Latent, Layer, Rotation
from slipstream.models.gguf.file import GGUF
from slipstream.models.gguf.parts import Parts, const, f32, i64
from slipstream.models.gguf.recurrent import RECURRENT

BLOCK_SIZE = 32
"""Tokens of a KV block, as the CPU plugin has them."""

_STEP_INPUTS = {
    "past_lens": [-1],
    "subsequence_begins": [-1],
    "block_indices": [-1],
    "block_indices_begins": [-1],
    "max_context_len": [],
}


def build(file: GGUF, decoder: Decoder) -> ov.Model:
    """The model of a file, with inputs as in `backend.steps`, and logits float32 [rows, 1, vocabulary]."""
    return _Graph(file, decoder).model()


class _Graph:
    """A graph on its way."""

    def __init__(self, file: GGUF, decoder: Decoder) -> None:
        self._name = file.architecture
        self._decoder = decoder
        self._angles: dict[int, tuple[ov.Output, ov.Output]] = {}
        self._parts = parts = Parts(file, decoder)
        self._inputs, self._weights = parts.inputs, parts.weights
        self._input, self._norm, self._projected = parts.input, parts.norm, parts.projected

    def model(self) -> ov.Model:
        decoder = self._decoder
        ids, positions = self._input("input_ids", [-1], np.int64), self._input("position_ids", [-1], np.int64)
        for name, shape in _STEP_INPUTS.items():
            self._input(name, shape, np.int32)
        embeddings = self._weights.matrix("token_embd.weight")
        x = ops.gather(embeddings, ops.unsqueeze(ops.convert(ids, "i32"), i64(1)), np.int32(0)).output(0)
        if decoder.embedding_scale != 1:
            x = ops.multiply(x, f32(decoder.embedding_scale)).output(0)
        self._positions = ops.convert(ops.unsqueeze(positions, i64([1, 2])), "f32").output(0)
        for index, layer in enumerate(decoder.layers):
            x = self._add(x, self._mixed(index, layer, x))
            x = self._add(x, self._feed_forward(index, x))
            if (scale := self._weights.array(f"blk.{index}.layer_output_scale.weight")) is not None:
                x = ops.multiply(x, scale).output(0)
            x.get_node().set_friendly_name(f"layer.{index}")
        x = ops.gather(x, self._input("logit_rows", [-1], np.int64), np.int64(0)).output(0)
        x = self._norm(x, decoder.family.output_norm)
        if "output.weight" in self._weights:
            logits = self._weights.product(x, "output.weight")
        else:
            logits = ops.matmul(x, embeddings, False, True).output(0)
        if decoder.logit_scale != 1:
            logits = ops.multiply(logits, f32(decoder.logit_scale)).output(0)
        if decoder.logit_cap:
            cap = f32(decoder.logit_cap)
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap).output(0)
        logits.set_names({"logits"})
        self._weights.check_all_used()
        return ov.Model([ops.result(logits, name="logits")], list(self._inputs.values()), self._name)

    # --- parts of a layer ---

    def _mixed(self, index: int, layer: Layer, x: ov.Output) -> ov.Output:
        """What a layer adds to the tokens from those before them."""
        x = self._norm(x, f"blk.{index}.attn_norm.weight")
        if layer.is_recurrent:
            return RECURRENT[self._decoder.family.recurrent](self._parts, index, x)
        return self._attention(index, layer, x)

    def _attention(self, index: int, layer: Layer, x: ov.Output) -> ov.Output:
        decoder, block = self._decoder, f"blk.{index}."
        if decoder.latent is not None:
            return self._latent_attention(index, layer, decoder.latent, x)
        query, key, value = self._query_key_value(block, layer, x)
        gates: list[ov.Output] = []
        if decoder.family.gated_attention:
            both = ops.reshape(query, i64([0, 0, layer.heads, -1]), True)
            query, *gates = (
                ops.reshape(each, i64([0, 0, -1]), True).output(0) for each in ops.split(both, i64(-1), 2).outputs()
            )
        query = self._placed(query, f"{block}attn_q_norm.weight", layer, layer.heads)
        key = self._placed(key, f"{block}attn_k_norm.weight", layer, layer.kv_heads)
        if decoder.temperature is not None:
            query = self._tempered(query, *decoder.temperature)
        if decoder.family.value_norm:
            heads = ops.reshape(value, i64([0, layer.kv_heads, layer.head_size]), True)
            value = self._parts.normalised(heads.output(0))
        value = ops.reshape(value, i64([0, layer.kv_heads * layer.head_size]), True).output(0)
        sizes = layer.head_size, layer.head_size
        seen = ops.unsqueeze(self._paged_attention(index, layer, sizes, query, key, value), i64(1)).output(0)
        for gate in gates:
            seen = ops.multiply(seen, ops.sigmoid(gate)).output(0)
        out = self._projected(seen, f"{block}attn_output")
        return self._norm(out, f"{block}post_attention_norm.weight") if decoder.family.post_norms else out

    def _latent_attention(self, index: int, layer: Layer, latent: Latent, x: ov.Output) -> ov.Output:
        """Attention to what heads share; see `Latent`."""
        block, heads, rank, turned = f"blk.{index}.", layer.heads, latent.rank, latent.turned
        if f"{block}attn_q_a.weight" in self._weights:
            narrow = self._norm(self._projected(x, f"{block}attn_q_a"), f"{block}attn_q_a_norm.weight")
            query = self._projected(narrow, f"{block}attn_q_b")
        else:
            query = self._projected(x, f"{block}attn_q")
        query = ops.reshape(query, i64([0, heads, latent.plain + turned]), True)
        plain, placed = ops.variadic_split(query, i64(-1), i64([latent.plain, turned])).outputs()
        plain = self._by_head(plain, f"{block}attn_k_b.weight")
        query = ops.reshape(ops.concat([plain, self._turned(placed, layer)], -1), i64([0, -1]), True)
        both = self._projected(x, f"{block}attn_kv_a_mqa")
        shared, placed = ops.variadic_split(both, i64(-1), i64([rank, turned])).outputs()
        value = self._norm(shared, f"{block}attn_kv_a_norm.weight")
        key = ops.reshape(ops.concat([value, self._turned(placed, layer)], -1), i64([0, -1]), True)
        value = ops.reshape(value, i64([0, -1]), True)
        step = query.output(0), key.output(0), value.output(0)
        seen = self._paged_attention(index, layer, (rank + turned, rank), *step)
        seen = ops.reshape(seen, i64([0, heads, rank]), True).output(0)
        out = self._by_head(seen, f"{block}attn_v_b.weight")
        return self._projected(ops.reshape(out, i64([0, 1, -1]), True).output(0), f"{block}attn_output")

    def _by_head(self, x: ov.Output, name: str) -> ov.Output:
        """Heads [tokens, heads, in], each times a matrix of its own: [tokens, heads, out]."""
        order = i64([1, 0, 2])
        return ops.transpose(self._weights.product(ops.transpose(x, order).output(0), name), order).output(0)

    def _turned(self, x: ov.Output, layer: Layer) -> ov.Output:
        """Heads [tokens, heads, size], turned by their positions."""
        assert layer.rotation is not None
        return ops.squeeze(self._rotated(ops.unsqueeze(x, i64(2)).output(0), layer.rotation), i64(2)).output(0)

    def _placed(self, x: ov.Output, norm: str, layer: Layer, heads: int) -> ov.Output:
        """Queries or keys, [tokens, heads * size], normalised and turned by their positions."""
        size, rotation, late = layer.head_size, layer.rotation, self._decoder.family.norm_after_rope
        by_head = norm in self._weights and self._weights.shape(norm)[0] == size
        if not by_head:
            x = self._norm(x, norm)
        x = ops.reshape(x, i64([0, 0, heads, size]), True).output(0)
        if by_head and not late:
            x = self._norm(x, norm)
        x = ops.transpose(x, i64([0, 2, 1, 3])).output(0)
        if rotation is not None:
            x = self._rotated(x, rotation)
        if by_head and late:
            x = self._norm(x, norm)
        x = ops.transpose(x, i64([0, 2, 1, 3])).output(0)
        return ops.reshape(x, i64([0, heads * size]), True).output(0)

    def _query_key_value(self, block: str, layer: Layer, x: ov.Output) -> list[ov.Output]:
        if f"{block}attn_qkv.weight" not in self._weights:
            names = "qkv" if f"{block}attn_v.weight" in self._weights or not self._decoder.family.value_norm else "qk"
            found = [self._projected(x, f"{block}attn_{name}") for name in names]
            return [*found[:2], found[-1]]
        size = layer.head_size
        sizes = [layer.heads * size, layer.kv_heads * size, layer.kv_heads * size]
        together = self._projected(x, f"{block}attn_qkv")
        return list(ops.variadic_split(together, i64(-1), i64(sizes)).outputs())

    def _rotated(self, x: ov.Output, rotation: Rotation) -> ov.Output:
        """Heads [tokens, heads, 1, size], turned by their positions."""
        turned, size = 2 * len(rotation.frequencies), x.get_partial_shape()[3].get_length()
        rest: list[ov.Output] = []
        if turned < size:
            x, *rest = ops.variadic_split(x, i64(-1), i64([turned, size - turned])).outputs()
        cosines, sines = self._angles_of(rotation)
        low, high = (ops.slice(x, [a], [b], [1], [3]) for a, b in ((0, turned // 2), (turned // 2, turned)))
        across = ops.concat([ops.multiply(high, f32(-1)), low], -1)
        x = ops.add(ops.multiply(x, cosines), ops.multiply(across, sines)).output(0)
        return ops.concat([x, *rest], -1).output(0) if rest else x

    def _angles_of(self, rotation: Rotation) -> tuple[ov.Output, ov.Output]:
        """Cosines and sines of the step's positions, [tokens, 1, 1, size]."""
        if id(rotation) not in self._angles:
            angles = ops.multiply(self._positions, rotation.frequencies.reshape(1, 1, -1))
            angles = ops.concat([angles, angles], -1)
            found = [ops.cos(angles), ops.sin(angles)]
            if rotation.scale != 1:
                found = [ops.multiply(each, f32(rotation.scale)) for each in found]
            cosines, sines = (ops.unsqueeze(each, i64(1)).output(0) for each in found)
            self._angles[id(rotation)] = cosines, sines
        return self._angles[id(rotation)]

    def _tempered(self, query: ov.Output, factor: float, length: int) -> ov.Output:
        far = ops.log(ops.add(ops.floor(ops.divide(self._positions, f32(length))), f32(1)))
        scale = ops.squeeze(ops.add(ops.multiply(far, f32(factor)), f32(1)), i64(2))
        return ops.multiply(query, scale).output(0)

    def _paged_attention(
        self,
        index: int,
        layer: Layer,
        sizes: tuple[int, int],
        query: ov.Output,
        key: ov.Output,
        value: ov.Output,
    ) -> ov.Output:
        """What tokens see, [tokens, heads * size]; `sizes` are those of a key and a value."""
        caches = [
            self._input(f"{kind}_cache.{index}", [-1, layer.kv_heads, BLOCK_SIZE, size], np.float16)
            for kind, size in zip(("key", "value"), sizes, strict=True)
        ]
        step = [self._inputs[name].output(0) for name in _STEP_INPUTS]
        sinks = self._weights.array(f"blk.{index}.attn_sinks.weight")
        none_i, none_f, zero = const([], np.int32), const([], np.float32), const(0, np.int32)
        inputs = [
            *(query, key, value, *(cache.output(0) for cache in caches), *step[:4]),
            *(f32(self._decoder.attention_scale), const(layer.window, np.int32), none_f, step[4]),
            *(none_i, none_i, none_i, none_f, none_f, zero, zero),
            const(np.zeros((0, 0, 0, 0)) if sinks is None else sinks.reshape(1, -1, 1, 1), np.float32),
            *(zero, none_i, none_i, none_i, none_i, const([], np.uint8), none_i),
        ]
        node = PagedAttention([each if isinstance(each, ov.Output) else each.output(0) for each in inputs])
        node.set_friendly_name(f"PagedAttention.{index}")
        return node.output(0)

    def _feed_forward(self, index: int, x: ov.Output) -> ov.Output:
        """What the feed-forward part, or a mixture of them, adds to the tokens."""
        block = f"blk.{index}."
        x = self._norm(x, f"{block}{self._decoder.family.feed_forward_norm}.weight")
        if f"{block}ffn_gate_inp.weight" in self._weights:
            out = self._experts(block, x)
        elif f"{block}ffn_gate.weight" in self._weights:
            out = self._gated(x, block, "")
        else:  # both in one
            gate, up = ops.split(self._projected(x, f"{block}ffn_up"), i64(-1), 2).outputs()
            out = self._projected(self._parts.activated(gate, up), f"{block}ffn_down")
        return self._norm(out, f"{block}post_ffw_norm.weight")

    def _gated(self, x: ov.Output, block: str, kind: str) -> ov.Output:
        gate, up = (self._projected(x, f"{block}ffn_{name}{kind}") for name in ("gate", "up"))
        return self._projected(self._parts.activated(gate, up), f"{block}ffn_down{kind}")

    def _experts(self, block: str, x: ov.Output) -> ov.Output:
        """The chosen experts' sum, and what those add that all tokens go to."""
        total, weights = mixture(self._parts, block, x), self._weights
        if f"{block}ffn_gate_shexp.weight" in weights:
            shared = self._gated(x, block, "_shexp")
            if (weight := weights.array(f"{block}ffn_gate_inp_shexp.weight")) is not None:
                share = ops.sigmoid(ops.matmul(x, const(weight.reshape(1, -1), np.float32), False, True))
                shared = ops.multiply(shared, share).output(0)
            total = ops.add(total, shared).output(0)
        return total

    # --- smaller parts ---

    def _add(self, x: ov.Output, more: ov.Output) -> ov.Output:
        if self._decoder.residual_scale != 1:
            more = ops.multiply(more, f32(self._decoder.residual_scale)).output(0)
        return ops.add(x, more).output(0)
