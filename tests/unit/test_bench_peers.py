"""The other servers that the bench runs: how they are started, and the weights that are made for them."""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize
from safetensors import safe_open

from slipstream.models import SILENT, Manifest, Model
from slipstream_bench.peers import PEERS, Peer, PeerError, export
from slipstream_bench.peers.environment import Environment
from slipstream_bench.peers.genai_app import compact_pattern
from slipstream_bench.peers.llama_server import LlamaServer, restore_links
from slipstream_bench.peers.ollama import Ollama
from slipstream_bench.peers.openvino_genai import OpenVINOGenAI
from slipstream_bench.peers.process import free_port, paused, server_process
from slipstream_bench.peers.sglang import SGLang
from slipstream_bench.peers.vllm import VLLM
from tests.waiting import wait_until

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 4, 2, 16, 64


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """One in a store of its own, pulled from a GGUF on this disk."""
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    source = tmp_path / "tiny.gguf"
    write_gguf(source)
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    manifest = Manifest(
        name="tiny",
        source=str(source),
        sha256=sha256(source),
        architecture="llama",
        context_length=128,
        vocab_size=32,
        tokenizer_kind="gpt-2",
        add_bos=False,
        bos_token_id=0,
        eos_token_id=1,
        stop_token_ids=(1, 2),
        files={},
    )
    return Model(folder, manifest)


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id, text in enumerate(("<s>", "</s>"))
    ],
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []},
}


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_gguf(path: Path, architecture: str = "llama") -> None:
    """One layer of random weights, some of them quantised."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    shapes = {
        "token_embd.weight": (32, HIDDEN, gguf.GGMLQuantizationType.Q8_0),
        "blk.0.attn_q.weight": (HEADS * HEAD_SIZE, HIDDEN, gguf.GGMLQuantizationType.Q4_1),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_SIZE, HIDDEN, gguf.GGMLQuantizationType.Q4_1),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_SIZE, HIDDEN, gguf.GGMLQuantizationType.Q4_0),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_SIZE, gguf.GGMLQuantizationType.Q4_1),
        "blk.0.ffn_down.weight": (HIDDEN, 96, gguf.GGMLQuantizationType.Q4_1),
    }
    for name, (rows, columns, kind) in shapes.items():
        weights = rng.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", rng.standard_normal(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bf16(path: Path, name: str) -> np.ndarray:
    """A tensor of a safetensors file as float32; numpy has no bf16, so its bytes are read here."""
    with safe_open(path, "numpy") as file:
        assert name in file.keys()  # noqa: SIM118 - it is no mapping
        assert file.get_slice(name).get_dtype() == "BF16"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    upper = np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16
    return upper.view(np.float32).reshape(entry["shape"])


def dequantised(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def test_exported_weights_are_those_of_the_gguf_rounded_to_bf16(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    export.export_weights(tmp_path / "a.gguf", tmp_path)
    expected = dequantised(tmp_path / "a.gguf")
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        exported = read_bf16(tmp_path / "model.safetensors", ours)
        assert exported.shape == expected[theirs].shape
        np.testing.assert_allclose(exported, expected[theirs], rtol=2**-8, atol=1e-30)
        assert np.abs(exported).max() > 0.1


@pytest.mark.parametrize(("part", "heads"), [("q", HEADS), ("k", KV_HEADS)])
def test_rows_of_a_rotated_pair_are_half_a_head_apart(tmp_path: Path, part: str, heads: int) -> None:
    write_gguf(tmp_path / "a.gguf")
    export.export_weights(tmp_path / "a.gguf", tmp_path)
    exported = read_bf16(tmp_path / "model.safetensors", f"model.layers.0.self_attn.{part}_proj.weight")
    interleaved = dequantised(tmp_path / "a.gguf")[f"blk.0.attn_{part}.weight"]
    for head in range(heads):
        for pair in range(HEAD_SIZE // 2):
            first = head * HEAD_SIZE + pair
            for row, place in ((first, 2 * pair), (first + HEAD_SIZE // 2, 2 * pair + 1)):
                np.testing.assert_allclose(exported[row], interleaved[head * HEAD_SIZE + place], rtol=2**-8)


def test_rotated_products_are_the_same_in_both_orders() -> None:
    """Attention sees products of q and k alone: turned as llama.cpp does and as Hugging Face does, they agree."""
    rng = np.random.default_rng(1)
    q, k, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((16, 8), (16, 8), (8,)))

    def interleaved(vector: np.ndarray, position: int) -> np.ndarray:
        angles = position * 10000.0 ** (-np.arange(8) / 8)
        even, odd = vector[0::2], vector[1::2]
        turned = even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)
        return np.stack(turned, axis=-1).ravel()

    def halves(vector: np.ndarray, position: int) -> np.ndarray:
        angles = position * 10000.0 ** (-np.arange(8) / 8)
        low, high = vector[:8], vector[8:]
        return np.concatenate(
            (low * np.cos(angles) - high * np.sin(angles), low * np.sin(angles) + high * np.cos(angles))
        )

    theirs = interleaved(q @ x, 5) @ interleaved(k @ x, 3)
    ours = halves(export.unpermuted(q, 1) @ x, 5) @ halves(export.unpermuted(k, 1) @ x, 3)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_model_becomes_a_folder_that_other_servers_read(model: Model) -> None:
    folder = export.fetch_safetensors(model, SILENT)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 32
    assert (folder / "tokenizer.json").read_text() == model.tokenizer_path.read_text()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["chat_template"]) == ("</s>", "{{ messages }}")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_a_gguf_that_changed_since_the_pull_is_refused(model: Model) -> None:
    with Path(model.manifest.source).open("ab") as file:
        file.write(b"something more")
    with pytest.raises(PeerError, match="not what tiny was made from any more"):
        export.fetch_gguf(model, SILENT)
    assert not export.gguf_path(model).exists()


def test_a_model_without_a_gguf_is_refused_with_a_way_out(model: Model) -> None:
    other = Model(model.path, model.manifest.model_copy(update={"source": "hub repository somebody/something"}))
    with pytest.raises(PeerError, match=r"slipstream pull \./model\.gguf"):
        export.fetch_gguf(other, SILENT)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", architecture="qwen2")
    with pytest.raises(PeerError, match="qwen2"):
        export.export_weights(tmp_path / "a.gguf", tmp_path)


def test_every_peer_has_a_default_and_a_best_way_to_run() -> None:
    for name, peer in PEERS.items():
        names = [configuration.name for configuration in peer.configurations]
        assert names[0] == "default", name
        assert len(set(names)) == len(names)
        if name != "slipstream":
            assert names[-1] == "best"
            assert all(configuration.notes for configuration in peer.configurations)


def test_nothing_is_installed_in_an_empty_home(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert [name for name, peer in PEERS.items() if peer(model).installed()] == ["slipstream"]


@pytest.mark.parametrize("peer", [LlamaServer, VLLM, SGLang])
def test_a_command_holds_the_flags_that_its_description_tells(peer: type[Peer], model: Model) -> None:
    for configuration in peer.configurations:
        command = " ".join(peer(model).command(configuration, 1234))  # type: ignore[attr-defined]
        flags = re.findall(r"(?<=\s)--?[a-z][a-z-]*", configuration.description)
        assert all(flag in command for flag in flags)
        assert "1234" in command
        assert "127.0.0.1" in command


def test_llama_server_reads_other_weights_in_its_best_configuration_alone(model: Model) -> None:
    commands = {way.name: LlamaServer(model).command(way, 1) for way in LlamaServer.configurations}
    assert str(export.gguf_path(model)) in commands["default"]
    assert str(export.gguf_path(model)) in commands["best-same-weights"]
    assert any(part.endswith("Q4_0.gguf") for part in commands["best"])
    assert "ngram-simple" in commands["best"]


def test_vllm_speculates_and_writes_compact_json_when_at_its_best(model: Model) -> None:
    default, best = (VLLM(model).command(way, 1) for way in VLLM.configurations)
    assert "--speculative-config" not in default
    assert json.loads(best[best.index("--speculative-config") + 1])["method"] == "ngram"
    assert json.loads(best[best.index("--structured-outputs-config") + 1])["disable_any_whitespace"] is True


def test_the_genai_app_is_kept_from_importing_its_neighbours(model: Model) -> None:
    default, best = (OpenVINOGenAI(model).command(way, 1) for way in OpenVINOGenAI.configurations)
    assert default[1] == "-P"
    assert default[default.index("--model") + 1] == str(export.weights_folder(model) / "genai")
    assert default[default.index("--store") + 1] == str(model.path)
    assert set(best) - set(default) == {"--prompt-lookup", "--compact"}


def test_ollama_keeps_to_its_own_folder(model: Model) -> None:
    settings = Ollama(model).settings(Ollama.configurations[-1], 1234)
    assert settings["OLLAMA_HOST"] == "127.0.0.1:1234"
    assert settings["OLLAMA_MODELS"].startswith(str(Ollama(model).folder))
    assert settings["OLLAMA_NUM_PARALLEL"] == "8"


def test_ollama_says_how_to_get_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PeerError, match=r"ollama\.com/download"):
        Ollama(model).setup(SILENT)


def test_sglangs_kernels_can_be_imported_but_not_called() -> None:
    from slipstream_bench.peers import sgl_kernel_stand_in

    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.rmsnorm is for other hardware"):
        sgl_kernel_stand_in.rmsnorm(1, eps=2)
    with pytest.raises(AttributeError):
        _ = sgl_kernel_stand_in.__wrapped__


def test_missing_library_links_are_made_from_the_packages_list(tmp_path: Path) -> None:
    (tmp_path / "libx.so.1.2.3").write_text("library")
    (tmp_path / "_symlinks.json").write_text(json.dumps({"libx.so": "libx.so.1", "libx.so.1": "libx.so.1.2.3"}))
    for _ in range(2):  # a second time does no harm
        restore_links(tmp_path)
        assert (tmp_path / "libx.so").read_text() == "library"


def test_an_environment_is_complete_when_its_recipe_is_done(tmp_path: Path) -> None:
    environment = Environment(tmp_path, "package==1")
    assert not environment.complete
    environment.mark_complete()
    assert environment.complete
    assert not Environment(tmp_path, "package==2").complete


def test_an_environment_knows_the_versions_in_it(tmp_path: Path) -> None:
    environment = Environment(tmp_path, "")
    info = environment.site_packages / "some_package-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.5\n")
    assert environment.version("some-package") == "1.5"
    with pytest.raises(PeerError, match="no package other"):
        environment.version("other")


OBJECT = {"type": "object", "additionalProperties": False}
SCHEMA = {
    **OBJECT,
    "properties": {
        "name": {"type": "string", "enum": ["read-file", 'a "b"']},
        "arguments": {
            **OBJECT,
            "properties": {
                "path": {"type": "string", "maxLength": 5, "description": "a path"},
                "line": {"type": "integer", "minimum": 17, "maximum": 1204},
                "all": {"type": "boolean"},
            },
            "required": ["path", "line", "all"],
        },
    },
    "required": ["name", "arguments"],
}


def test_a_compact_pattern_is_the_schemas_json_without_white_space() -> None:
    pattern = compact_pattern(SCHEMA)
    assert pattern is not None

    def fits(name: str, path: str, line: int, *, indent: int | None = None) -> bool:
        value = {"name": name, "arguments": {"path": path, "line": line, "all": True}}
        text = json.dumps(value, separators=(",", ":"), indent=indent, ensure_ascii=False)
        return re.fullmatch(pattern, text) is not None

    assert fits("read-file", "a/é\n", 20)
    assert fits('a "b"', '"\\"', 1204)
    assert not fits("read-file", "a/b", 20, indent=1)
    assert not fits("readxfile", "a/b", 20)
    assert not fits("read-file", "a/b/c/", 20)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (7, 7), (1, 9999), (17, 1204), (1, 600), (99, 1001), (100, 199)])
def test_a_compact_pattern_has_an_integers_bounds(low: int, high: int) -> None:
    pattern = compact_pattern({"type": "integer", "minimum": low, "maximum": high})
    assert pattern is not None
    found = {number for number in range(12_000) if re.fullmatch(pattern, str(number))}
    assert found == set(range(low, high + 1))
    assert not re.fullmatch(pattern, f"0{high}")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "maxLength": 5, "pattern": "a+"},
        {"type": "integer", "minimum": 1},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "array", "items": {"type": "boolean"}},
        {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
        {**OBJECT, "properties": {"a": {"type": "boolean"}}, "required": []},
        {**OBJECT, "properties": {"a": {"type": "null"}}, "required": ["a"]},
        {"anyOf": [{"type": "boolean"}]},
    ],
)
def test_what_a_compact_pattern_can_not_say_is_left_to_the_schema(schema: dict[str, object]) -> None:
    assert compact_pattern(schema) is None


SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def state(pid: int) -> str | None:
    """As in /proc: T is stopped; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return None


def test_a_server_is_paused_and_stopped_with_its_children(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "server.log"
    with server_process([sys.executable, "-c", SERVER, str(port)], f"http://127.0.0.1:{port}/", log) as group:
        match = re.search(r"child (\d+)", log.read_text())
        assert match is not None
        child = int(match[1])
        with paused([group]):
            wait_until(lambda: (state(group), state(child)) == ("T", "T"))
        wait_until(lambda: "T" not in (state(group), state(child)))
    assert state(group) is None
    wait_until(lambda: state(child) in (None, "Z"))


def test_a_server_that_ends_early_leaves_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(PeerError, match="no such model"),
        server_process(command, f"http://127.0.0.1:{free_port()}/", tmp_path / "log"),
    ):
        pass
