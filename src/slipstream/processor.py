"""The processor of this machine: its name, its cores, and the instruction sets that decide how a model computes."""

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STATM = Path("/proc/self/statm")
_MOST_HEAPS = -8
"""`M_ARENA_MAX` of mallopt(3)."""
_TELLING_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True, slots=True)
class Processor:
    """What is known of it; kernels are chosen by it, and with them the bits of their results."""

    name: str
    instruction_sets: tuple[str, ...]
    """Of those that matter here, as the kernel spells them."""
    cores: int
    """That this process may use."""


def this_processor() -> Processor:
    """The first processor that the kernel lists; what it doesn't say is left empty."""
    facts = _facts(Path("/proc/cpuinfo"))
    flags = (facts.get("flags") or facts.get("Features", "")).split()
    parts = [facts.get("model name") or platform.processor() or platform.machine()]
    parts += [f"{label} {facts[key]}" for key, label in (("cpu family", "family"), ("model", "model")) if key in facts]
    return Processor(
        name=", ".join(parts),
        instruction_sets=tuple(flag for flag in _TELLING_SETS if flag in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _facts(path: Path) -> dict[str, str]:
    """The `name: value` lines of the first core."""
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def resident_bytes() -> int:
    """Memory that this process takes now; 0 where the system doesn't say."""
    try:
        pages = _STATM.read_text().split()
    except OSError:
        return 0
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")


def share_heaps() -> None:
    """Have all threads take memory from two heaps. glibc gives each one of its own, and what is freed there stays."""
    if set_option := _allocator("mallopt"):
        set_option(_MOST_HEAPS, 2)


def give_back_memory() -> None:
    """Give the system what was freed. glibc keeps it by default, for each thread that ever took some."""
    if trim := _allocator("malloc_trim"):
        trim(0)


def _allocator(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; None where there's another."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
