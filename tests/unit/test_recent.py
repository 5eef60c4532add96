"""A dictionary of what was used last."""

import sys
from types import FrameType
from typing import Any

from slipstream.recent import Recent


def test_the_newest_entry_replaces_the_oldest() -> None:
    recent: Recent[str, int] = Recent(2)
    for key, value in (("a", 1), ("b", 2), ("c", 3)):
        recent[key] = value
    assert list(recent.items()) == [("b", 2), ("c", 3)]


def test_what_is_set_again_is_the_newest_and_replaces_only_itself() -> None:
    recent: Recent[str, int | None] = Recent(2)
    for key, value in (("a", 1), ("b", 2), ("a", None), ("c", 3)):
        recent[key] = value
    assert list(recent.items()) == [("a", None), ("c", 3)]


def test_what_another_thread_removes_meanwhile_is_set_without_an_error() -> None:
    recent: Recent[str, int] = Recent(2)
    removed = 0

    def remove(frame: FrameType, event: str, arg: Any) -> Any:
        """Have another thread's turn before each line of it."""
        nonlocal removed
        if frame.f_code is Recent.__setitem__.__code__:
            removed += recent.pop("a", None) is not None
        return remove

    before = sys.gettrace()
    sys.settrace(remove)
    try:
        recent["a"] = 1
    finally:
        sys.settrace(before)
    assert removed == 1
    recent["a"] = 2
    assert recent == {"a": 2}
