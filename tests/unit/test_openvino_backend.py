"""What a backend finds out about a model once and keeps; the model is a toy, its files are real."""

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from slipstream.backend import Chunk, Load, calibration, self_test
from slipstream.backend.logits import HostLogits
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.self_test import ROW_COUNTS, SIZES
from slipstream.backend.steps import BLOCK_SIZE, StepClass
from slipstream.errors import ModelError
from tests.processors import AVX2, Emulated
from tests.unit.test_self_test import ToyRunner
from tests.unit.toy_backend import toy_logits


class ToyModel(ToyRunner):
    """Stands for a `PagedModel`; counts what it was asked for."""

    settings = "a toy"
    block_bytes = 1000
    is_small = True
    threads = 2
    precision = "f16"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "openvino_model.xml"
        self.copies: set[int] = set()
        self.wrong_copies = False
        self.error: Exception | None = None

    @property
    def runs(self) -> dict[int, int]:
        return {size: self.sizes.count(size) for size in SIZES}

    def finish(self) -> HostLogits:
        wrong = self.wrong_copies and len(self.started["input_ids"]) in self.copies
        return HostLogits(super().finish().host() + np.float32(wrong))

    @property
    def seconds(self) -> float:
        return self.clock.now

    @property
    def prepared(self) -> set[int]:
        return set()

    def allocate(self, num_blocks: int) -> None:
        self.slots = np.zeros((num_blocks, BLOCK_SIZE), np.int32)

    def give_back_files(self) -> None:
        pass

    def compile_copy(self, size: int) -> int:
        if self.error is not None:
            raise self.error
        return size

    def use_copy(self, size: int, copy: int) -> None:
        assert size == copy
        self.copies.add(size)

    def drop_copy(self, size: int) -> None:
        self.copies.remove(size)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyModel:
    for module in (self_test, calibration):
        monkeypatch.setattr(module, "time", ToyRunner.clock)
    (tmp_path / "openvino_model.bin").write_bytes(b"weights")
    return ToyModel(tmp_path)


def backend(model: object, kv_memory: int = 40_000) -> OpenVINOBackend:
    return OpenVINOBackend(cast(PagedModel, model), kv_memory=kv_memory)


def kept(model: ToyModel) -> list[Path]:
    return list((model.path.parent / "calibration").iterdir())


def test_the_second_start_compares_a_few_steps_and_measures_nothing(model: ToyModel) -> None:
    first = backend(model)
    assert first.exact
    assert first.step_class.sizes == SIZES
    steps = len(model.sizes)
    second = backend(model)
    assert len(model.sizes) - steps == 2
    assert second.exact
    assert second.fingerprint == first.fingerprint
    assert second.cost.measured == first.cost.measured
    assert first.largest_draft == ROW_COUNTS[-1] - 1


def test_progress_is_told_up_to_the_end(model: ToyModel) -> None:
    told: list[float] = []
    OpenVINOBackend(cast(PagedModel, model), kv_memory=40_000, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_other_settings_and_other_weights_are_measured_apart(model: ToyModel) -> None:
    found = {backend(model).fingerprint, backend(Emulated(model, sizes=AVX2)).fingerprint}
    assert len(kept(model)) == len(found) == 2
    model.path.with_suffix(".bin").write_bytes(b"other weights")
    backend(model)
    assert len(kept(model)) == 3


def test_steps_that_give_other_bits_than_before_are_measured_anew(
    model: ToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    before = backend(model)

    class Changed(Emulated):
        settings = model.settings

    after = backend(Changed(model, sizes=AVX2))
    assert "measured anew" in caplog.text
    assert after.exact
    assert after.fingerprint != before.fingerprint
    assert after.step_class.sizes[-1] <= 80 < before.step_class.sizes[-1]
    assert len(kept(model)) == 1


def test_a_file_that_is_damaged_is_written_again(model: ToyModel) -> None:
    backend(model)
    (path,) = kept(model)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert backend(model).exact
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_the_next_start(
    model: ToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    (model.path.parent / "calibration").write_text("not a folder")
    assert backend(model).exact
    assert "the next start measures again" in caplog.text


def test_where_no_class_is_found_all_sizes_are_used_and_it_is_said(model: ToyModel) -> None:
    found = backend(Emulated(model, places=True))
    assert not found.exact
    assert found.step_class.sizes == SIZES
    assert str(SIZES[-1]) in found.fingerprint, "saved KV is used under the same step sizes alone"
    again = backend(Emulated(model, places=True))
    assert not again.exact
    assert again.fingerprint == found.fingerprint


def test_what_does_not_fit_into_a_step_takes_several(model: ToyModel) -> None:
    small = backend(Emulated(model, sizes=AVX2))
    tokens = np.arange(300, dtype=np.int32) % model.vocab_size
    state = small.store.open(300)
    ticket = small.launch([Chunk(state, tokens, 2)])
    ticket.wait()
    assert max(model.sizes[-4:]) <= 80
    assert state.length == 300
    added = ticket.logits - toy_logits(tokens, 2)
    assert np.ptp(added, axis=0).max() < 1e-5, "but for what the emulated class adds"


def test_steps_of_one_work_are_learned_apart(model: ToyModel) -> None:
    small = backend(Emulated(model, sizes=AVX2))
    loads = [Load(size) for size in (2, 16, 64, 80)]
    before = [small.cost.seconds(load) for load in loads]
    state = small.store.open(1200)
    for _ in range(5):
        small.launch([Chunk(state, np.full(222, 3, np.int32), 1)]).wait()
    assert [small.cost.seconds(load) for load in loads] == pytest.approx(before)


def test_what_a_recurrent_state_costs_is_measured(model: ToyModel) -> None:
    class WithStates(ToyRunner):
        states = object()

        def finish(self) -> HostLogits:
            written = len(self.started["la.block_indices"]) - len(self.started["past_lens"])
            self.clock.now += 0.002 * written
            return super().finish()

    for runner, expected in ((WithStates(), 0.002), (ToyRunner(), 0.0)):
        measured = calibration.measure(runner, StepClass(SIZES, ROW_COUNTS), lambda _: None)  # type: ignore[arg-type]
        assert measured.per_state == pytest.approx(expected)


def test_too_little_memory_is_an_error_that_names_the_option(model: ToyModel) -> None:
    with pytest.raises(ModelError, match="raise kv_memory"):
        backend(model, kv_memory=2_000)


def use_small_steps(backend: OpenVINOBackend, steps: int = 250) -> None:
    """Decode, until copies that were asked for are there."""
    state = backend.store.open(steps + 1)

    def step() -> None:
        backend.launch([Chunk(state, np.array([3], np.int32), 1)]).wait()

    for _ in range(steps):
        step()
    if (compiling := backend._compiling) is not None:
        cast("Future[Any]", compiling[1]).exception()
        step()
    backend.store.release(state)


def test_sizes_that_are_used_much_get_a_copy(model: ToyModel) -> None:
    used = backend(model)
    use_small_steps(used, 20)
    assert not model.copies
    use_small_steps(used)
    assert model.copies == {2}


def test_a_large_model_is_not_copied(model: ToyModel) -> None:
    model.is_small = False
    use_small_steps(backend(model))
    assert not model.copies


@pytest.mark.parametrize("error", [None, RuntimeError("no memory")], ids=["other bits", "error"])
def test_a_copy_that_is_no_good_is_not_used(
    model: ToyModel, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    caplog.set_level(logging.WARNING)
    model.wrong_copies, model.error = True, error
    use_small_steps(backend(model))
    assert not model.copies
    assert ("gives other bits" if error is None else "no memory") in caplog.text
