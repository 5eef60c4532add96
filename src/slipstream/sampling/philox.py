"""The random numbers of many rows at once: Philox4x64-10 (Salmon et al., SC 2011), as numpy's generator draws them."""

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = npt.NDArray[np.uint64]


def uniforms(keys: Words, counters: Words) -> npt.NDArray[np.float64]:
    """The first number in [0, 1) of `Generator(Philox(key=key, counter=counter))` for each pair, float64 [n]."""
    zero = np.zeros_like(keys)
    words = counters + np.uint64(1), zero, zero, zero
    low_key, high_key = keys, zero
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(words[0], _MULTIPLIERS[0]), _product(words[2], _MULTIPLIERS[1])
        words = high1 ^ words[1] ^ low_key, low1, high0 ^ words[3] ^ high_key, low0
        low_key, high_key = low_key + _WEYL[0], high_key + _WEYL[1]
    return (words[0] >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _product(words: Words, factor: np.uint64) -> tuple[Words, Words]:
    """The upper and the lower half of 128-bit products."""
    low, high = words & _LOW, words >> _HALF
    factor_low, factor_high = factor & _LOW, factor >> _HALF
    middle = high * factor_low + (low * factor_low >> _HALF)
    other = low * factor_high + (middle & _LOW)
    return high * factor_high + (middle >> _HALF) + (other >> _HALF), words * factor
