"""What a sandbox has to hold."""

import ctypes
import os
import time


class Foreign:
    """Code that nobody should trust."""

    def echo(self, value: object) -> object:
        return value

    def fail(self) -> None:
        raise ValueError("no such thing")

    def secret(self) -> str | None:
        return os.environ.get("SLIPSTREAM_API_KEY")

    def loop(self) -> None:
        while True:
            pass

    def hold_the_lock(self) -> int:
        return len(str(7 ** (10**8)))

    def sleep(self) -> None:
        time.sleep(10**6)

    def gobble(self) -> int:
        return len(bytearray(2**31))

    def crash(self) -> None:
        ctypes.string_at(0)

    def recurse(self, value: object) -> str:
        for _ in range(10**5):
            value = [value]
        return repr(value)
