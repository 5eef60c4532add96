"""Grammars: an answer that meets the limits of one harms no other that follows it."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from slipstream.engine.grammar import Constraint, GrammarBrokenError, GrammarCompiler, GrammarFailedError
from slipstream.errors import InvalidRequestError
from slipstream.models import Model
from slipstream.sampling.sampler import masked
from slipstream.tokenizer import Tokenizer
from tests.grammars import grammar_of

# Each "a" of the text costs the lexer much more than the one before.
EXHAUSTING = {"type": "string", "pattern": "^(((a{1,100}){1,100}){1,100}){1,100}$"}
SCHEMA = {"type": "object", "properties": {"a": EXHAUSTING, "b": {"type": "integer"}}, "required": ["a", "b"]}
SOURCE = grammar_of(SCHEMA)


def masks(constraint: Constraint, tokens: Sequence[int]) -> list[bytes]:
    """What is allowed before each of the tokens, having followed them."""
    allowed = []
    for token in tokens:
        allowed.append(constraint.mask().tobytes())
        constraint.accept((token,))
    return allowed


def exhaust(constraint: Constraint, tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarFailedError):
        masks(constraint, tokenizer.encode("aaaa") * 20)


@pytest.mark.parametrize("where", ["at the start", "on the way"])
def test_an_answer_goes_on_where_another_met_the_limits(
    compiler: GrammarCompiler, model: Model, tokenizer: Tokenizer, where: str
) -> None:
    head, rest = tokenizer.encode('{"a": "'), tokenizer.encode('aaaa", "b": 3}')
    expected = masks(compiler.compile(SOURCE, param="tools").constraint(), head + rest)

    grammar = compiler.compile(SOURCE, param="tools")
    answer, greedy = grammar.constraint(), grammar.constraint()
    begun = masks(answer, head) if where == "on the way" else []
    greedy.accept(head)
    exhaust(greedy, tokenizer)
    assert not grammar.usable
    assert begun + masks(answer, (head + rest)[len(begun) :]) == expected
    assert answer.finished


def test_an_answer_goes_on_where_a_look_ahead_met_the_limits(
    compiler: GrammarCompiler, model: Model, tokenizer: Tokenizer
) -> None:
    answer = compiler.compile(SOURCE, param="tools").constraint()
    answer.accept(tokenizer.encode('{"a": "'))
    exhaust(answer.copy(), tokenizer)
    masks(answer, tokenizer.encode('a", "b": 3}'))
    assert answer.finished


def test_a_grammar_that_was_spoilt_is_compiled_anew(
    compiler: GrammarCompiler, model: Model, tokenizer: Tokenizer
) -> None:
    grammar = compiler.compile(SOURCE, param="tools")
    assert compiler.compile(SOURCE, param="tools") is grammar
    answer = grammar.constraint()
    answer.accept(tokenizer.encode('{"a": "'))
    exhaust(answer, tokenizer)
    assert compiler.compile(SOURCE, param="tools").usable


def test_what_is_not_allowed_fails(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    answer = compiler.compile(SOURCE, param="tools").constraint()
    with pytest.raises(GrammarBrokenError, match="the server's fault"):
        answer.accept(tokenizer.encode("no"))


def test_a_token_is_valid_just_if_the_mask_allows_it(
    compiler: GrammarCompiler, model: Model, tokenizer: Tokenizer
) -> None:
    """A greedy choice is checked alone, and only masked if it doesn't fit: both have to say the same."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
    answer = compiler.compile(grammar_of(schema), param="tools").constraint()
    vocab_size = model.manifest.vocab_size
    some = {*np.random.default_rng(0).choice(vocab_size, 400, replace=False).tolist(), *model.manifest.stop_token_ids}
    for token in tokenizer.encode('{"a": "a \u00e4 \\n", "b": -30}'):
        allowed = np.isfinite(masked(np.zeros(vocab_size, np.float32), answer.mask()))
        for candidate in {*some, token}:
            assert bool(answer.valid_prefix((candidate,))) == allowed[candidate], candidate
        answer.accept((token,))
    assert answer.finished


def test_what_compiles_but_is_too_wide_to_follow_is_refused_by_its_trial(compiler: GrammarCompiler) -> None:
    """The first token alone has more ways to go on than the parser may keep track of."""
    text = {"type": "string"}
    closed = {"type": "object", "additionalProperties": False}
    some = [{**closed, "properties": {f"k{at}": text, "z": {"type": "array"}}} for at in range(1000)]
    with pytest.raises(InvalidRequestError, match="too much time, memory or stack") as caught:
        compiler.compile(f"start: %json {json.dumps({'anyOf': some})}", param="tools")
    assert caught.value.code == "schema_too_complex"
    assert compiler.compile(SOURCE, param="tools").usable


def test_a_crash_of_the_compiler_is_an_answer_that_is_remembered(compiler: GrammarCompiler) -> None:
    assert compiler.sandbox is not None
    source, deaths = f"start: %json {json.dumps({'const': -(2**63)})}", compiler.sandbox.deaths
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match=r"sandbox_seconds, sandbox_memory\): simplify"):
            compiler.compile(source, param="tools")
    assert compiler.sandbox.deaths == deaths + 1


def test_a_tokenizer_may_have_tokens_of_which_the_model_has_no_logits(model: Model, tokenizer: Tokenizer) -> None:
    logits, (stop, *_) = tokenizer.vocab_size - 3, model.manifest.stop_token_ids
    compiler = GrammarCompiler(tokenizer, vocab_size=logits, stop_token_ids=[stop])
    try:
        answer = compiler.compile(grammar_of({"type": "boolean"}), param="tools").constraint()
    finally:
        compiler.close()
    allowed = np.flatnonzero(np.isfinite(masked(np.zeros(logits, np.float32), answer.mask())))
    assert {tokenizer.encode("true")[0], tokenizer.encode("false")[0]} <= set(allowed.tolist())
