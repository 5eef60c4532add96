"""Tokenizers made from GGUF metadata give the ids of the originals, and of a second reading of the same metadata."""

import json
from typing import Any, NamedTuple
from unicodedata import normalize

import pytest
import tokenizers
from hypothesis import assume, given, settings
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


@settings(max_examples=300)
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


# Other implementations


@pytest.fixture(scope="module")
def by_tiktoken(tokenizer: Tokenizer) -> Any:
    """The default model's vocabulary as tiktoken has such, whose tokens are merged by rank: the order of the ids."""
    import tiktoken

    ids = range(tokenizer.vocab_size)
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    return tiktoken.Encoding(
        "default",
        pat_str=pattern,
        mergeable_ranks={tokenizer.token_bytes(id): id for id in ids if not tokenizer.is_control(id)},
        special_tokens={tokenizer.token_bytes(id).decode(): id for id in ids if tokenizer.is_control(id)},
    )


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES.keys())
def test_the_default_model_s_samples_have_tiktoken_s_ids(tokenizer: Tokenizer, by_tiktoken: Any, text: str) -> None:
    assert tokenizer.encode(text) == by_tiktoken.encode(text, allowed_special="all")


@settings(max_examples=300)
@given(text=texts)
def test_any_text_has_tiktoken_s_ids(tokenizer: Tokenizer, by_tiktoken: Any, text: str) -> None:
    assert tokenizer.encode(text) == by_tiktoken.encode(text, allowed_special="all")


def test_the_default_model_s_control_tokens_are_tiktoken_s(tokenizer: Tokenizer, by_tiktoken: Any) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text) == by_tiktoken.encode(text, allowed_special="all")


@pytest.fixture(scope="module", params=[("bpe", True), ("bpe", False), ("unigram", True)], ids=str)
def by_sentencepiece(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any, bool]:
    """What is made of a vocabulary that SentencePiece trained on the samples, this, and whether its cuts may tie."""
    import sentencepiece

    kind, prefixed = request.param
    lines = [line for text in SAMPLES.values() for line in text.splitlines() if 0 < len(line) < 1000]
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "trained"),
        model_type=kind,
        vocab_size=1200,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefixed,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_file=str(folder / "trained.model"))
    ids = range(trained.vocab_size())
    kinds = ((trained.is_unknown, 2), (trained.is_control, 3), (trained.is_unused, 5), (trained.is_byte, 6))
    metadata = {
        "model": "llama" if kind == "bpe" else "t5",
        "tokens": [trained.id_to_piece(id) for id in ids],
        "scores": [trained.get_score(id) for id in ids],
        "token_type": [next((type for of, type in kinds if of(id)), 1) for id in ids],
        "add_space_prefix": prefixed,
        "unknown_token_id": trained.unk_id(),
    }
    described = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return Tokenizer(build_tokenizer(described).to_str()), trained, kind == "unigram"


@settings(max_examples=300)
@given(text=texts)
def test_any_text_has_sentencepiece_s_ids(by_sentencepiece: tuple[Tokenizer, Any, bool], text: str) -> None:
    ours, theirs, may_tie = by_sentencepiece
    text = text.replace("\0", "").replace("▁", "")
    assume(not any(control in text for control in ("<s>", "</s>", "<unk>")))  # which a plain prompt may have
    found, expected = ours.encode(text), theirs.encode(text)
    # The same pieces in another order are as likely in a unigram model, and either cut is right.
    assert found == expected or (may_tie and sorted(found) == sorted(expected))
