"""KV files: what is read is what was written for just these tokens, or nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from slipstream.sessions import SavedKV

Damage = Callable[[bytearray], Any]

TOKENS = np.arange(70, dtype=np.int32)
CONTENTS = np.random.default_rng(0).integers(0, 2**16, (3, 4, 32), np.uint16)
KEY = b"k" * 16


def store(folder: Path, max_bytes: int = 2**30, fingerprint: str = "model; backend", *, anew: bool = False) -> SavedKV:
    return SavedKV(folder, fingerprint, max_bytes, anew=anew)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def tokens(number: int) -> Any:
    return np.full(5, number, np.int32)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def damage(folder: Path, how: Damage) -> None:
    path = only_file(folder)
    data = bytearray(path.read_bytes())
    how(data)
    path.write_bytes(data)


def assert_consistent(saved: SavedKV, folder: Path) -> None:
    """What it believes to be there is there."""
    assert saved.total_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert not list(folder.glob("*.tmp"))


def test_what_is_saved_is_loaded_also_after_a_restart(tmp_path: Path) -> None:
    saved = store(tmp_path)
    written = saved.save(KEY, TOKENS, CONTENTS)
    assert written == only_file(tmp_path).stat().st_size
    for again in (saved, store(tmp_path)):
        loaded = again.load(KEY, TOKENS)
        assert loaded is not None
        assert loaded.dtype == CONTENTS.dtype
        assert np.array_equal(loaded, CONTENTS)
        assert again.size(KEY) == again.total_bytes == written


def test_unknown_part_is_nothing(tmp_path: Path) -> None:
    saved = store(tmp_path)
    assert saved.load(KEY, TOKENS) is None
    assert saved.size(KEY) == saved.total_bytes == 0


def test_second_save_of_a_part_takes_the_place_of_the_first(tmp_path: Path) -> None:
    saved = store(tmp_path)
    saved.save(KEY, TOKENS, np.zeros_like(CONTENTS))
    saved.save(KEY, TOKENS, CONTENTS)
    loaded = saved.load(KEY, TOKENS)
    assert loaded is not None
    assert np.array_equal(loaded, CONTENTS)
    assert_consistent(saved, tmp_path)


def test_left_overs_of_a_crash_are_removed(tmp_path: Path) -> None:
    store(tmp_path).save(KEY, TOKENS, CONTENTS)
    only_file(tmp_path).with_suffix(".tmp").write_bytes(b"half a file")
    saved = store(tmp_path)
    assert_consistent(saved, tmp_path)
    assert saved.load(KEY, TOKENS) is not None


def flip(data: bytearray, at: int) -> None:
    data[at] ^= 1 << at % 8


def assert_refused(folder: Path, caplog: pytest.LogCaptureFixture, **opened: Any) -> None:
    saved = store(folder, **opened)
    caplog.clear()
    assert saved.load(KEY, TOKENS) is None
    assert "no good and removed" in caplog.text
    assert list(folder.iterdir()) == []
    assert saved.total_bytes == saved.size(KEY) == 0
    caplog.clear()
    assert saved.load(KEY, TOKENS) is None
    assert caplog.text == "", "a part that is not there is no reason to warn"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda data: data.clear(), id="empty"),
        pytest.param(lambda data: data.__delitem__(slice(4, None)), id="four bytes"),
        pytest.param(lambda data: data.__delitem__(slice(100, None)), id="cut in its header"),
        pytest.param(lambda data: data.__delitem__(slice(-1, None)), id="cut by a byte"),
        pytest.param(lambda data: data.__delitem__(slice(len(data) // 2, None)), id="cut in the middle"),
        pytest.param(lambda data: data.extend(b"more"), id="too long"),
        pytest.param(lambda data: data.__setitem__(slice(None), b"not one of ours" * 100), id="foreign"),
        pytest.param(lambda data: data.__setitem__(slice(None), bytes(len(data))), id="zeros"),
        pytest.param(
            lambda data: data.__setitem__(slice(None), safetensors.numpy.save({"kv": CONTENTS})), id="without metadata"
        ),
        pytest.param(
            lambda data: data.__setitem__(slice(None), bytes(data).replace(b'"format":"1"', b'"format":"9"')),
            id="other format",
        ),
    ],
)
def test_damaged_file_is_refused_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: Damage) -> None:
    store(tmp_path).save(KEY, TOKENS, CONTENTS)
    damage(tmp_path, how)
    assert_refused(tmp_path, caplog)


def test_file_of_another_model_is_refused_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(tmp_path).save(KEY, TOKENS, CONTENTS)
    assert_refused(tmp_path, caplog, fingerprint="model; other backend")


def test_file_of_other_tokens_is_refused_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = TOKENS.copy()
    other[3] += 1
    store(tmp_path).save(KEY, other, CONTENTS)
    assert_refused(tmp_path, caplog)


def test_one_changed_byte_anywhere_is_found_out(tmp_path: Path) -> None:
    """Every byte of the header takes a few other values, and some bytes of the data."""
    saved = store(tmp_path)
    saved.save(KEY, TOKENS, CONTENTS)
    whole = only_file(tmp_path).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    random = np.random.default_rng(1)
    places = [at for at in range(header) for _ in range(4)] + random.integers(header, len(whole), 200).tolist()
    for at in places:
        data = bytearray(whole)
        data[at] = random.choice([value for value in range(256) if value != whole[at]])
        path = tmp_path / f"{KEY.hex()}.safetensors"
        path.write_bytes(data)
        loaded = store(tmp_path).load(KEY, TOKENS)
        if loaded is not None:  # what JSON does not care about, such as padding
            assert loaded.dtype == CONTENTS.dtype, at
            assert loaded.shape == CONTENTS.shape, at
            assert np.array_equal(loaded, CONTENTS), at


def test_other_type_or_shape_of_the_same_bytes_is_refused(tmp_path: Path) -> None:
    for old, new in ((b'"U16"', b'"I16"'), (b'"U16"', b'"F16"'), (b'"U16"', b'"BF16"'), (b"[3,4,32]", b"[4,3,32]")):
        saved = store(tmp_path)
        saved.save(KEY, TOKENS, CONTENTS)
        whole = only_file(tmp_path).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        header = whole[8 : 8 + size].replace(old, new)
        assert header != whole[8 : 8 + size]
        only_file(tmp_path).write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
        assert store(tmp_path).load(KEY, TOKENS) is None, new


def test_file_that_vanished_is_nothing(tmp_path: Path) -> None:
    saved = store(tmp_path)
    saved.save(KEY, TOKENS, CONTENTS)
    only_file(tmp_path).unlink()
    assert saved.load(KEY, TOKENS) is None
    assert saved.total_bytes == 0


def test_budget_gives_up_the_least_recently_used(tmp_path: Path) -> None:
    one = store(tmp_path / "measure").save(key(0), tokens(0), CONTENTS)
    folder = tmp_path / "kv"
    saved = store(folder, max_bytes=3 * one)
    for number in range(3):
        saved.save(key(number), tokens(number), CONTENTS)
    assert saved.load(key(0), tokens(0)) is not None  # a use
    saved.save(key(3), tokens(3), CONTENTS)
    assert [number for number in range(4) if saved.size(key(number))] == [0, 2, 3]
    saved.touch([key(2)])
    saved.save(key(4), tokens(4), CONTENTS)
    assert [number for number in range(5) if saved.size(key(number))] == [2, 3, 4]
    assert saved.total_bytes <= 3 * one
    assert_consistent(saved, folder)


def test_order_of_use_outlives_a_restart(tmp_path: Path) -> None:
    one = store(tmp_path / "measure").save(key(0), tokens(0), CONTENTS)
    folder = tmp_path / "kv"
    saved = store(folder, max_bytes=3 * one)
    for number in range(3):
        saved.save(key(number), tokens(number), CONTENTS)
    for path, age in zip(sorted(folder.iterdir()), (3, 9, 6), strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    again = store(folder, max_bytes=3 * one)
    again.save(key(3), tokens(3), CONTENTS)
    assert [number for number in range(4) if again.size(key(number))] == [0, 2, 3]


def test_smaller_budget_holds_from_the_start(tmp_path: Path) -> None:
    saved = store(tmp_path)
    one = max([saved.save(key(number), tokens(number), CONTENTS) for number in range(4)])
    again = store(tmp_path, max_bytes=2 * one)
    assert again.total_bytes <= 2 * one
    assert_consistent(again, tmp_path)


def test_part_beyond_the_budget_is_not_written_and_costs_no_other(tmp_path: Path) -> None:
    small = CONTENTS[:1]
    size = store(tmp_path / "measure").save(key(0), tokens(0), small)
    folder = tmp_path / "kv"
    saved = store(folder, max_bytes=2 * size)
    saved.save(key(0), tokens(0), small)
    assert saved.save(key(1), tokens(1), np.tile(CONTENTS, (100, 1, 1))) == 0
    assert saved.size(key(0)) == saved.total_bytes == size
    assert_consistent(saved, folder)


def test_parts_that_nobody_has_any_more_are_removed(tmp_path: Path) -> None:
    saved = store(tmp_path)
    for number in range(4):
        saved.save(key(number), tokens(number), CONTENTS)
    again = store(tmp_path)
    again.remove([key(0), key(3), key(9)])
    assert [number for number in range(4) if again.size(key(number))] == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2
    assert_consistent(again, tmp_path)


def test_what_is_there_is_removed_if_nobody_knows_what_it_belongs_to(tmp_path: Path) -> None:
    store(tmp_path).save(key(0), tokens(0), CONTENTS)
    (tmp_path / "stranger.safetensors").write_bytes(b"?")
    again = store(tmp_path, anew=True)
    assert list(tmp_path.iterdir()) == []
    assert again.total_bytes == again.size(key(0)) == 0
    assert_consistent(again, tmp_path)


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    saved = store(tmp_path)
    saved.save(key(0), tokens(0), CONTENTS)
    with monkeypatch.context() as patched:
        patched.setattr(os, step, full_disk) if step == "fsync" else patched.setattr(Path, step, full_disk)
        with pytest.raises(OSError, match="No space left"):
            saved.save(key(1), tokens(1), CONTENTS)
    assert saved.size(key(1)) == 0
    assert saved.load(key(0), tokens(0)) is not None
    assert_consistent(saved, tmp_path)
    assert saved.save(key(1), tokens(1), CONTENTS) > 0
