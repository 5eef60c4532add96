"""Tokenizers made from GGUF metadata: the published rules of byte-level vocabularies, and SentencePiece's two kinds."""
# ruff: noqa: RUF001

import json
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Sequence, Split

from slipstream.engine.grammar import GrammarCompiler
from slipstream.errors import UnsupportedModelError
from slipstream.tokenizer import IncrementalDecoder, Tokenizer, build_tokenizer
from slipstream.tokenizer.pre_tokenizers import ALIASES, RULES, rule_of
from slipstream.tokenizer.provenance import content
from tests.unit.test_tokenizer import CHARACTERS, SAMPLES, metadata
from tests.vocabularies import as_gguf

TEXTS = st.lists(
    st.one_of(
        st.text(CHARACTERS, max_size=3), st.sampled_from([*"\r\n\t '019Aaé.(/$", "'ll", "  ", "漢", "か", "1234"])
    )
).map("".join)

GPT2 = ByteLevel(add_prefix_space=False)
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = Digits(individual_digits=True)


def split(*patterns: str) -> list[PreTokenizer]:
    return [Split(Regex(pattern), behavior="isolated") for pattern in patterns]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MINICPM5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
LING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPARK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
    r"|[\r\n]|\s+(?!\S)|\s+"
)
CJK, DEEPSEEK_CJK = "[一-龥\u3040-ゟ゠-ヿ]+", "[一-龥ࠀ-一가-\ud7ff]+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

PUBLISHED: dict[str, list[PreTokenizer]] = {
    "gpt-2": [GPT2],
    "olmo": [GPT2],
    "smollm": [DIGITS, GPT2],
    "command-r": [DIGITS, GPT2],
    "falcon": [Punctuation("contiguous"), GPT2, Digits(individual_digits=False), *split("[0-9][0-9][0-9]")],
    "llama-bpe": [*split(LLAMA3), BYTES],
    "glm4": [*split(LLAMA3), BYTES],
    "dbrx": [*split(LLAMA3), BYTES],
    "qwen2": [*split(QWEN2), BYTES],
    "solar-open": [*split(QWEN2), BYTES],
    "minicpm5": [*split(r"\p{N}{1,3}", MINICPM5), BYTES],
    "laguna": [*split(r"[^\n]+|[\n]+", QWEN2), BYTES],
    "qwen35": [*split(QWEN35), BYTES],
    "seed-coder": [*split(SEED), BYTES],
    "bailingmoe": [*split(LING), BYTES],
    "exaone-moe": [*split(EXAONE_MOE), BYTES],
    "gpt-4o": [*split(GPT4O), BYTES],
    "minimax-m2": [*split(GPT4O), BYTES],
    "tekken": [*split(TEKKEN), BYTES],
    "kimi-k2": [*split(KIMI), BYTES],
    "tiny_aya": [*split(r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O), BYTES],
    "deepseek-coder": [*split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK), DIGITS, BYTES],
    "deepseek-v3": [*split(r"\p{N}{1,3}", CJK, DEEPSEEK3), BYTES],
    "spark2_5": [*split(r"\p{N}{1,3}", CJK, SPARK, r"\p{N}"), BYTES],
    "bloom": [*split(BLOOM), BYTES],
    "viking": [*split(BLOOM), DIGITS, BYTES],
}
"""Pre-tokenizers by name, as the `tokenizer.json` files of the models have them."""


