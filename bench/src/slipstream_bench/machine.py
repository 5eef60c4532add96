"""What machine a run is made on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version

from slipstream.processor import this_processor
from slipstream_bench.records import Machine


def this_machine() -> Machine:
    """As it is now."""
    processor = this_processor()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=processor.name,
        cpu_flags=list(processor.instruction_sets),
        cores=processor.cores,
        memory_gib=round(pages / 2**30, 1),
        kernel=platform.release(),
        system=platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
        slipstream=version("slipstream"),
    )
