"""What every backend with sliding windows must keep, and may give back."""

from collections.abc import Callable, Sequence

import numpy as np

from slipstream.backend import Chunk
from slipstream.backend.paged import BlockModel, PagedBackend
from slipstream.backend.steps import SCRATCH_BLOCK, ZERO_BLOCK
from slipstream.backend.window_store import WindowState, WindowStore
from slipstream.types import FloatArray, IntArray


def check_given_back(
    backend: PagedBackend[BlockModel], text: IntArray, *, step: int, nan: int
) -> tuple[WindowState, Callable[[WindowState, int], None]]:
    """Check that a text computed in steps has the bits of one computed at once, whatever is in blocks it doesn't hold.

    `nan` is how the model's precision writes what isn't a number. Returns the state, and a check that another one of
    this text goes on, in steps of so many tokens, with the same bits.
    """
    store, end = backend.store, len(text) - 100
    assert isinstance(store, WindowStore)

    def logits(state: WindowState, count: int) -> FloatArray:
        ticket = backend.launch([Chunk(state, text[state.length : state.length + count], 1)])
        ticket.wait()
        return ticket.logits.copy()

    whole, state = store.open(len(text)), store.open(len(text))
    expected = logits(whole, end), logits(whole, 1), logits(whole, 99)

    def check(state: WindowState, step: int) -> None:
        while state.length < end:
            found = logits(state, min(step, end - state.length))
        assert np.array_equal(found, expected[0])

    check(state, step)
    assert np.array_equal(logits(state, 1), expected[1])
    store.release(whole)
    _fill(backend.model, [SCRATCH_BLOCK, *store._kv.pool._free[: store._kv.pool.free]], nan)
    assert np.array_equal(logits(state, 99), expected[2]), "what nobody holds is read"
    _fill(backend.model, range(ZERO_BLOCK + 1), 0)
    store.trim(state)
    return state, check


def _fill(model: BlockModel, blocks: Sequence[int], word: int) -> None:
    named = np.array(blocks, np.int32)
    model.write_blocks(named, np.full_like(model.read_blocks(named).wait(), word))
