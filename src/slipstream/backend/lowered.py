"""A model's graph as the runtime's passes leave it, kept beside the model: later starts need not run them again.

Compiling a model is mostly passes over its graph. A graph that has been through them has a quarter of the operations
and gives the passes little to do, so it's compiled in less than half the time, to the same bits.

The runtime's own cache would leave out even that, but can't load a model with paged attention: 2026.4.1 loses the
attention's head sizes on the way. So what the runtime exports for its cache is mended and kept as a model again. The
runtime promises none of that, so a graph is kept only if it gives the bits of the model that it was made from.

Most of its weights are those of the model, so only the others are kept with the graph.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from pydantic import BaseModel, ValidationError

from slipstream.backend.pages import Bytes, joined, whole_pages
from slipstream.backend.place import place_beside
from slipstream.disk import serialize

logger = logging.getLogger(__name__)

_VERSION = 4
"""Goes up when the graphs made here change."""
_FOLDER = "lowered"
_GRAPH = "graph.xml"
_RECORD = "record.json"
_LOCK = ".lock"
_REFUSED = ".refused"

ATTENTION = "PagedAttentionExtension"
_HEAD_FACTS = ("num_k_heads", "k_head_size", "num_v_heads", "v_head_size")
_SPAN = re.compile(rb' offset="(\d+)" size="(\d+)"')
"""Where a graph's text says that the bytes of a constant are."""
_WORTH_SHARING = 4096
"""Bytes of a constant."""
_ALIGNMENT = 64

_AS_IT_IS = {"keep_const_precision_0": 1}
"""What a pass notes about weights that must stay as narrow as they are; a graph in a file forgets it."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered graph and its weights, which have to be kept as long as it's used: it doesn't do that itself."""

    graph: ov.Model
    weights: Bytes


class _Record(BaseModel):
    """What is kept with a graph."""

    sha256: str
    """Of the graph's file and its weights, one after the other."""
    heads: dict[str, dict[str, int]]
    """By the name of an attention operation: how many heads it has and how large they are."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """Lowers the graph of a model file, compiled with these options; `compute` gives bits to compare two of them by."""

    core: ov.Core
    path: Path
    options: Mapping[str, object]
    compute: Callable[[ov.CompiledModel], bytes]

    def lowered(self, facts: str, read: Callable[[], ov.Model]) -> Lowered | None:
        """The lowered graph, made from what `read` gives if there is none yet under these `facts`.

        `facts` are all that may decide what the passes do, besides the model. There is one graph for each model file;
        that of other facts makes room. None if it can't be made or kept: with a warning, and if it's not for want of
        room once and for all.
        """
        file = self.path.stat()
        place = place_beside(self.path, _FOLDER, _VERSION, file.st_size, file.st_mtime_ns, facts)
        damaged = False
        refused = place.with_suffix(_REFUSED)
        if refused.exists():
            return None
        if place.exists():
            if (found := self._load(place)) is not None:
                return found
            damaged = True
        try:
            place.parent.mkdir(exist_ok=True)
            with (place.parent / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if damaged or not place.exists():  # another process may have made it meanwhile
                    _make_room(place.parent)
                    try:
                        self._save(read(), place)
                    except (LookupError, ValueError, RuntimeError) as error:
                        logger.warning("the model can't be lowered here, so starts take longer: %s", error)
                        _make_room(place.parent)
                        refused.touch()
                        return None
                    except OSError:
                        _make_room(place.parent)
                        raise
                return self._load(place)
        except OSError as error:
            logger.warning("no lowered graph in %s, so starts take longer: %s", place.parent, error)
            return None

    def _load(self, place: Path) -> Lowered | None:
        """The graph that is kept there, if it is whole."""
        try:
            record = _Record.model_validate_json((place / _RECORD).read_bytes())
            if _sha256(place) != record.sha256:
                logger.warning("the lowered graph %s is damaged, and is made again", place)
                return None
            self.core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin brings the operations that passes put in
            weights = joined(self.path.with_suffix(".bin"), (place / _GRAPH).with_suffix(".bin"))
            graph = self.core.read_model((place / _GRAPH).read_bytes(), ov.Tensor(weights, shared_memory=True))
            for node in graph.get_ops():
                if node.get_type_name() == ATTENTION:
                    note(node, record.heads[node.get_friendly_name()])
                elif node.get_type_name() == "Constant":
                    note(node, _AS_IT_IS)
        except (OSError, ValidationError, KeyError, RuntimeError) as error:
            logger.warning("the lowered graph %s can't be used, and is made again: %s", place, error)
            return None
        return Lowered(graph, weights)

    def _save(self, model: ov.Model, place: Path) -> None:
        """Lower a model and keep its graph, whole or not at all; raises `RuntimeError` if the two are not the same."""
        heads = {
            node.get_friendly_name(): {name: int(node.get_rt_info()[name].get()) for name in _HEAD_FACTS}
            for node in model.get_ops()
            if node.get_type_name() == ATTENTION
        }
        staging = place.with_suffix(".tmp")
        staging.mkdir()
        expected = self._write(model, staging / _GRAPH)
        _share_weights(self.path, staging / _GRAPH)
        (staging / _RECORD).write_text(_Record(sha256=_sha256(staging), heads=heads).model_dump_json(indent=2))
        made = self._load(staging)
        if made is None or self.compute(self.core.compile_model(made.graph, "CPU", self.options)) != expected:
            raise RuntimeError("its lowered graph gives other bits")
        staging.rename(place)

    def _write(self, model: ov.Model, path: Path) -> bytes:
        """Write what the runtime exports of a model, mended, with all its weights; returns what the model computes."""
        texts: list[bytes] = []

        def take(text: bytes) -> bytes:
            texts.append(text)
            return b""

        compiled = self.core.compile_model(model, "CPU", {**self.options, "CACHE_ENCRYPTION_CALLBACKS": [take, take]})
        blob = compiled.export_model().getbuffer()
        expected = self.compute(compiled)
        del compiled  # there's memory for so many copies of the weights, see `can_be_lowered`
        (text,) = texts
        size = max(int(offset) + int(size) for offset, size in _SPAN.findall(text))
        weights = np.frombuffer(blob, np.uint8)[-size:]  # the text would stand behind them
        graph = self.core.read_model(text, ov.Tensor(weights, shared_memory=True))
        _mend(graph)
        serialize(graph, path)
        return expected


def _share_weights(model: Path, graph: Path) -> None:
    """Let a graph's file name weights of the model where they are the same, and keep the others alone; see `joined`."""
    theirs, ours = np.memmap(model.with_suffix(".bin"), np.uint8), np.memmap(graph.with_suffix(".bin"), np.uint8)

    def digest(of: Bytes, offset: int, size: int) -> bytes:
        return hashlib.blake2b(of[offset : offset + size].data, digest_size=16).digest()

    spans = {(int(offset), int(size)) for offset, size in _SPAN.findall(model.read_bytes())}
    known = {(size, digest(theirs, offset, size)): offset for offset, size in spans if size >= _WORTH_SHARING}
    beside = graph.with_suffix(".own")
    moved: dict[tuple[int, int], int] = {}
    with beside.open("wb") as file:

        def place(found: re.Match[bytes]) -> bytes:
            offset, size = map(int, found.groups())
            if (offset, size) not in moved:
                at = known.get((size, digest(ours, offset, size))) if size >= _WORTH_SHARING else None
                if at is None:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    at = whole_pages(len(theirs)) + file.tell()
                    file.write(ours[offset : offset + size].data)
                moved[offset, size] = at
            return b' offset="%d" size="%d"' % (moved[offset, size], size)

        text = _SPAN.sub(place, graph.read_bytes())
    graph.write_bytes(text)
    beside.replace(graph.with_suffix(".bin"))


