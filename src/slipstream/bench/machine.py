"""What machine a run is made on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from slipstream.bench.records import Machine

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def this_machine() -> Machine:
    """As it is now."""
    cpu = _facts(Path("/proc/cpuinfo"))
    flags = cpu.get("flags", "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=f"{cpu.get('model name', platform.processor())} (family {cpu.get('cpu family', '?')})",
        cpu_flags=[flag for flag in _TELLING_FLAGS if flag in flags],
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(pages / 2**30, 1),
        kernel=platform.release(),
        system=platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
        slipstream=version("slipstream"),
    )


def _facts(path: Path) -> dict[str, str]:
    """The `name: value` lines of the first core."""
    if not path.exists():
        return {}
    first = path.read_text().partition("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
