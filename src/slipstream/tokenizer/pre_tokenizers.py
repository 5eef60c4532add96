"""How byte-level BPE vocabularies cut text into pieces before they merge: a rule for each name that GGUF has for one.

GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) and leaves its rules to the reader. The rules here are those in the
original models' `tokenizer.json` or tiktoken files, not llama.cpp's rewriting of them.
"""
# ruff: noqa: RUF001

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Sequence, Split

Step = Callable[[], PreTokenizer]
"""Makes one step of a pre-tokenizer: patterns take a while to compile, and a model needs few of them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How text becomes pieces, of which each is merged alone."""

    steps: tuple[Step, ...]
    """What cuts the text, in order; one of them spells the pieces as bytes."""
    composes: bool = False
    """Whether characters are composed first (Unicode's NFC)."""
    takes_entries_whole: bool = False
    """Whether a piece that is a vocabulary entry is taken whole, even where no merges lead to it."""
    takes_bos: bool = False
    """Whether a prompt begins with the beginning-of-text token where the file doesn't say."""

    def pre_tokenizer(self) -> PreTokenizer:
        """All steps as one."""
        return Sequence([step() for step in self.steps])


def rule_of(name: str) -> Rule | None:
    """The rule that `tokenizer.ggml.pre` names, if it is known."""
    return RULES.get(ALIASES.get(name, name))


# Steps.


def _gpt2() -> PreTokenizer:
    """GPT-2's own pattern, which keeps a space with the word after it."""
    return ByteLevel(add_prefix_space=False)


def _bytes() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=False)


def _each_digit() -> PreTokenizer:
    return Digits(individual_digits=True)


def _numbers() -> PreTokenizer:
    return Digits(individual_digits=False)


def _punctuation() -> PreTokenizer:
    return Punctuation("contiguous")


def _split(pattern: str) -> Step:
    """What the pattern matches is a piece, and so is what lies between."""
    return lambda: Split(Regex(pattern), behavior="isolated")


def _patterns(*patterns: str) -> tuple[Step, ...]:
    """One pattern after the other, then bytes."""
    return (*map(_split, patterns), _bytes)


# What the patterns are made of.

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_AND = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_BY_CATEGORY = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"


def _cl100k(number: str) -> str:
    """The pattern of GPT-4, which many others share but for how digits are grouped."""
    return _WORD_AND + number + _REST


def _cased(number: str, ending: str = "", upper: str = _UPPER, lower: str = _LOWER, after: str = r"[\r\n/]*") -> str:
    """The pattern of GPT-4o, which cuts words where the case changes."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+{after}|{_END}"


def _kimi() -> str:
    """As GPT-4o, but Chinese characters are words apart from others."""
    upper, lower = (f"{letters[:-1]}&&[^\\p{{Han}}]]" for letters in (_UPPER, _LOWER))
    return r"[\p{Han}]+|" + _cased(r"\p{N}{1,3}", f"{_CONTRACTION}?", upper, lower, r"[\r\n]*")


_UP_TO_THREE, _ONE = r"\p{N}{1,3}", r"\p{N}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_ONE}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{_ONE}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CASED_LETTERS = r"\s?" + (
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛ"
    "ὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤ"
    "Ⳬ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_PUNCTUATION = r"\s?" + "[!-/:-~！-／：-～‘-‟\u3000-。]+"
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_SPACED_SCRIPTS = r" ?[^(\s|[.,!?…。，、।۔،])]+"

RULES: Mapping[str, Rule] = {
    # GPT-2's pattern.
    "gpt-2": Rule((_gpt2,)),
    "olmo": Rule((_gpt2,), composes=True),
    "smollm": Rule((_each_digit, _gpt2)),
    "command-r": Rule((_each_digit, _gpt2), composes=True),
    "falcon": Rule((_punctuation, _gpt2, _numbers, _split("[0-9][0-9][0-9]"))),
    # GPT-4's pattern.
    "llama-bpe": Rule(_patterns(_cl100k(_UP_TO_THREE)), takes_entries_whole=True, takes_bos=True),
    "glm4": Rule(_patterns(_cl100k(_UP_TO_THREE)), takes_entries_whole=True),
    "dbrx": Rule(_patterns(_cl100k(_UP_TO_THREE))),
    "qwen2": Rule(_patterns(_cl100k(_ONE)), composes=True),
    "solar-open": Rule(_patterns(_cl100k(_ONE))),
    "minicpm5": Rule(_patterns(_UP_TO_THREE, _cl100k(r"\p{N}+")), takes_entries_whole=True),
    "laguna": Rule(_patterns(r"[^\n]+|[\n]+", _cl100k(_ONE))),
    "qwen35": Rule(_patterns(_QWEN35), composes=True),
    "seed-coder": Rule(_patterns(rf"{_WORD_AND}{_ONE}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_END}")),
    "bailingmoe": Rule(_patterns(_BAILING)),
    "exaone-moe": Rule(_patterns(_EXAONE)),
    # GPT-4o's pattern.
    "gpt-4o": Rule(_patterns(_cased(_UP_TO_THREE, f"{_CONTRACTION}?")), takes_entries_whole=True),
    "minimax-m2": Rule(_patterns(_cased(_UP_TO_THREE, f"{_CONTRACTION}?"))),
    "tekken": Rule(_patterns(_cased(_ONE)), takes_entries_whole=True, takes_bos=True),
    "kimi-k2": Rule(_patterns(_kimi()), takes_entries_whole=True),
    "tiny_aya": Rule(_patterns(r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_UP_TO_THREE, f"{_CONTRACTION}?"))),
    # DeepSeek's patterns, which set scripts apart.
    "deepseek-llm": Rule(
        (
            *map(_split, (r"[\r\n]", _CASED_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_CJK)),
            _each_digit,
            _bytes,
        )
    ),
    "deepseek-coder": Rule((*map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK)), _each_digit, _bytes)),
    "deepseek-v3": Rule(_patterns(_UP_TO_THREE, _CJK, rf"{_BY_CATEGORY}[\r\n]*|{_END}")),
    "spark2_5": Rule(_patterns(_UP_TO_THREE, _CJK, rf"{_BY_CATEGORY}|[\r\n]|\s+(?!\S)|\s+", _ONE)),
    # Bloom's pattern.
    "bloom": Rule(_patterns(_SPACED_SCRIPTS)),
    "viking": Rule((_split(_SPACED_SCRIPTS), _each_digit, _bytes)),
}
"""Rules by the name of the model that had each first."""

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(
        ("phi-2", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling"), "gpt-2"
    ),
    "mpt": "olmo",
    **dict.fromkeys(("starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("glm5", "chatglm-bpe"), "glm4"),
    "smaug-bpe": "dbrx",
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "hunyuan", "stablelm2"), "qwen2"),
    "grok-2": "solar-open",
    **dict.fromkeys(("bailingmoe2", "llada-moe"), "bailingmoe"),
    **dict.fromkeys(("llama4", "kanana2", "talkie"), "gpt-4o"),
    "cohere2moe": "tiny_aya",
    **dict.fromkeys(("hunyuan-dense", "joyai-llm", "hy_v4"), "deepseek-v3"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
}
