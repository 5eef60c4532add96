"""Block tables of a graph's layers: those with a sliding window have tables of their own, and no memory of their own.

Layers are stacked so that a block is of use to either kind: the layers that see everything lie side by side in it, as
do as many of those with windows, so a block of tokens takes one block for the former, and for the latter one in each of
their tables. Layers whose blocks are smaller than others' share one: one layer's lie at even numbers, say, the next
one's at odd ones.

If all layers have windows, the first of them stands for those that see everything: its blocks are all kept, which costs
one layer's memory, and sequences have a block table as always.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager

from slipstream.backend.lowered import ATTENTION
from slipstream.backend.steps import StepInputs

BLOCK_INDICES = "block_indices"
_NAME = re.compile(rf"{BLOCK_INDICES}\.(\d+)\.(\d+)\.(\d+)\.(\d+)\.([\d_]+)")
_KEYS, _TABLE, _WINDOW = 3, 7, 10
"""Inputs of an attention operation."""


@dataclass(frozen=True, slots=True)
class LayerTable:
    """A block table as an input of a graph, whose name says all of it: graphs are kept as files."""

    window: int
    """Tokens that its layers see, themselves among them; 0 if all."""
    row: int
    """Which of a sequence's tables it is: 0 for layers whose blocks are all kept, others from 1 on."""
    of: int
    """How many blocks of its layers lie in one."""
    at: int
    """Which of them is theirs."""
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the input."""
        return f"{BLOCK_INDICES}.{self.window}.{self.row}.{self.of}.{self.at}.{'_'.join(self.layers)}"

    @classmethod
    def among(cls, names: Iterable[str]) -> list["LayerTable"]:
        """Those among the names of a graph's inputs."""
        return [table for table in map(_named, names) if table is not None]


@cache
def _named(name: str) -> LayerTable | None:
    if (found := _NAME.fullmatch(name)) is None:
        return None
    window, row, of, at = map(int, found.groups()[:4])
    return LayerTable(window, row, of, at, tuple(found[5].split("_")))


def named(inputs: StepInputs, names: Collection[str]) -> StepInputs:
    """Those of a step's inputs that a graph has, each layer's table among them."""
    given = {name: array for name, array in inputs.items() if name in names}
    for table in LayerTable.among(names):
        given[table.name] = inputs["block_tables"][table.row] * np.int32(table.of) + np.int32(table.at)
    return given


def set_apart(model: ov.Model) -> None:
    """Give layers with sliding windows tables of their own, in a graph with paged attention.

    Nothing changes where layers of a kind differ in the size of a block, or keys from values, or layers of another kind
    have recurrent states.
    """
    if any("_state_table." in parameter.get_friendly_name() for parameter in model.get_parameters()):
        return
    layers = [_Layer(node) for node in model.get_ops() if node.get_type_name() == ATTENTION]
    layers.sort(key=lambda layer: (len(layer.number), layer.number))
    full = [layer for layer in layers if layer.window == 0]
    windowed = [layer for layer in layers if layer.window]
    window = max((layer.window for layer in windowed), default=0)
    seen = 0 if full else window
    if not full:
        full, windowed = windowed[:1], windowed[1:]
    if not windowed or any(len({layer.elements for layer in kind}) > 1 for kind in (full, windowed)):
        return
    width = max(full[0].elements, windowed[0].elements)
    if width % full[0].elements or width % windowed[0].elements or any(layer.lopsided for layer in layers):
        return
    side_by_side = -(-len(full) // (width // full[0].elements))
    for kind, visible, first in ((full, seen, 0), (windowed, window, 1)):
        of = width // kind[0].elements
        groups = (kind[at : at + side_by_side] for at in range(0, len(kind), side_by_side))
        for number, group in enumerate(groups):
            table = LayerTable(visible, first + number // of, of, number % of, tuple(layer.number for layer in group))
            if (table.window, table.row, of) == (0, 0, 1):
                continue  # the graph's own
            parameter = ops.parameter([-1], np.int32, name=table.name)
            parameter.output(0).set_names({table.name})
            model.add_parameters([parameter])
            for layer in group:
                layer.node.input(_TABLE).replace_source_output(parameter.output(0))
    model.validate_nodes_and_infer_types()


class _Layer:
    """An attention operation."""

    def __init__(self, node: ov.Node) -> None:
        self.node = node
        notes = node.get_rt_info()
        self.elements, values = (
            int(notes[f"num_{kind}_heads"].get()) * int(notes[f"{kind}_head_size"].get()) for kind in "kv"
        )
        self.lopsided = self.elements != values
        self.window = _constant(node.input_value(_WINDOW))
        self.number = node.input_value(_KEYS).get_node().get_friendly_name().rpartition(".")[2]


def _constant(output: ov.Output) -> int:
    """A number that may have to be worked out, and is put in the graph's place for it."""
    alone = ov.Model([ops.result(output)], [])
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(alone)
    return int(alone.get_results()[0].input_value(0).get_node().get_data().item())
