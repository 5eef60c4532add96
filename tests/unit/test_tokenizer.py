"""The tokenizer: the real default model's, what GGUF metadata describes, and what a `tokenizer.json` may be."""
# ruff: noqa: RUF001

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from slipstream.errors import InvalidRequestError, ModelError, UnsupportedModelError
from slipstream.models import Model
from slipstream.tokenizer import IncrementalDecoder, Tokenizer, build_tokenizer

SAMPLES = {
    "prose": "The quick brown fox doesn't jump; they'll say it's over.  Two spaces.   Three.",
    "code": 'def f(x: int) -> str:\n\tif x != 0 and x >= -1:\n        return f"{x!r}\\n"  # é\n',
    "this file": Path(__file__).read_text(encoding="utf-8"),
    "json": json.dumps({"a": [1, 2.5e-10, None], "ключ": "värde", "nested": {"": '\\"\u2028'}}, indent=2),
    "emoji": "😀👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ 🧑🏿‍🚀 #️⃣ 1️⃣",
    "cjk": "漢字かな交じり文。한국어도 있다，简体中文也有。𠮷野家 ㍿ﾊﾝｶｸ",
    "right to left": "العربية مع تشكيلٌ و עברית עם נִקּוּד \u202bmixed\u202c 123",
    "indic and thai": "हिन्दी क्षत्रिय বাংলা தமிழ் ภาษาไทยไม่มีช่องว่าง",
    "combining marks": "e\u0301 n\u0303 Z\u0351\u036b\u0343\u036a\u0302 \u1100\u1161\u11a8 A\u030a Å",
    "control": "a\x00b\x01c\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f\x80\x9f\x85",
    "line ends": "one\r\ntwo\rthree\n\n\nfour\u2028five\u2029six\r\n\r\n",
    "whitespace": " " * 300 + "x" + "\t" * 70 + "\n" * 90 + " \u00a0\u2003\u3000 \t \n  y ",
    "digits": "1234567890 3.14159 1,000,000 0x7fff ½ ² Ⅷ ٣٤٥ १२३ 𝟘𝟙 ① 2024-01-31T23:59:59Z",
    "urls": "https://user:pw@example.com:8080/a/b.html?q=1&r=%20x#frag mailto:a.b+c@d.co.uk",
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe\u2060f\u00adg\u034fh",
    "private and last": "\ue000 \uf8ff \U000f0000 \U0010ffff \ufffd \ufffe",
    "symbols": "∀x∈ℝ: ⌈x⌉ ≠ −x ∴ “quotes” ‘q’ … — – «» €£¥ ™®© ←↑→↓ ░▒▓ ¿¡",
    "repetition": "ab" * 3000 + "=" * 1000,
}
# SmolLM2's vocabulary has no token for six control characters, nor for the UTF-8 of the empty planes 4 to 11.
LACKING = "\x04\x06\x13\x14\x16\x1d"
CHARACTERS = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters=LACKING)
TEXTS = st.one_of(
    st.text(CHARACTERS),
    st.lists(
        st.one_of(st.text(CHARACTERS, max_size=3), st.sampled_from([*"\r\n\t '0Aa", "'ll", "  ", "👩‍👧", "漢"]))
    ).map("".join),
)


@pytest.fixture(scope="session")
def library(model: Model) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model.tokenizer_path))


