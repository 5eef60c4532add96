"""What the backend takes for granted of the runtime's operators for recurrent states: fails if a new runtime differs.

A state is read from one slot and written to others at the places that `slots.writes` counts on; no token's bits and no
state's depend on how a sequence is cut, on its neighbours or on where it lies; a state is float32, in a slot as in the
operator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots, slot_inputs
from slipstream.models.gguf.recurrent import SLOT_INPUTS, make_operator
from slipstream.types import FloatArray

TOKENS = 96
HEADS, GROUPS, SIZE, STATE = 4, 2, 24, 40
Draw = Callable[[int], dict[str, FloatArray]]


def _normal(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.normal(size=shape).astype(np.float32)


RNG = np.random.default_rng(7)
KERNEL, BIAS, DECAY = _normal(RNG, 72, 1, 4), _normal(RNG, 72), -np.abs(_normal(RNG, HEADS))


@dataclass(frozen=True)
class Kind:
    """An operator: its inputs by name, those that are constants, the shape of a state, and its attributes."""

    name: str
    inputs: Mapping[str, tuple[int, ...] | FloatArray]
    state: tuple[int, ...]
    attributes: Mapping[str, Any]


KINDS = (
    Kind("PagedCausalConv1D", {"x": (72,), "states": (), "kernel": KERNEL, "bias": BIAS}, (72, 4), {}),
    Kind(
        "PagedGatedDeltaNet",
        {
            "query": (GROUPS, STATE),
            "key": (GROUPS, STATE),
            "value": (HEADS, SIZE),
            "states": (),
            "gate": (HEADS,),
            "beta": (HEADS,),
        },
        (HEADS, SIZE, STATE),
        {"use_qk_l2norm": True, "q_l2_norm_eps": 1e-6, "k_l2_norm_eps": 1e-6},
    ),
    Kind(
        "PagedSelectiveSSM",
        {
            "decay": DECAY,
            "time": (HEADS,),
            "in": (GROUPS, STATE),
            "x": (HEADS, SIZE),
            "out": (GROUPS, STATE),
            "states": (),
        },
        (HEADS, SIZE, STATE),
        {},
    ),
)


class Operator:
    """A model of one operator alone, over a table of states."""

    def __init__(self, kind: Kind, threads: int = 0) -> None:
        parameters: dict[str, ov.Node] = {}
        arguments = []
        for name, shape in kind.inputs.items():
            if isinstance(shape, np.ndarray):
                arguments.append(ops.constant(shape))
                continue
            sizes = [-1, *(kind.state if name == "states" else shape)]
            parameters[name] = ops.parameter(sizes, np.float32, name=name)
            arguments.append(parameters[name])
        steps = {name: ops.parameter([-1], np.int32, name=name) for name in ("subsequence_begins", *SLOT_INPUTS)}
        for name, node in (parameters | steps).items():
            node.output(0).set_names({name})
        node = make_operator(kind.name, [*arguments, *steps.values()], kind.attributes)
        model = ov.Model([ops.result(node.output(0))], [*parameters.values(), *steps.values()], "operator")
        options: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where a processor has that
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self.compiled = ov.Core().compile_model(model, "CPU", options)
        self._request = self.compiled.create_infer_request()
        self._kind = kind

    def table(self) -> FloatArray:
        return np.zeros((FIRST_SLOT + TOKENS + 4, *self._kind.state), np.float32)

    def tokens(self, seed: int, count: int = TOKENS) -> dict[str, FloatArray]:
        rng = np.random.default_rng(seed)
        found = {
            name: _normal(rng, count, *shape)
            for name, shape in self._kind.inputs.items()
            if not isinstance(shape, np.ndarray) and name != "states"
        }
        for name in found.keys() & {"gate"}:
            found[name] = -np.abs(found[name])
        for name in found.keys() & {"beta", "time"}:
            found[name] = 1 / (1 + np.exp(-found[name]))
        return found

    def run(self, table: FloatArray, *chunks: tuple[dict[str, FloatArray], int, Slots]) -> list[FloatArray]:
        """The outputs of a step of chunks: what goes in, what comes before, and slots."""
        sizes = [len(next(iter(tokens.values()))) for tokens, _, _ in chunks]
        begins = np.cumsum([0, *sizes], dtype=np.int32)
        joined = {name: np.concatenate([tokens[name] for tokens, _, _ in chunks]) for name in chunks[0][0]}
        places = slot_inputs([(past, size, slots) for size, (_, past, slots) in zip(sizes, chunks, strict=True)])
        inputs = {**joined, "states": table, "subsequence_begins": begins, **places}
        for name, array in inputs.items():
            self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        self._request.infer()
        out = self._request.get_output_tensor(0).data.copy()
        return [out[begin:end] for begin, end in pairwise(begins)]


def part(tokens: dict[str, FloatArray], start: int, end: int) -> dict[str, FloatArray]:
    return {name: np.ascontiguousarray(values[start:end]) for name, values in tokens.items()}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def operator(request: pytest.FixtureRequest) -> Operator:
    return Operator(request.param)


def whole(operator: Operator) -> tuple[FloatArray, FloatArray]:
    """What all tokens give in one chunk, and the state after each."""
    table = operator.table()
    kept = tuple((length, FIRST_SLOT + length) for length in range(1, TOKENS + 1))
    (out,) = operator.run(table, (operator.tokens(1), 0, Slots(EMPTY_SLOT, kept)))
    return out, table[FIRST_SLOT:]


CUTS = ([TOKENS - 1], [1], [TOKENS // 2], range(1, TOKENS), [2, 3, 5, 8, 13, 21, 34, 55, 89])


@pytest.mark.parametrize("beside", [0, 1, 9])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_bits_do_not_depend_on_cuts_and_neighbours(operator: Operator, cuts: Sequence[int], beside: int) -> None:
    expected, states = whole(operator)
    tokens, others, table = operator.tokens(1), operator.tokens(2), operator.table()
    found, start, source, target = [], 0, EMPTY_SLOT, FIRST_SLOT
    for end in [*cuts, TOKENS]:
        neighbours = [
            (part(others, 0, 1 + index), 0, Slots(EMPTY_SLOT, ((1 + index, FIRST_SLOT + 2 + index),)))
            for index in range(beside)
        ]
        mine = (part(tokens, start, end), start, Slots(source, ((end, target),)))
        place = beside // 2
        found.append(operator.run(table, *neighbours[:place], mine, *neighbours[place:])[place])
        assert np.array_equal(table[target], states[end])
        start, source, target = end, target, FIRST_SLOT + (target == FIRST_SLOT)
    assert np.array_equal(np.concatenate(found), expected)
    assert not table[EMPTY_SLOT].any()


def test_states_are_kept_where_they_are_wanted(operator: Operator) -> None:
    _, states = whole(operator)
    for past, end, lengths in ((0, TOKENS, (32, 64, 96)), (7, 60, (16, 32, 48, 60)), (5, 30, (29, 30)), (3, 9, (5, 9))):
        table = operator.table()
        table[FIRST_SLOT] = states[past]
        kept = tuple((length, FIRST_SLOT + 1 + index) for index, length in enumerate(lengths))
        operator.run(table, (part(operator.tokens(1), past, end), past, Slots(FIRST_SLOT, kept)))
        for length, slot in kept:
            assert np.array_equal(table[slot], states[length])
        assert np.array_equal(table[FIRST_SLOT], states[past]), "what is read is left as it is"


def test_a_state_may_be_replaced_in_its_slot(operator: Operator) -> None:
    """As the first that a step writes for its sequence: the selective operator refuses to read from others."""
    _, states = whole(operator)
    table = operator.table()
    for start, end in ((0, 40), (40, 41), (41, TOKENS)):
        slots = Slots(FIRST_SLOT if start else EMPTY_SLOT, ((end, FIRST_SLOT),))
        operator.run(table, (part(operator.tokens(1), start, end), start, slots))
    assert np.array_equal(table[FIRST_SLOT], states[TOKENS])


def test_a_dummy_token_leaves_no_trace(operator: Operator) -> None:
    expected, states = whole(operator)
    table = operator.table()
    table[FIRST_SLOT] = states[50]
    (out,) = operator.run(table, (part(operator.tokens(1), 50, 52), 50, Slots(FIRST_SLOT, ((51, FIRST_SLOT + 1),))))
    assert np.array_equal(table[FIRST_SLOT + 1], states[51])
    assert np.array_equal(out[0], expected[50])


def test_states_are_float32(operator: Operator) -> None:
    (port,) = [port for port in operator.compiled.inputs if port.any_name == "states"]
    assert port.element_type == ov.Type.f32


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bits_do_not_depend_on_threads(kind: Kind) -> None:
    one, two = whole(Operator(kind, threads=1)), whole(Operator(kind, threads=2))
    assert all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))