def can_be_lowered(model: Path) -> bool:
    """Whether the machine has memory to lower a model: its weights are there several times meanwhile."""
    weights = model.with_suffix(".bin")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return weights.exists() and weights.stat().st_size * _COPIES_MEANWHILE <= physical


_COPIES_MEANWHILE = 6
"""Of the weights, at most, while a model is lowered: packed twice, exported, and copied by the runtime for that."""


def _mend(graph: ov.Model) -> None:
    """Undo what would keep an exported graph from being compiled like the first time, or for one step size."""
    open_caches(graph)
    for node in graph.get_ops():
        if node.get_type_name() == "ShapeOf":  # forgets, when the graph is reshaped, that it was turned to int32
            kind = "i32" if node.get_output_element_type(0) == ov.Type.i32 else "i64"
            node.output(0).replace(ops.shape_of(node.input_value(0), output_type=kind).output(0))
    graph.validate_nodes_and_infer_types()


def open_caches(graph: ov.Model) -> None:
    """Leave the caches' type and shape open: a pass expects to decide on them, and would convert others."""
    for parameter in graph.get_parameters():
        if "_cache." in parameter.get_friendly_name():
            parameter.set_element_type(ov.Type.dynamic)
            parameter.set_partial_shape(ov.PartialShape([-1] * 4))


def note(node: ov.Node, facts: Mapping[str, int]) -> None:
    """Tell the passes something about an operation."""
    notes = node.get_rt_info()
    for name, value in facts.items():
        notes[name] = value


def _make_room(folder: Path) -> None:
    """Remove graphs of other facts, damaged ones, and what was left by a process that was killed."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _sha256(place: Path) -> str:
    digest = hashlib.sha256()
    for name in (_GRAPH, Path(_GRAPH).with_suffix(".bin")):
        with (place / name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
