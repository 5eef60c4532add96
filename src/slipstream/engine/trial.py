"""The trial of a grammar, in a process of its own: its compiler and parser are foreign code that hostile input crashes.

The file imports little: it is all that the process loads.
"""

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

LIMITS = LLParserLimits(
    max_grammar_size=200_000,
    initial_lexer_fuel=2_000_000,
    max_lexer_states=50_000,
)
"""Work and memory of a grammar, while it's compiled and at each step that follows it."""

TOO_MUCH = "it takes too much"
"""The verdict on a grammar that compiles, but meets the limits at once, or ends the process."""


def matcher_of(source: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher of a Lark grammar, which may have an error."""
    return LLMatcher(tokenizer, LLMatcher.grammar_from_lark(source), log_level=0, limits=LIMITS)


class GrammarTrial:
    """Compiles grammars over a vocabulary, to see what comes of it; `tokenizer_json` is a `tokenizer.json`."""

    def __init__(self, tokenizer_json: str, vocab_size: int, stop_token_ids: list[int]) -> None:
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=stop_token_ids)

    def run(self, source: str) -> str:
        """Compile a grammar and take the first step of it; returns what is wrong with it, nothing if it's sound."""
        matcher = matcher_of(source, self._tokenizer)
        if error := matcher.get_error():
            return str(error)
        ahead = matcher.deep_copy()
        allowed = ahead.compute_bitmask()
        ahead.compute_ff_tokens()
        if (place := next((place for place, bits in enumerate(allowed) if bits), None)) is not None:
            lowest = allowed[place] & -allowed[place]
            ahead.consume_tokens([8 * place + lowest.bit_length() - 1])
        return TOO_MUCH if ahead.is_error() else ""
