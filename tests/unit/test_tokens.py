"""Token ids that continue others in the same memory are never changed by what continues them, too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.tokens import Tokens

Ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(first=Ids, continuations=st.lists(st.tuples(st.integers(0, 30), Ids), max_size=30))
def test_tokens_are_what_they_were_however_they_are_continued(
    first: list[int], continuations: list[tuple[int, list[int]]]
) -> None:
    made, expected = [Tokens(first)], [first]
    for which, more in continuations:
        continued = which % len(made)
        made.append(made[continued].extended(more))
        expected.append(expected[continued] + more)
        assert [tokens.ids.tolist() for tokens in made] == expected
        assert len(made[-1]) == len(expected[-1])


def test_a_continuation_takes_no_more_memory_than_it_adds() -> None:
    start = Tokens([]).extended(np.arange(1000, dtype=np.int32))
    first, second = start.extended([1, 2]), start.extended([3])
    assert np.shares_memory(start.ids, first.ids)
    assert np.shares_memory(first.ids, first.extended([4]).ids)
    assert not np.shares_memory(start.ids, second.ids)


def test_continuations_that_begin_alike_share_their_memory() -> None:
    start = Tokens([]).extended(np.arange(1000, dtype=np.int32))
    first = start.extended([1, 2])
    longer, shorter = start.extended([1, 2, 3]), start.extended([1])
    assert np.shares_memory(first.ids, longer.ids)
    assert np.shares_memory(first.ids, shorter.ids)
    assert first.ids[-2:].tolist() == [1, 2]
    assert longer.ids[-3:].tolist() == [1, 2, 3]
    assert shorter.ids[-1:].tolist() == [1]


def test_nobody_can_change_them() -> None:
    given = np.arange(3, dtype=np.int32)
    tokens = Tokens(given)
    given[0] = 7
    assert tokens.ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids[0] = 7
