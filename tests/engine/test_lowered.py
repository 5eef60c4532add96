"""A model compiled from its lowered graph is the same to the bit, whatever becomes of the graph's files."""

import itertools
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from slipstream.backend import paged_model
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.steps import PagedChunk, lay_out, run
from slipstream.models import Model

SIZES = (80, 2, 8, 64, 2)


@pytest.fixture
def ir(model: Model, tmp_path: Path) -> Path:
    """The short model by itself, never compiled yet."""
    for name in (model.ir_path.name, model.ir_path.with_suffix(".bin").name):
        shutil.copy(model.path / name, tmp_path)
    return tmp_path / model.ir_path.name


def compiled_as_it_is(ir: Path, monkeypatch: pytest.MonkeyPatch) -> PagedModel:
    """As models too large for this machine are: nothing is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(paged_model, "can_be_lowered", lambda _: False)
        return PagedModel(ir)


def bits(model: PagedModel) -> list[bytes]:
    """What a sequence's steps of several sizes give, and its KV."""
    model.allocate(9)
    table = np.arange(1, 9, dtype=np.int32)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, sum(SIZES)).astype(np.int32)
    found, past = [], 0
    for size in SIZES:
        chunk = PagedChunk(tokens[past : past + size], past, table, 2)
        found.append(run(model, lay_out([chunk], size, 2)).tobytes())
        past += size
    return [*found, model.read_blocks(table[: past // 32]).wait().tobytes()]


def graphs(ir: Path) -> list[Path]:
    """The graphs that are kept; skips where the runtime's export is of no use."""
    kept = sorted(path for path in (ir.parent / "lowered").iterdir() if path.name != ".lock")
    if any(path.suffix == ".refused" for path in kept):
        pytest.skip("the runtime exports no graph here that gives the same bits, so none is kept")
    return kept


def no_reading(_: PagedModel) -> ov.Model:
    raise AssertionError("the lowered graph was not used")


def test_the_first_and_later_starts_give_the_bits_of_a_model_compiled_as_it_is(
    ir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits(compiled_as_it_is(ir, monkeypatch))
    assert bits(PagedModel(ir)) == expected
    assert len(graphs(ir)) == 1
    monkeypatch.setattr(PagedModel, "_read", no_reading)
    later = PagedModel(ir)
    assert bits(later) == expected
    later.use_copy(2, later.compile_copy(2))
    assert bits(later) == expected


def test_weights_stay_as_narrow_as_they_are(ir: Path) -> None:
    def narrow(model: PagedModel) -> int:
        nodes = model._any_size.get_compiled_model().get_runtime_model().get_ops()
        kinds = [node.get_rt_info()["runtimePrecision"].get() for node in nodes if not node.get_input_size()]
        return sum(kind == "u4" for kind in kinds)

    first = narrow(PagedModel(ir))
    assert narrow(PagedModel(ir)) == first > 0


def flip(place: Path) -> None:
    weights = bytearray((place / "graph.bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    (place / "graph.bin").write_bytes(weights)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, id="a bit"),
        pytest.param(lambda place: (place / "graph.bin").write_bytes(b""), id="no weights", marks=pytest.mark.long),
        pytest.param(lambda place: (place / "graph.xml").unlink(), id="no graph", marks=pytest.mark.long),
        pytest.param(
            lambda place: (place / "record.json").write_text('{"sha256": ""}'),
            id="another record",
            marks=pytest.mark.long,
        ),
        pytest.param(lambda place: (place / "record.json").unlink(), id="no record"),
    ],
)
def test_a_damaged_graph_is_made_again(
    ir: Path, damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bits(PagedModel(ir))
    (place,) = graphs(ir)
    damage(place)
    assert bits(PagedModel(ir)) == expected
    assert "made again" in caplog.text
    monkeypatch.setattr(PagedModel, "_read", no_reading)
    assert bits(PagedModel(ir)) == expected


def test_a_graph_of_other_facts_makes_room_as_does_what_a_killed_process_left(ir: Path) -> None:
    PagedModel(ir)
    (first,) = graphs(ir)
    first.with_suffix(".tmp").mkdir()
    PagedModel(ir, threads=1)
    (second,) = graphs(ir)
    assert first.name != second.name


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_another_model_in_the_same_place_gets_its_own(ir: Path, suffix: str) -> None:
    PagedModel(ir)
    (first,) = graphs(ir)
    ir.with_suffix(suffix).touch()
    PagedModel(ir)
    (second,) = graphs(ir)
    assert first.name != second.name


def test_where_nothing_can_be_kept_the_model_is_compiled_as_it_is(
    ir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (ir.parent / "lowered").write_text("not a folder")
    expected = bits(compiled_as_it_is(ir, monkeypatch))
    assert bits(PagedModel(ir)) == expected
    assert "starts take longer" in caplog.text


def test_what_the_disk_has_no_room_for_is_tried_again(ir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here no file may be as large, which the runtime's own error doesn't say."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        PagedModel(ir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caplog.text
    assert [path.name for path in (ir.parent / "lowered").iterdir()] == [".lock"]
    PagedModel(ir)
    assert graphs(ir)


@pytest.mark.parametrize("fault", ["no export", "other bits"])
def test_what_the_runtime_does_not_export_well_is_done_without(
    ir: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bits(compiled_as_it_is(ir, monkeypatch))
    if fault == "no export":
        monkeypatch.setattr(ov.CompiledModel, "export_model", lambda _: no_export())
    else:
        others = itertools.count()
        monkeypatch.setattr(paged_model, "_sample", lambda _: str(next(others)).encode())
    assert bits(PagedModel(ir)) == expected
    assert "starts take longer" in caplog.text
    assert [path.suffix for path in (ir.parent / "lowered").iterdir() if path.name != ".lock"] == [".refused"]
    caplog.clear()
    assert bits(PagedModel(ir)) == expected  # and nobody tries again
    assert not caplog.text


def no_export() -> None:
    raise RuntimeError("not implemented")
