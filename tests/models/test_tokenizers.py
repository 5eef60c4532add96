"""Tokenizers made from GGUF metadata give the ids of the originals, and of a second reading of the same metadata."""

import json
from typing import NamedTuple
from unicodedata import normalize

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.tokenizer import Tokenizer, build_tokenizer
from tests.real_vocabularies import NpmMissingError, vocabulary
from tests.unit.test_tokenizer import CHARACTERS, SAMPLES, TEXTS
from tests.vocabularies import as_gguf

pytestmark = pytest.mark.models


class Original(NamedTuple):
    """A vocabulary, and what a GGUF file of it says."""

    name: str
    model: str
    pre: str
    prefixed: bool = False
    """Whether a space is put before a text."""


class Pair(NamedTuple):
    """A tokenizer made from GGUF metadata, and the original."""

    ours: Tokenizer
    theirs: tokenizers.Tokenizer


ORIGINALS = (
    Original("qwen3", "gpt2", "qwen2"),
    Original("llama3.1", "gpt2", "llama-bpe"),
    Original("gpt-oss", "gpt2", "gpt-4o"),
    Original("deepseek-v3", "gpt2", "deepseek-v3"),
    Original("mistral", "gpt2", "tekken"),
    Original("gemma3", "llama", "default"),
    Original("gemma3", "gemma4", "gemma4"),
    Original("mistral-7b", "llama", "default", prefixed=True),
)
PIECES = st.sampled_from(
    [*"\r\n\t '0Aa.", "'ll", "  ", "    ", "\n\n", "👩\u200d👧", "漢", "e\u0301", "<table>", "word", "Word", "123"]
)
texts = st.one_of(TEXTS, st.lists(PIECES).map("".join), st.text(CHARACTERS, max_size=20).map(lambda text: text * 3))


@pytest.fixture(scope="module", params=ORIGINALS, ids=lambda original: f"{original.name} as {original.model}")
def pair(request: pytest.FixtureRequest) -> Pair:
    original: Original = request.param
    try:
        path = vocabulary(original.name)
    except NpmMissingError as error:
        pytest.skip(str(error))
    metadata = as_gguf(json.loads(path.read_text()), model=original.model, pre=original.pre)
    metadata["tokenizer.ggml.add_space_prefix"] = original.prefixed
    return Pair(Tokenizer(build_tokenizer(metadata).to_str()), tokenizers.Tokenizer.from_file(str(path)))


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES.keys())
def test_samples_have_the_original_s_ids(pair: Pair, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    composes = theirs.normalizer is not None and "\u0301" not in theirs.normalizer.normalize_str("e\u0301")
    before = " " if theirs.normalizer is not None and theirs.normalizer.normalize_str("a") == "▁a" else ""
    spelled = b"".join(map(ours.token_bytes, ids)).decode()
    assert spelled == before + (normalize("NFC", text) if composes else text)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_any_text_has_the_original_s_ids(pair: Pair, text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_every_token_is_spelled_as_the_original_decodes_it(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.vocab_size == theirs.get_vocab_size()
    for id in range(0, ours.vocab_size, 7):
        after = theirs.decode([theirs.token_to_id("a") or 0, id], skip_special_tokens=False)
        assert f"a{ours.token_bytes(id).decode(errors='replace')}" == after