class TestDefaultModel:
    @pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES.keys())
    def test_samples_round_trip(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()

    @settings(max_examples=300)
    @given(text=TEXTS)
    def test_any_text_round_trips(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text

    def test_bytes_without_a_token_are_left_out(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode(tokenizer.encode(f"a{LACKING}b")) == "ab"

    def test_special_tokens_in_text_become_those_tokens(
        self, tokenizer: Tokenizer, library: tokenizers.Tokenizer
    ) -> None:
        text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(text)
        start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        assert [id for id in ids if tokenizer.is_special(id)] == [start, end, start]
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == "user\nHi\nassistant\n"
        assert tokenizer.decode(ids, skip_special=False) == text
        assert [tokenizer.token_bytes(id) for id in (1, 2)] == [b"<|im_start|>", b"<|im_end|>"]

    def test_what_only_looks_special_is_text(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("<|im_end |> <|im_en d|> <| im_end|>")
        assert not any(map(tokenizer.is_special, ids))

    def test_ids_and_names(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.vocab_size == 49152
        assert tokenizer.token_id("<|im_end|>") == 2
        assert tokenizer.token_id("no such token") is None
        assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
        assert tokenizer.token_bytes(-1) == b""
        assert not tokenizer.is_special(tokenizer.vocab_size)
        assert all(tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size))

    @settings(max_examples=200)
    @given(ids=st.lists(st.integers(0, 49151)), skip_special=st.booleans())
    def test_decode_is_the_library_s(
        self, tokenizer: Tokenizer, library: tokenizers.Tokenizer, ids: list[int], skip_special: bool
    ) -> None:
        assert tokenizer.decode(ids, skip_special=skip_special) == library.decode(ids, skip_special)

    def test_lone_surrogates_are_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequestError, match=r"\\ud83d, at position 2"):
            tokenizer.encode("ab\ud83d")


class TestIncrementalDecoder:
    @pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES.keys())
    def test_token_by_token_gives_the_text_and_never_half_a_character(self, tokenizer: Tokenizer, text: str) -> None:
        decoder = IncrementalDecoder(tokenizer, skip_special=False)
        pieces = [decoder.feed([id]) for id in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert decoder.flush() == ""

    def test_a_character_is_held_back_until_it_is_whole(self, tokenizer: Tokenizer) -> None:
        for character in "👩🏿漢":
            ids = tokenizer.encode(character)
            assert len(ids) > 1
            decoder = IncrementalDecoder(tokenizer)
            assert [decoder.feed([id]) for id in ids] == [""] * (len(ids) - 1) + [character]

    @settings(max_examples=200)
    @given(chunks=st.lists(st.lists(st.integers(0, 49151), max_size=4)), skip_special=st.booleans())
    def test_any_tokens_in_any_chunks_give_what_decode_gives(
        self, tokenizer: Tokenizer, chunks: list[list[int]], skip_special: bool
    ) -> None:
        decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        streamed = "".join(map(decoder.feed, chunks)) + decoder.flush()
        assert streamed == tokenizer.decode(chain(*chunks), skip_special=skip_special)

    def test_flush_shows_what_is_left_and_starts_afresh(self, tokenizer: Tokenizer) -> None:
        decoder = IncrementalDecoder(tokenizer)
        assert decoder.feed(tokenizer.encode("ok 👩")[:-1]) == "ok "
        assert decoder.flush() == "\ufffd"
        assert decoder.feed(tokenizer.encode("👩")) + decoder.flush() == "👩"

    def test_special_tokens_are_shown_on_request(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a<|im_end|>")
        assert IncrementalDecoder(tokenizer).feed(ids) == "a"
        assert IncrementalDecoder(tokenizer, skip_special=False).feed(ids) == "a<|im_end|>"


def metadata(pre: str, *extra: tuple[str, int], merges: tuple[str, ...] = ()) -> dict[str, Any]:
    """GGUF metadata of a vocabulary of all bytes and `extra` (token, type) pairs."""
    alphabet = [(char, 1) for char in sorted(ByteLevel.alphabet())]
    tokens, types = zip(*alphabet, *extra, strict=False) if extra else zip(*alphabet, strict=True)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.merges": list(merges),
    }


def splits(pre: str, text: str) -> list[str]:
    pieces = build_tokenizer(metadata(pre)).pre_tokenizer.pre_tokenize_str(text)
    return [decoders.ByteLevel().decode([piece]) for piece, _ in pieces]


class TestFromGguf:
    @pytest.mark.parametrize(
        ("pre", "text", "expected"),
        [
            ("llama-bpe", "don't WE'LL", ["don", "'t", " WE", "'LL"]),
            ("llama-bpe", "1234567", ["123", "456", "7"]),
            ("llama-bpe", "a 1234", ["a", " ", "123", "4"]),
            ("llama-bpe", "x\n\n\ny", ["x", "\n\n\n", "y"]),
            ("llama-bpe", "a  \n  b", ["a", "  \n", " ", " b"]),
            ("llama-bpe", "f(x);\n}", ["f", "(x", ");\n", "}"]),
            ("llama-bpe", "   x  ", ["  ", " x", "  "]),
            ("llama-bpe", "漢字 кот", ["漢字", " кот"]),
            ("llama3", "12345", ["123", "45"]),
            ("qwen2", "don't WE'LL", ["don", "'t", " WE", "'LL"]),
            ("qwen2", "1234567", list("1234567")),
            ("qwen2", "a 12", ["a", " ", "1", "2"]),
            ("qwen2", "x\r\n\r\ny", ["x", "\r\n\r\n", "y"]),
            ("qwen2", "_name.attr", ["_name", ".attr"]),
            ("gpt-2", "don't WE'LL", ["don", "'t", " WE", "'", "LL"]),
            ("gpt-2", "a 1234567", ["a", " 1234567"]),
            ("gpt-2", "x\n\ny", ["x", "\n", "\n", "y"]),
            ("gpt-2", "_name.attr", ["_", "name", ".", "attr"]),
            ("smollm", "a 123", ["a", " ", "1", "2", "3"]),
            ("smollm", "don't  go½", ["don", "'t", " ", " go", "½"]),
        ],
    )
    def test_text_is_split_as_the_model_s_own_tokenizer_does(self, pre: str, text: str, expected: list[str]) -> None:
        assert splits(pre, text) == expected

    def test_only_qwen2_composes_characters(self) -> None:
        for pre, text in [("qwen2", "\u00e9"), ("llama-bpe", "e\u0301"), ("smollm", "e\u0301")]:
            tokenizer = Tokenizer(build_tokenizer(metadata(pre)).to_str())
            assert tokenizer.decode(tokenizer.encode("e\u0301")) == text

    def test_only_llama3_takes_an_entry_that_no_merges_lead_to(self) -> None:
        for pre, count in [("llama-bpe", 1), ("qwen2", 5)]:
            tokenizer = Tokenizer(build_tokenizer(metadata(pre, ("hello", 1))).to_str())
            assert len(tokenizer.encode("hello")) == count

    def test_merges_apply_in_order(self) -> None:
        tokenizer = Tokenizer(
            build_tokenizer(metadata("gpt-2", ("bc", 1), ("ab", 1), ("abc", 1), merges=("b c", "a b", "a bc"))).to_str()
        )
        assert [tokenizer.token_bytes(id) for id in tokenizer.encode("abcab")] == [b"abc", b"ab"]

    def test_control_tokens_are_special_and_user_defined_ones_are_text(self) -> None:
        tokenizer = Tokenizer(
            build_tokenizer(metadata("qwen2", ("<|end|>", 3), ("<tool é>", 4), ("[PAD7]", 5))).to_str()
        )
        end, tool, unused = 256, 257, 258
        assert tokenizer.encode("a<|end|><tool é>[")[1:3] == [end, tool]
        assert (tokenizer.is_special(end), tokenizer.is_special(tool)) == (True, False)
        assert tokenizer.decode([end, tool]) == "<tool é>"
        assert unused not in tokenizer.encode("[PAD7]")
        assert tokenizer.token_bytes(unused) == b"[PAD7]"

    def test_a_saved_tokenizer_is_the_same(self, tmp_path: Path) -> None:
        backend = build_tokenizer(metadata("llama-bpe", ("<|end|>", 3), ("he", 1), merges=("h e",)))
        backend.save(str(tmp_path / "tokenizer.json"))
        loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
        text = "he said 12345<|end|>\n\n"
        assert loaded.encode(text) == Tokenizer(backend.to_str()).encode(text)
        assert loaded.is_special(256)

    @pytest.mark.parametrize("pre", ["afmoe", "default", None])
    def test_other_pre_tokenizers_are_refused(self, pre: str | None) -> None:
        with pytest.raises(UnsupportedModelError, match=f"pre-tokenizer is {pre!r}; supported: gpt-2, olmo, smollm"):
            build_tokenizer(metadata("") | {"tokenizer.ggml.pre": pre})

    def test_other_tokenizer_models_are_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="tokenizer model is 'rwkv'; supported: 'gpt2'"):
            build_tokenizer(metadata("qwen2") | {"tokenizer.ggml.model": "rwkv"})

    def test_a_missing_vocabulary_is_named(self) -> None:
        with pytest.raises(ModelError, match=r"tokenizer\.ggml\.tokens"):
            build_tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"})


class TestTokenizerJson:
    def test_padding_and_truncation_in_the_file_are_ignored(self, tmp_path: Path) -> None:
        backend = build_tokenizer(metadata("qwen2"))
        backend.enable_truncation(3)
        backend.enable_padding(length=9)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert len(Tokenizer.from_file(tmp_path / "tokenizer.json").encode("abcde")) == 5

    def test_other_decoders_are_refused(self) -> None:
        backend = build_tokenizer(metadata("qwen2"))
        backend.decoder = decoders.Metaspace()
        with pytest.raises(UnsupportedModelError, match="decoder is Metaspace"):
            Tokenizer(backend.to_str())

    def test_other_models_are_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="model is WordLevel"):
            Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str())

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        with pytest.raises(ModelError, match=r"tokenizer\.json"):
            Tokenizer.from_file(path)
        path.write_text("{}")
        with pytest.raises(ModelError, match=r"tokenizer\.json"):
            Tokenizer.from_file(path)
