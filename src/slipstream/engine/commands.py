"""Verbs to the engine about its memory, as data."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, TypeVarTuple, Unpack

from slipstream.backend import Blob
from slipstream.kv import KVMemory
from slipstream.types import IntArray

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Arguments = TypeVarTuple("Arguments")


class Command(Generic[T_co]):
    """What the engine carries out between steps."""

    def run(self, kv: KVMemory) -> Iterator[T_co | None]:
        """Do it, on the engine's thread. The last value is the result; steps may be run after each value before."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Call(Command[T_co]):
    """A method of the memory, and what to call it with."""

    method: Callable[..., T_co]
    arguments: tuple[object, ...]

    def run(self, kv: KVMemory) -> Iterator[T_co]:
        yield self.method(kv, *self.arguments)


def _verb(method: Callable[[KVMemory, Unpack[Arguments]], T]) -> Callable[[Unpack[Arguments]], Command[T]]:
    """A maker of commands that call a method of the memory; they take what it takes, and mean what it says."""
    return lambda *arguments: _Call(method, arguments)


Pin = _verb(KVMemory.pin)
Unpin = _verb(KVMemory.unpin)
Discard = _verb(KVMemory.discard)
Clear = _verb(KVMemory.clear)
Expect = _verb(KVMemory.expect)
Export = _verb(KVMemory.export)
Guard = _verb(KVMemory.guard)
Unguard = _verb(KVMemory.unguard)


@dataclass(frozen=True, slots=True)
class CountComputed(Command[list[int]]):
    """How many tokens of each conversation, of a tenant and its tokens, are in memory."""

    conversations: Sequence[tuple[str, IntArray]]

    def run(self, kv: KVMemory) -> Iterator[list[int]]:
        yield [kv.computed(tenant, tokens) for tenant, tokens in self.conversations]


@dataclass(frozen=True, slots=True)
class Install(Command[bool]):
    """Take in what was exported of the same tokens; False if memory has no room for it, or not the tokens before."""

    tenant: str
    tokens: IntArray
    start: int
    blob: Blob

    def run(self, kv: KVMemory) -> Iterator[bool]:
        yield from kv.install(self.tenant, self.tokens, self.start, self.blob)


class Task(Generic[T_co]):
    """A command to carry out, and where its result goes."""

    def __init__(self, command: Command[T_co]) -> None:
        self._command = command
        self._progress: Iterator[T_co | None] | None = None
        self._last: Any = None
        self.result: Future[T_co] = Future()

    def carry_on(self, kv: KVMemory) -> bool:
        """Do the next part of it; False if there was none left."""
        try:
            self._progress = self._progress or self._command.run(kv)
            self._last = next(self._progress)
        except StopIteration:
            self.result.set_result(self._last)
            return False
        except Exception as error:
            self.result.set_exception(error)
            return False
        return True