class TestByteLevel:
    def test_all_rules_are_here_but_for_one_that_lists_letters(self) -> None:
        assert PUBLISHED.keys() == RULES.keys() - {"deepseek-llm"}
        assert all(rule_of(name) is RULES[known] for name, known in ALIASES.items())

    @pytest.mark.parametrize("pre", PUBLISHED)
    def test_samples_are_cut_as_published(self, pre: str) -> None:
        ours, published = build_tokenizer(metadata(pre)).pre_tokenizer, Sequence(PUBLISHED[pre])
        for text in SAMPLES.values():
            assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)

    @pytest.mark.parametrize("pre", PUBLISHED)
    @settings(max_examples=50)
    @given(text=TEXTS)
    def test_any_text_is_cut_as_published(self, pre: str, text: str) -> None:
        ours, published = rule_of(pre), Sequence(PUBLISHED[pre])
        assert ours is not None
        assert ours.pre_tokenizer().pre_tokenize_str(text) == published.pre_tokenize_str(text)

    @pytest.mark.parametrize(
        ("text", "pieces"),
        [
            # Its range of punctuation holds the ASCII letters, and its range of characters much of what is none.
            ("Hello, wörld 123", ["Hello", ",", " w", "ö", "rld", " ", "1", "2", "3"]),
            ("ΑΩ Жя\r\n", ["ΑΩ", " Жя", "\r", "\n"]),
            ("a 漢字。(x)", ["a", " ", "漢字", "。", "(", "x", ")"]),
        ],
    )
    def test_deepseek_s_first_rule(self, text: str, pieces: list[str]) -> None:
        cut = build_tokenizer(metadata("deepseek-llm")).pre_tokenizer.pre_tokenize_str(text)
        assert [decoders.ByteLevel().decode([piece]) for piece, _ in cut] == pieces

    @pytest.mark.parametrize("alias", ALIASES)
    def test_an_alias_is_the_rule_that_it_names(self, alias: str) -> None:
        assert build_tokenizer(metadata(alias)).to_str() == build_tokenizer(metadata(ALIASES[alias])).to_str()


CORPUS = [line for text in SAMPLES.values() for line in text.splitlines() if len(line) < 1000]
CONTROL = ["<unk>", "<s>", "</s>"]
ALL_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACED = [" ", "  x", " a b ", "x ", "", "é 漢 \n\t", "<0x0A>", "▁", "a▁b", "\U0001f9ff " * 3, *SAMPLES.values()]
SPACED_TEXTS = st.lists(st.one_of(st.text(max_size=3), st.sampled_from([*"\n \t▁x", "  ", "the", " over"]))).map(
    "".join
)


def bpe(*, prefixed: bool) -> tokenizers.Tokenizer:
    """A vocabulary as Llama 2 or Gemma have it, trained on the samples."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefixed else replace
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[*CONTROL, *ALL_BYTES], limit_alphabet=150, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in CONTROL]
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def unigram(*, prefixed: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=CONTROL, unk_token="<unk>", initial_alphabet=list("▁ aé"), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.pre_tokenizer = None  # which is how it was trained, not what cuts a text
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefixed else replace
    backend.decoder = decoders.Metaspace(prepend_scheme="always" if prefixed else "never")
    return backend


def gguf_of(original: tokenizers.Tokenizer, model: str, *, prefixed: bool) -> dict[str, Any]:
    described = as_gguf(json.loads(original.to_str()), model=model)
    return described | {"tokenizer.ggml.add_space_prefix": prefixed, "tokenizer.ggml.unknown_token_id": 0}


@pytest.fixture(scope="module", params=[True, False], ids=["prefixed", "bare"])
def prefixed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def trained(*, prefixed: bool) -> tokenizers.Tokenizer:
    return bpe(prefixed=prefixed)


@pytest.fixture(scope="module")
def tokenizer(trained: tokenizers.Tokenizer) -> Tokenizer:
    """The original's `tokenizer.json`."""
    return Tokenizer(trained.to_str())


