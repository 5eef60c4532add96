"""The memory of recurrent states: a table for each layer that has one, all with the same slots."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import openvino as ov

from slipstream.backend.aligned import zeros_aligned

Words = npt.NDArray[np.uint16]


class SlotMemory:
    """The state tables among a compiled model's inputs; see `SlotStates`. There are no slots before `allocate`.

    A slot's content is that of all its layers, one after the other, as words of 16 bits.
    """

    def __init__(self, inputs: Iterable[ov.ConstOutput]) -> None:
        self._ports = [port for port in inputs if "_state_table." in port.any_name]
        self._shapes = [[size.get_length() for size in list(port.partial_shape)[1:]] for port in self._ports]
        self._words = [
            int(np.prod(shape)) * port.element_type.size // 2
            for port, shape in zip(self._ports, self._shapes, strict=True)
        ]
        self.slot_bytes: int = 2 * sum(self._words)
        """Memory that a slot takes, in all layers; 0 for a model without recurrent states."""
        self._tables: list[Words] = []
        self.allocate(0)

    def allocate(self, num_slots: int) -> None:
        """Have so many slots, all zero, in place of those before; pages become resident when first written."""
        self._tables = [zeros_aligned((num_slots, words)) for words in self._words]

    def attach(self, request: ov.InferRequest) -> None:
        """Let a request compute on the slots."""
        for port, table, shape in zip(self._ports, self._tables, self._shapes, strict=True):
            sizes = ov.Shape([len(table), *shape])
            values = table.view(np.uint32) if port.element_type.size == 4 else table
            request.set_tensor(port.any_name, ov.Tensor(values.reshape(sizes), sizes, port.element_type))

    def copy(self, source: int, target: int) -> None:
        """Copy a slot's content to another."""
        for table in self._tables:
            table[target] = table[source]

    def read(self, slot: int) -> Words:
        """A copy of what a slot holds."""
        return np.concatenate([table[slot] for table in self._tables])

    def write(self, slot: int, content: Words) -> None:
        """Fill a slot with what `read` gave."""
        first = 0
        for table, words in zip(self._tables, self._words, strict=True):
            table[slot] = content[first : first + words]
            first += words
