"""What was used last, as much as there is room for."""

from collections import OrderedDict
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(OrderedDict[Key, Value]):
    """A dictionary of so many entries at most, in the order in which they were set: the newest replaces the oldest.

    Several threads may set, read and remove entries.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: Key, value: Value) -> None:
        self.pop(key, None)  # not moved to the end afterwards: another thread may have removed it by then
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.popitem(last=False)  # a plain dictionary looks for its first entry behind all that are gone
