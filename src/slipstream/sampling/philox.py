"""The random numbers of many rows at once: Philox4x64-10 (Salmon et al., SC 2011), as numpy's generator draws them."""

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = npt.NDArray[np.uint64]


def uniforms(keys: Words, counters: Words) -> npt.NDArray[np.float64]:
    """The first number in [0, 1) of `Generator(Philox(key=key, counter=counter))` for each pair, float64 [n]."""
    zero = np.zeros_like(keys)
    even, odd = np.stack((counters + np.uint64(1), zero)), np.stack((zero, zero))  # words 0 and 2, words 1 and 3
    key = np.stack((keys, zero))
    for _ in range(_ROUNDS):
        high, low = _product(even, _MULTIPLIERS)
        even, odd = high[::-1] ^ odd ^ key, low[::-1]
        key = key + _WEYL
    first: Words = even[0]
    return (first >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _product(words: Words, factor: Words) -> tuple[Words, Words]:
    """The upper and the lower half of 128-bit products."""
    low, high = words & _LOW, words >> _HALF
    factor_low, factor_high = factor & _LOW, factor >> _HALF
    middle = high * factor_low + (low * factor_low >> _HALF)
    other = low * factor_high + (middle & _LOW)
    return high * factor_high + (middle >> _HALF) + (other >> _HALF), words * factor
