"""What a model's sums are computed with, and a step as it lies on the device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from slipstream.backend.steps import StepInputs
from slipstream.backend.torch.definitions import ClampedGate, Norm, Rotation
from slipstream.backend.torch.quantised import Weight
from slipstream.backend.torch.staging import Staging

Tensor: TypeAlias = torch.Tensor

SEGMENT = 256
"""Keys that attention sums up at a time. A token's segments begin at the same positions in every step, and are combined
in order; so how many there are and where a chunk begins changes nothing."""

TOKEN_TILES = (16, 32, 64, 128)
"""Tokens that a kernel's product takes at a time: the smallest that holds the step's."""

_NO_PAST = np.zeros(1, np.int32)
"""Of the empty chunk behind the others."""
CHUNK_LENGTHS = (4, 16, 64)
"""Tokens of chunks that steps differ by: kernels may look at more of a chunk's queries at a time if it's long."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of `n` tokens of several chunks on the device; integers are int32 where nothing else is said."""

    tokens: Tensor
    """Int64 [1, n]."""
    positions: Tensor
    """Int64 [1, n], of each token in its sequence."""
    blocks: Tensor
    """Int64 [tables, n], the block that takes a token's KV, by table."""
    slots: Tensor
    """Int64 [n], its place in the block."""
    pasts: Tensor
    """[chunks], tokens before a chunk. The last chunk is empty, and others may be."""
    begins: Tensor
    """[chunks + 1], where chunks begin in the step."""
    tables: Tensor
    """[sum of block counts, tables], the blocks of all chunks, one chunk after the other. Layers without windows have
    the first table; see `layers.seated`."""
    table_begins: Tensor
    """[chunks + 1], where a chunk's blocks begin in the tables."""
    logit_rows: Tensor
    """Int64 [rows], the tokens that give logits."""
    segments: int
    """Those of its longest sequence, or more."""
    longest: int
    """Tokens of its longest chunk, rounded up to one of `CHUNK_LENGTHS`, if there is one."""
    chunks: tuple[tuple[int, int, int], ...]
    """On the host: the past, length and first block in the tables of chunks that have tokens; none if it's recorded."""

    @classmethod
    def of(cls, inputs: StepInputs, block_size: int, staging: Staging) -> "Step":
        """A step as the planner lays it out (`steps.lay_out`)."""
        arrays = cls.arrays(inputs, block_size)
        lengths = np.diff(inputs["subsequence_begins"]).tolist()
        tables = inputs["block_indices_begins"].tolist()[:-1]
        return cls(
            **staging.upload(arrays),
            segments=segments_of(int(inputs["max_context_len"])),
            longest=longest_of(inputs),
            chunks=tuple(zip(inputs["past_lens"].tolist(), lengths, tables, strict=True)),
        )

    @staticmethod
    def arrays(inputs: StepInputs, block_size: int) -> dict[str, npt.NDArray[Any]]:
        """What the device has of it, by name."""
        positions, begins = inputs["position_ids"], inputs["subsequence_begins"]
        begins_of_tables = inputs["block_indices_begins"]
        places = begins_of_tables[:-1].repeat(begins[1:] - begins[:-1]) + positions // block_size
        return {
            "tokens": inputs["input_ids"][None],
            "positions": positions[None],
            "blocks": inputs["block_tables"][:, places].astype(np.int64),
            "slots": positions % block_size,
            "pasts": np.concatenate((inputs["past_lens"], _NO_PAST)),
            "begins": np.concatenate((begins, begins[-1:])),
            "tables": inputs["block_tables"].T,
            "table_begins": np.concatenate((begins_of_tables, begins_of_tables[-1:])),
            "logit_rows": inputs["logit_rows"],
        }


class StepOutput(NamedTuple):
    """What a step computes besides keys and values."""

    logits: Tensor
    """[rows, vocab_size], in the model's precision."""
    argmax: Tensor
    """Int64 [rows], as `Operators.argmax` has it: most rows are greedy, and ask for nothing else."""


