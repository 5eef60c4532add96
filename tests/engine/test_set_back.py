"""Requests that have to give their place back."""

import threading

from slipstream.engine import EngineCore, EngineRequest, Output, SamplingParams, as_prompt
from slipstream.engine.grammar import GrammarCompiler
from slipstream.models import Model
from slipstream.tokenizer import Tokenizer
from tests.grammars import grammar_of
from tests.rambling import RandomLogits
from tests.waiting import HANG


def test_one_that_has_just_started_gives_its_place_to_another_tenant(
    model: Model, tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """Before it said what its grammar forces at the start; it does when it starts again."""
    grammar = compiler.compile(grammar_of({"enum": ["this and no other", "this and another"]}), param="tools")
    core = EngineCore(
        RandomLogits(tokenizer.vocab_size),
        tokenizer,
        context_length=2000,
        stop_token_ids=frozenset(model.manifest.stop_token_ids),
        max_running=2,
    )
    texts: dict[str, str] = {}
    errors: list[Exception] = []
    left = threading.Semaphore(0)
    others = [f"a{number}" for number in range(1, 13)]

    def ask(name: str, length: int, then: list[tuple[str, int]]) -> None:
        def take(output: Output) -> None:  # on the engine's thread, which starts what was asked here all at once
            if output.error is not None:
                errors.append(output.error)
            texts[name] = texts.get(name, "") + output.text
            if output.finish_reason is not None:
                left.release()
                for other, tokens in then:
                    ask(other, tokens, [])

        prompt = as_prompt(tokenizer.encode(f"{name} " + "and so on " * (length // 3)))
        params = SamplingParams(temperature=0.0, max_tokens=40)
        core.submit(EngineRequest(prompt=prompt, params=params, tenant=name[0], grammar=grammar), take)

    try:
        # The other tenant has both places until it was served as much as b1: then b2 is next, beside who just started.
        ask("b0", 3, [("b1", 1200), *((name, 3) for name in others), ("b2", 3)])
        for _ in range(3 + len(others)):
            assert left.acquire(timeout=HANG)
        assert core.stats().preemptions > 0
    finally:
        core.shutdown()
    assert not errors
    assert sorted(texts) == sorted([*others, "b0", "b1", "b2"])
    assert set(texts.values()) <= {'"this and no other"', '"this and another"'}
