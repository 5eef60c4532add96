"""Tiles of what belongs to groups that lie one behind the other, when only a device knows how large these are.

A program for each group finds its tiles' places alone. The groups before take a tile each, and one more for every full
tile, or one for each element, if these are fewer. So some tiles stay empty, and how many there are depends on the
groups and the elements alone.
"""

import triton
import triton.language as tl


@triton.jit
def first_tile(group, begin, TILE: tl.constexpr):
    """The number of a group's first tile, if so many elements come before it."""
    return tl.minimum(begin, group + begin // TILE)
