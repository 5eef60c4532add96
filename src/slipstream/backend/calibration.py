"""What was found out about a model on this machine: its step class and what its steps cost, kept beside the model."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from slipstream.backend.place import place_beside
from slipstream.backend.self_test import SELF_TEST_SLOTS, find_step_class
from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots
from slipstream.backend.step_cost import StepMeasurements
from slipstream.backend.steps import BLOCK_SIZE, SCRATCH_BLOCK, PagedChunk, Runner, StepClass, next_size

logger = logging.getLogger(__name__)

_VERSION = 6
"""Goes up when the self-test finds other things than before."""
_FOLDER = "calibration"

_TIMED_SIZES = (2, 5, 8, 16, 64, 128, 512)
"""What other sizes take is read off between these, as far as the class goes."""
_TIMED_RUNS = 3
_LONG_ENOUGH = 0.5
"""Seconds of steps of one kind after which no more are timed."""
_CONTEXT = 2048
"""Tokens of context at which it is measured what contexts cost."""
_STATES = 16
"""Recurrent states that a step writes to measure what they cost: one after each of its tokens, as for a draft."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How steps are computed on one machine."""

    step_class: StepClass
    exact: bool
    """Whether steps of the class were found to give the same bits, each time they were compared."""
    measurements: StepMeasurements
    witness: str = ""
    """A digest of bits that steps of the class gave, if it's exact: what is compared at later starts."""


_FILE = TypeAdapter(Calibration)


def calibrate(runner: Runner, progress: Callable[[float], None]) -> Calibration:
    """Find the step class and measure its steps, without a witness; overwrites the first `SELF_TEST_BLOCKS` blocks."""
    found = find_step_class(runner, lambda done: progress(0.6 * done))
    step_class = found or runner.candidates
    measurements = measure(runner, step_class, lambda done: progress(0.6 + 0.4 * done))
    return Calibration(step_class, found is not None, measurements)


def load(model: Path, key: str) -> Calibration | None:
    """What was kept for a model file under a key; None if there is nothing, or nothing usable."""
    try:
        return _FILE.validate_json(_path(model, key).read_bytes())
    except (OSError, ValidationError):
        return None


def save(model: Path, key: str, calibration: Calibration) -> None:
    """Keep it, whole or not at all; where the folder can't be written, the next start has to find out again."""
    path = _path(model, key)
    try:
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_bytes(_FILE.dump_json(calibration, indent=2))
        beside.replace(path)
    except OSError as error:
        logger.warning("%s can't be written, so the next start measures again: %s", path, error)


def measure(runner: Runner, step_class: StepClass, progress: Callable[[float], None]) -> StepMeasurements:
    """Time steps of some sizes, on the scratch block alone."""
    sizes = step_class.sizes
    tokens = np.zeros(sizes[-1], np.int32)
    scratch = np.full((_CONTEXT + sizes[-1]) // BLOCK_SIZE + 1, SCRATCH_BLOCK, np.int32)

    def run(size: int, past: int = 0, slots: Slots | None = None) -> float:
        started = time.perf_counter()
        step_class.run(runner, [PagedChunk(tokens[:size], past, scratch, 1, slots)])
        return time.perf_counter() - started

    def least(time_once: Callable[[], float]) -> float:
        """The shortest of a few times, but for the first, in which a step prepares its size."""
        time_once()
        times = [time_once(), time_once()]
        while len(times) < _TIMED_RUNS and sum(times) < _LONG_ENOUGH:
            times.append(time_once())
        return min(times)

    def shortest(size: int, past: int = 0) -> float:
        return least(lambda: run(size, past))

    timed = {}
    timed_sizes = sorted({next_size(sizes, min(size, sizes[-1])) for size in _TIMED_SIZES})
    for done, size in enumerate(timed_sizes, start=1):
        timed[size] = shortest(size)
        progress(done / len(timed_sizes))
    # A smaller step never takes more time. On a machine with other work its measurement may, and never takes less.
    seconds = np.interp(sizes, list(timed), np.minimum.accumulate(list(timed.values())[::-1])[::-1])
    small, large = sizes[0], next_size(sizes, min(64, sizes[-1]))
    alternating = least(lambda: run(small) + run(large))
    change = max(0.0, alternating - timed[small] - timed[large]) / 2
    added = [shortest(size, _CONTEXT) - timed[size] for size in (small, large)]
    per_pair = max(0.0, added[1] - added[0]) / max(1, large - small) / _CONTEXT
    drafted = next_size(sizes, min(_STATES, sizes[-1]))
    writing = least(lambda: run(drafted, slots=_after_each(drafted))) - shortest(drafted) if runner.states else 0.0
    return StepMeasurements(
        seconds=tuple(zip(sizes, seconds.tolist(), strict=True)),
        change=change,
        per_context=max(0.0, added[0] / _CONTEXT - small * per_pair),
        per_pair=per_pair,
        per_state=max(0.0, writing) / max(1, drafted - 1),
    )


def _after_each(size: int) -> Slots:
    """Slots of a sequence's first `size` tokens, by which a step writes a state after each; most go to scratch."""
    lengths = sorted({1, 2, size})
    return Slots(EMPTY_SLOT, tuple(zip(lengths, range(FIRST_SLOT, SELF_TEST_SLOTS), strict=False)))


def _path(model: Path, key: str) -> Path:
    return place_beside(model, _FOLDER, _VERSION, key).with_suffix(".json")
