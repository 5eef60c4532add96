"""A device that is checked: how large everything is there, and how long it takes."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import torch

from slipstream.backend.torch.graphs import CudaRecorder
from slipstream.backend.torch.operators import Tensor
from slipstream.processor import this_processor


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    rows: tuple[int, ...]
    """Of products, whose bits are compared."""
    timed_rows: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    """Of weights, by name."""
    heads: tuple[int, int, int]
    """Heads, those of keys, and the size of one."""
    contexts: tuple[int, ...]
    models: dict[str, dict[str, int]]
    vocabulary: int
    steps: tuple[int, ...]
    chosen: tuple[int, ...]
    """Rows that tokens are chosen from."""
    agents: tuple[tuple[int, int], ...]
    """How many talk at once, and for how many turns."""
    scenarios: int
    """Of exactness."""
    copied: int
    """Bytes that are copied to measure bandwidth."""
    uncached: int
    """Bytes that are read one after the other, so that little of them is in a cache when they are read again."""
    dtype: torch.dtype


FULL = Sizes(
    rows=(1, 2, 3, 4, 7, 8, 16, 17, 32, 48, 64, 96, 128, 200, 256, 512),
    timed_rows=(1, 16, 64, 128, 512),
    shapes={
        "8B qkv": (6144, 4096),
        "8B o": (4096, 4096),
        "8B gate, up": (24576, 4096),
        "8B down": (4096, 12288),
        "1.7B gate, up": (12288, 2048),
        "0.6B down": (1024, 3072),
        "8B head": (151936, 4096),
    },
    heads=(32, 8, 128),
    contexts=(1000, 8000, 32000),
    models={
        "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    },
    vocabulary=151_936,
    steps=(1, 16, 128, 512),
    chosen=(1, 64),
    agents=((1, 6), (1, 35), (8, 6), (64, 6)),
    scenarios=1000,
    copied=1 << 30,
    uncached=1 << 28,
    dtype=torch.bfloat16,
)
TINY = Sizes(
    rows=(1, 3, 17),
    timed_rows=(1, 17),
    shapes={"tiny": (96, 128)},
    heads=(4, 2, 16),
    contexts=(70,),
    models={"tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}},
    vocabulary=49_152,
    steps=(1, 16),
    chosen=(1, 3),
    agents=((1, 2),),
    scenarios=4,
    copied=1 << 20,
    uncached=1 << 13,
    dtype=torch.float32,
)


class Sized(Protocol):
    """What takes memory."""

    @property
    def nbytes(self) -> int:
        """How much."""
        ...


Copied = TypeVar("Copied", bound=Sized)


class Device:
    """What is checked, until its time is up."""

    def __init__(self, device: torch.device, sizes: Sizes, seconds: float) -> None:
        self.device = device
        self.sizes = sizes
        self.until = time.monotonic() + seconds
        self.machine = self._machine()

    @property
    def timely(self) -> bool:
        """Whether there is time for more."""
        return time.monotonic() < self.until

    def random(self, *shape: int) -> Tensor:
        """Numbers that are the same at each run."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.sizes.dtype)

    def floor(self, size: int) -> float:
        """Milliseconds to read so many bytes at the bandwidth of a copy."""
        return round(size / float(self.machine["gb_per_second"]) / 1e6, 4)

    def several(self, one: Copied, another: Callable[[], Copied]) -> list[Copied]:
        """One and as many others as no cache holds together."""
        return [one, *(another() for _ in range(min(self.sizes.uncached // one.nbytes, 63)))]

    def device_ms(self, works: Sequence[Callable[[], object]], recordable: bool = True) -> float:
        """What one of several works takes a GPU, without the time in which the host launches it, if it's recordable."""
        works[0]()  # a kernel can't be compiled while it's recorded

        def all_of_them() -> None:
            for work in works:
                work()

        recorded = recordable and self.device.type == "cuda"
        return round(self.ms(CudaRecorder().record(all_of_them) if recorded else all_of_them) / len(works), 4)

    def ms(self, work: Callable[[], object]) -> float:
        """The median of a few runs, the device's work included."""
        taken = []
        for _ in range(8):
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append((time.perf_counter() - started) * 1e3)
        return round(statistics.median(taken[2:]), 4)

    def _machine(self) -> dict[str, Any]:
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copied = 2 * self.sizes.copied / self.device_ms([lambda: target.copy_(source)] * 4) / 1e6
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        packages = {name: version(name) for name in ("slipstream", "torch", "transformers")}
        return {"device": gpu or this_processor().name, "gpu": bool(gpu), "gb_per_second": round(copied, 1), **packages}
