"""Stands in for SGLang's package of kernels on a CPU: its names can be imported; to call one is an error.

Copied as `sgl_kernel` into the environment of that server alone, and never imported here.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A function for whatever is asked for."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_arguments: object, **_named: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is for other hardware than a CPU")

    return absent
