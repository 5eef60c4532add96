"""A look at the engine's memory from a test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from slipstream.engine.commands import Command
from slipstream.kv import KVMemory

T = TypeVar("T")


@dataclass(frozen=True)
class Look(Command[T]):
    """Call a function with the memory, on the engine's thread, between two steps."""

    function: Callable[[KVMemory], T]

    def run(self, kv: KVMemory) -> Iterator[T]:
        yield self.function(kv)
