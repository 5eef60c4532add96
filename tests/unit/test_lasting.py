"""What a process keeps is not looked through for garbage."""

import gc

from slipstream.lasting import lasting


def test_what_is_made_within_is_left_alone_and_what_comes_later_is_not() -> None:
    with lasting():
        assert not gc.isenabled()
        kept = [[]]
    later = [[]]
    try:
        assert gc.isenabled()
        looked_through = {id(each) for each in gc.get_objects()}
    finally:
        gc.unfreeze()
    assert id(later) in looked_through
    assert id(kept) not in looked_through
