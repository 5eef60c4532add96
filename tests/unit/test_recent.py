"""A dictionary of what was used last."""

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
