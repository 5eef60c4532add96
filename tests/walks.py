"""Random walks through the grammars of random schemas, each judged by `jsonschema`.

    python -m tests.walks --walks 20000

A walk takes a random token of those that the grammar allows, until the value is complete. Its choice is biased: to the
shortest way to the end at times, and to the characters that tell schemas apart. What the judge refuses is a misfit; a
walk that comes to a place where nothing is allowed is one too. Keys that a schema doesn't list may come twice, which no
grammar can prevent: the judge sees the last, as readers do.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any, NamedTuple

import jsonschema
from llguidance import LLMatcher, LLTokenizer

from slipstream.chat.schema.judging import for_validators
from tests.grammars import loosened_grammar_of
from tests.random_schemas import random_schema

LONGEST = 100
"""Tokens of a walk, after which it's led to its end."""

# What may come next on a way that ends: brackets that close first, and none that opens.
_CLOSING = [*b'"}],:', *b"0123456789", *b"abcdefghijklmnopqrstuvwxyz", *b" -.\\/", *range(256)]
_RANKS = {byte: rank for rank, byte in enumerate(dict.fromkeys(_CLOSING))}


class Misfit(Exception):
    """A walk that ended where it must not."""


def walk(matcher: LLMatcher, tokenizer: LLTokenizer, rng: random.Random) -> str | None:
    """The text of a random walk; None if it lost its way, as where a text has to hold what chance seldom writes."""
    ends = set(tokenizer.eos_tokens)
    texts = token_texts(tokenizer)
    hurry = rng.choice((0.1, 0.3, 0.7))
    taken: list[int] = []
    while not matcher.is_stopped():
        if matcher.is_accepting() and (len(taken) > LONGEST or rng.random() < 0.3):
            break
        bits = matcher.compute_bitmask()
        allowed = [token for at, byte in enumerate(bits) if byte for token in _BITS[byte, at] if token not in ends]
        if not allowed:
            if matcher.is_accepting():
                break
            raise Misfit(f"nothing is allowed after {tokenizer.decode_str(taken)!r}")
        hurries = len(taken) > LONGEST or rng.random() < hurry
        token = _hurried(allowed, texts, rng) if hurries else rng.choice(allowed)
        if not matcher.consume_token(token):
            raise Misfit(f"{matcher.get_error()[:80]} after {tokenizer.decode_str(taken)!r}")
        taken.append(token)
        if len(taken) > 20 * LONGEST:
            return None
    return tokenizer.decode_bytes(taken).decode()


def _hurried(allowed: list[int], texts: list[bytes], rng: random.Random) -> int:
    """The token that closes most."""
    some = rng.sample(allowed, min(len(allowed), 300))
    best = min(some, key=lambda token: _RANKS[texts[token][0]])
    plain = [token for token in some if texts[token].isalnum()]
    # Within a text, brackets lead nowhere, and it may have to end with a letter.
    return rng.choice(plain) if plain and texts[best] != b'"' and rng.random() < 0.5 else best


@lru_cache(maxsize=4)
def token_texts(tokenizer: LLTokenizer) -> list[bytes]:
    """What each token spells."""
    return [tokenizer.decode_bytes([token]) or b"?" for token in range(tokenizer.vocab_size)]


class _Bits(dict[tuple[int, int], list[int]]):
    """The tokens of a byte of a mask, at an index."""

    def __missing__(self, key: tuple[int, int]) -> list[int]:
        byte, at = key
        self[key] = [at * 8 + bit for bit in range(8) if byte >> bit & 1]
        return self[key]


_BITS = _Bits()


def verdict(schema: Any, text: str) -> str | None:
    """Why a text doesn't fit; None if it does."""
    try:
        value = json.loads(text, parse_float=Decimal)
    except ValueError as error:
        return f"{text}: {error}"
    exact = json.loads(json.dumps(for_validators(schema)), parse_float=Decimal)
    with localcontext(prec=400):  # of remainders of what has exponents of two digits
        error = next(JUDGE(exact, format_checker=FORMATS).iter_errors(value), None)
    return None if error is None else f"{text}: {error.message}"


def _is_integer(_: Any, value: Any) -> bool:
    """Whether JSON is a number without a fraction, however it's written: 1e+20 is one."""
    return isinstance(value, int | Decimal) and not isinstance(value, bool) and value % 1 == 0


JUDGE = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
"""Of numbers as exact as they are written."""
FORMATS = jsonschema.FormatChecker(["date", "email", "ipv4", "uuid"])
"""Formats are asserted, as docs/tools.md says; these are what the judge can check by itself."""


class Walk(NamedTuple):
    """What came of a walk."""

    schema: Any
    fault: str | None
    """Why it doesn't fit; None if it does."""
    loosened: bool
    """Whether the grammar leaves something of the schema out."""


def walks(count: int, seed: int, tokenizer: LLTokenizer, each: int = 5) -> Iterator[Walk]:
    """So many walks, several through each schema."""
    for number in range(-(-count // each)):
        rng = random.Random(f"{seed} {number}")
        schema = random_schema(rng)
        source, losses = loosened_grammar_of(schema)
        start = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(source), log_level=0)
        if start.is_error():
            yield Walk(schema, f"it doesn't compile: {start.get_error()[:300]}", bool(losses))
            continue
        for _ in range(each):
            fault = None
            try:
                text = walk(start.deep_copy(), tokenizer, rng)
                fault = verdict(schema, text) if text is not None else None
            except Misfit as error:
                fault = str(error)
            yield Walk(schema, fault, bool(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="byte", help="a tokenizer.json; single bytes by default")
    options = parser.parse_args()
    tokenizer = LLTokenizer(options.tokenizer)
    tried = loosened = misfits = 0
    for schema, fault, loose in walks(options.walks, options.seed, tokenizer):
        tried += 1
        loosened += loose
        if fault is not None and not loose:
            misfits += 1
            print(f"{json.dumps(schema)}\n    {fault}", flush=True)
        if tried % 1000 == 0:
            print(f"{tried:,} walks, {misfits} misfits, {loosened:,} through loosened schemas", flush=True)
    print(f"{tried:,} walks, {misfits} misfits, {loosened:,} through loosened schemas")
    sys.exit(1 if misfits else 0)


if __name__ == "__main__":
    main()