def segments_of(keys: int) -> int:
    """The segments of so many keys."""
    return -(-keys // SEGMENT)


def longest_of(inputs: StepInputs) -> int:
    """A step's `longest`, of chunks that aren't padding."""
    begins = inputs["subsequence_begins"]
    most = ((begins[1:] - begins[:-1]) * inputs["is_real"][begins[:-1]]).max()
    return next((length for length in CHUNK_LENGTHS if most <= length), CHUNK_LENGTHS[-1])


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What varies between the attentions of models, and of layers."""

    scale: float
    window: int = 0
    """Keys that a token sees, its own included; 0 for all before it."""
    softcap: float = 0.0
    """What scores are squeezed between, by a hyperbolic tangent; 0 for no limit."""
    table: int = 0
    """Which of a step's tables names the layer's blocks."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of each element, by what `torch` has for it, and what it's called with."""

    function: Callable[..., Tensor]
    x: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rotating:
    """Queries and keys [1, heads, n, dim] that are turned by angles [1, n, …], as `definitions.rotated` has it."""

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    rotation: Rotation


class Operators(Protocol):
    """Every operator that adds up many numbers, and small ones that cost a GPU more as several kernels.

    A row of each depends on that row's inputs alone.
    """

    name: str
    """Part of what decides a model's bits."""
    recordable: bool
    """Whether what they launch depends on shapes and `Step.segments` alone, and nobody waits for the device."""
    may_be_slower: bool
    """Whether the next ones may be faster, so that both are measured."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`: x [..., k], weight [n, k], bias [n]; [..., n].

        Elements of a quantised weight have the precision of `x` once they are unpacked.
        """
        ...

    def activate(self, given: Activation) -> Tensor:
        """A function of each element."""
        ...

    def gate(self, given: Activation, x: Tensor) -> Tensor:
        """The same, rounded, times the elements of `x`, which has the same shape [..., n, k]."""
        ...

    def gate_clamped(self, both: Tensor, gate: ClampedGate) -> Tensor:
        """Gates and what they gate [n, 2 k], as `definitions.gated` has it; [n, k]."""
        ...

    def attend(self, query: Tensor, kv: Tensor, step: Step, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        """Causal attention of each chunk to its sequence: query [n, heads, dim], kv [blocks, 2, kv_heads, 32, dim].

        A sink is a score [heads] that takes part in the softmax and has no value. Returns [n, heads, dim].
        """
        ...

    def write(self, kv: Tensor, key: Tensor, value: Tensor, blocks: Tensor, slots: Tensor) -> None:
        """Put keys and values [n, kv_heads, dim] into slots of blocks, int64 [n] each.

        If a head's values aren't all finite, they become 0, and its keys no numbers: so those who see the token get no
        numbers, and those beside them, for whom it is multiplied by 0, have nothing of it.
        """
        ...

    def experts(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in the router's order.

        `module` is the experts' module of `transformers`, or as it is; x [n, k], index and weights [n, experts of a
        token]. Its weights `gate_up_proj` and `down_proj` are for all experts, and may be quantised.
        """
        ...

    def norm(self, x: Tensor, weight: Tensor, norm: Norm, terms: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows [..., k] normed, as `definitions.normed` has it.

        If there are `terms`, contiguous, nobody has computed `x` yet: it becomes their sum.
        """
        ...

    def rotate(self, given: Rotating, query: Tensor, key: Tensor) -> None:
        """Fill queries and keys with those turned."""
        ...

    def rotate_and_write(self, given: Rotating, value: Tensor, kv: Tensor, blocks: Tensor, slots: Tensor) -> Tensor:
        """Queries turned; keys, turned too, and values [1, kv_heads, n, dim] go where `write` has them."""
        ...

    def argmax(self, logits: Tensor, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The likeliest token of each row of logits [rows, vocab_size], and of equals the lowest: int64 [rows].

        `masked` names rows, int64 [n], and has a mask for each, as `Row.mask` int32 [n, words]: then the likeliest of
        the allowed tokens of these rows, int64 [n]. `NO_TOKEN` if its logit is infinite or no number.
        """
        ...