def merged(text: str, described: dict[str, Any]) -> list[int]:
    """What SentencePiece's BPE makes of a normalised text, slowly: the best-scored union of neighbours comes next."""
    tokens, scores, types = (described[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    ids = {token: id for id, token in enumerate(tokens) if types[id] == 1}
    parts = list(text)
    while True:
        unions = [
            (-scores[ids[left + right]], ids[left + right], ids[left], ids[right], at)
            for at, (left, right) in enumerate(pairwise(parts))
            if left + right in ids and left in ids and right in ids
        ]
        if not unions:
            break
        at = min(unions)[-1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [id for part in parts for id in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


class TestByteFallback:
    @settings(max_examples=50)
    @given(text=SPACED_TEXTS)
    def test_merges_of_the_file_give_the_original_s_ids(
        self, trained: tokenizers.Tokenizer, *, prefixed: bool, text: str
    ) -> None:
        ours = Tokenizer(build_tokenizer(gguf_of(trained, "gemma4", prefixed=prefixed)).to_str())
        for each in (text, *SPACED):
            assert ours.encode(each) == trained.encode(each).ids

    @settings(max_examples=50)
    @given(text=SPACED_TEXTS)
    def test_scores_give_the_best_union_first(
        self, trained: tokenizers.Tokenizer, *, prefixed: bool, text: str
    ) -> None:
        described = gguf_of(trained, "llama", prefixed=prefixed)
        ours = Tokenizer(build_tokenizer(described).to_str())
        spelled = text.replace(" ", "▁")
        assert ours.encode(text) == merged(f"▁{spelled}" if prefixed and text else spelled, described)

    @pytest.mark.parametrize("text", SPACED)
    def test_tokens_spell_the_text(self, tokenizer: Tokenizer, *, prefixed: bool, text: str) -> None:
        ids = tokenizer.encode(text)
        spelled = b"".join(map(tokenizer.token_bytes, ids))
        # `▁` is a space to such a vocabulary.
        expected = (" " if prefixed and text else "") + text.replace("▁", " ")
        assert spelled == expected.encode()
        assert tokenizer.decode(ids) == expected
        decoder = IncrementalDecoder(tokenizer)
        assert "".join(str(decoder.feed([id])) for id in ids) + decoder.flush() == expected

    def test_each_text_between_control_tokens_begins_as_the_original_has_it(
        self, tokenizer: Tokenizer, trained: tokenizers.Tokenizer
    ) -> None:
        for text in ("<s>the</s> the", "the <s> <s>x", "a</s>", "</s>\n"):
            assert tokenizer.encode(text) == trained.encode(text).ids

    def test_text_that_goes_on_has_no_space_before_it(self, tokenizer: Tokenizer, *, prefixed: bool) -> None:
        assert tokenizer.decode(tokenizer.encode("the", begins=False)) == "the"
        assert tokenizer.begins_after(2) is prefixed
        assert not tokenizer.begins_after(300)

    def test_content_spells_no_control_token(self, tokenizer: Tokenizer, *, prefixed: bool) -> None:
        ids = tokenizer.encode(content("</s> <0x41>"))
        assert not any(map(tokenizer.is_control, ids))
        assert tokenizer.decode(ids) == " " * prefixed + "</s> <0x41>"

    def test_a_grammar_takes_its_tokens(self, tokenizer: Tokenizer) -> None:
        compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, stop_token_ids=[2])
        source = 'start: %json {"type": "object", "properties": {"the a": {"type": "string"}}, "required": ["the a"]}'
        constraint = compiler.compile(source, param="tools").constraint()
        ids = tokenizer.encode('{"the a": "漢 \U0001f9ff over"}', begins=False)
        assert constraint.valid_prefix(ids) == len(ids)
        constraint.accept(ids)
        assert constraint.finished

    def test_runs_of_spaces_that_are_user_defined_are_vocabulary(self, trained: tokenizers.Tokenizer) -> None:
        described = gguf_of(trained, "llama", prefixed=False)
        runs = [" " * length for length in range(2, 8)]  # of each length, as Gemma has them
        for token in (*runs, "<tag>"):
            described["tokenizer.ggml.tokens"].append(token)
            described["tokenizer.ggml.token_type"].append(4)
            described["tokenizer.ggml.scores"].append(-1000.0)
        tokenizer = Tokenizer(build_tokenizer(described).to_str())
        *_, five, _, seven, tag = range(tokenizer.vocab_size)
        assert tokenizer.encode(f"\n{' ' * 5}\n{' ' * 7}<tag>")[1::2] == [five, seven]
        assert [*map(tokenizer.token_bytes, (five, seven))] == [b" " * 5, b" " * 7]
        assert tokenizer.control_token("<tag>") == tag

    def test_phi3_s_control_tokens_take_the_white_space_after_them(self, trained: tokenizers.Tokenizer) -> None:
        described = gguf_of(trained, "llama", prefixed=True) | {"general.architecture": "phi3"}
        tokenizer = Tokenizer(build_tokenizer(described).to_str())
        assert tokenizer.encode("</s>\n the") == [2, *tokenizer.encode("the")]
        assert tokenizer.encode("<s>\nthe") == [1, *tokenizer.encode("\nthe")]

    def test_mistral_s_text_after_a_control_token_has_no_space_before_it(self, trained: tokenizers.Tokenizer) -> None:
        described = gguf_of(trained, "llama", prefixed=True)
        described["tokenizer.ggml.tokens"].append("[INST]")
        described["tokenizer.ggml.token_type"].append(3)
        described["tokenizer.ggml.scores"].append(0.0)
        tokenizer = Tokenizer(build_tokenizer(described).to_str())
        inst = tokenizer.control_token("[INST]")
        assert tokenizer.encode("<s>[INST] the") == [1, inst, *tokenizer.encode(" the")]
        assert tokenizer.encode("the") == tokenizer.encode(" the")
        assert not tokenizer.begins_after(1)


@pytest.fixture(scope="module")
def likely(*, prefixed: bool) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """A unigram vocabulary's original, and what is made of its GGUF metadata."""
    original = unigram(prefixed=prefixed)
    return original, Tokenizer(build_tokenizer(gguf_of(original, "t5", prefixed=prefixed)).to_str())


class TestUnigram:
    @settings(max_examples=50)
    @given(text=SPACED_TEXTS)
    def test_ids_are_the_original_s(self, likely: tuple[tokenizers.Tokenizer, Tokenizer], text: str) -> None:
        original, ours = likely
        for each in (text, *SPACED[:-2]):
            assert ours.encode(each) == original.encode(each).ids

    def test_extra_white_space_is_removed_where_the_file_says_so(self) -> None:
        original = unigram(prefixed=True)
        removes = {"tokenizer.ggml.remove_extra_whitespaces": True}
        ours = Tokenizer(build_tokenizer(gguf_of(original, "t5", prefixed=True) | removes).to_str())
        assert ours.encode("  the   over ") == original.encode("the over").ids

    def test_tokens_spell_the_text_and_fit_a_grammar(
        self, likely: tuple[tokenizers.Tokenizer, Tokenizer], *, prefixed: bool
    ) -> None:
        _, ours = likely
        assert ours.decode(ours.encode("over the a")) == " " * prefixed + "over the a"
        compiler = GrammarCompiler(ours, vocab_size=ours.vocab_size, stop_token_ids=[2])
        constraint = compiler.compile('start: "the over a"', param="tools").constraint()
        constraint.accept(ours.encode("the over a", begins=False))
        assert constraint.finished


class TestTokenizerJson:
    def test_a_metaspace_pre_tokenizer_puts_a_space_before_the_first_text(self) -> None:
        original = bpe(prefixed=False)
        original.normalizer = None
        for scheme in ("always", "first", "never"):
            original.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
            ours = Tokenizer(original.to_str())
            for text in ("the", " the", "<s>the over", "the</s>the", "</s> the"):
                assert ours.encode(text) == original.encode(text).ids

    def test_what_is_stripped_though_nothing_put_it_there_is_refused(self) -> None:
        original = bpe(prefixed=False)
        original.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        with pytest.raises(UnsupportedModelError, match="decoder is Replace, Strip"):
            Tokenizer(original.to_str())

    def test_added_tokens_of_a_unigram_vocabulary_are_control_tokens(self) -> None:
        original = unigram(prefixed=True)
        original.add_tokens([AddedToken("<tag>", normalized=False)])
        ours = Tokenizer(original.to_str())
        assert ours.encode("the<tag>") == original.encode("the<tag>").ids
        assert ours.control_token("<tag>") not in ours.encode(content("<tag>"))
