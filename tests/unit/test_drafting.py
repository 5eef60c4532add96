"""What is looked up, how likely it is held to be, and how much of it a step takes."""

import pytest

from slipstream.backend import StepCost, StepMeasurements
from slipstream.engine import as_prompt, drafting
from slipstream.engine.admission import Offer, admit_drafts
from slipstream.engine.drafting import Draft, Drafter, NGramIndex
from slipstream.engine.grammar import GrammarCompiler
from slipstream.kv import KVMemory, Sequence
from slipstream.tokenizer import Tokenizer
from tests.grammars import grammar_of
from tests.unit.toy_backend import ToyBackend

SIZES = (2, 4, 8, 16, 32, 64, 128)


def step_cost(*, fixed: float = 0.010, token: float = 0.0005, pair: float = 0.0, state: float = 0.0) -> StepCost:
    seconds = tuple((size, fixed + token * size) for size in SIZES)
    return StepCost(StepMeasurements(seconds, per_pair=pair, per_state=state), smallest_chunk=2)


def offer(chances: list[float], *, past: int = 0, count: int = 1, kept: bool = True) -> Offer:
    return Offer(chances, [True] * len(chances), past, count, kept)


def admitted(*offers: Offer, cost: StepCost | None = None) -> list[int]:
    cost = cost or step_cost()
    return admit_drafts(offers, load=cost.load((each.count, each.past) for each in offers), cost=cost)


class TestAdmission:
    def test_a_likely_draft_is_taken_whole(self) -> None:
        assert admitted(offer([0.95] * 15)) == [15]

    def test_an_unlikely_one_only_fills_what_padding_would(self) -> None:
        assert admitted(offer([0.01] * 15)) == [1]

    def test_without_drafts_there_is_nothing_to_admit(self) -> None:
        assert admitted(offer([]), offer([])) == [0, 0]

    def test_the_likelier_draft_goes_first(self) -> None:
        first, second = admitted(offer([0.05] * 20), offer([0.95] * 20))
        assert first < second

    def test_a_long_prompt_in_the_step_makes_no_draft_look_cheap(self) -> None:
        falling = [0.7**position for position in range(1, 20)]
        (alone,) = admitted(offer(falling))
        (after_prompt,) = admitted(offer(falling, count=64))
        assert after_prompt <= alone

    def test_drafts_get_shorter_where_the_context_makes_tokens_dear(self) -> None:
        falling = [0.8**position for position in range(1, 30)]
        near, far = (admitted(offer(falling, past=past), cost=step_cost(pair=1e-6)) for past in (0, 8000))
        assert far < near

    def test_drafts_get_shorter_where_each_token_writes_a_state(self) -> None:
        falling = [0.8**position for position in range(1, 30)]
        lengths = [admitted(offer(falling), cost=step_cost(state=state)) for state in (0.0, 0.002, 0.05)]
        assert lengths[0] > lengths[1] > lengths[2]

    def test_a_draft_that_cannot_be_taken_back_must_be_likelier_the_more_there_is_to_compute_again(self) -> None:
        falling = [0.8**position for position in range(1, 30)]
        (kept,) = admitted(offer(falling))
        (alone,) = admitted(offer(falling, kept=False))
        (after_prompt,) = admitted(offer(falling, kept=False, count=63))
        assert kept >= alone > after_prompt
        assert admitted(offer([1.0] * 15, kept=False, count=1)) == [15], "there's nothing to take back"

    def test_with_many_generations_each_brings_less(self) -> None:
        falling = [0.8**position for position in range(1, 30)]
        (alone,) = admitted(offer(falling))
        assert max(admitted(*[offer(falling)] * 12)) < alone

    def test_no_step_is_larger_than_the_largest_measured(self) -> None:
        lengths = admitted(*[offer([1.0] * 32)] * 8)
        assert sum(max(2, 1 + length) for length in lengths) <= SIZES[-1]

    def test_what_the_grammar_forces_is_no_reason_for_a_longer_step(self) -> None:
        forced = Offer([0.5] * 30, [False] * 30, 0, 1)
        assert admitted(forced) == [1]


SCHEMA = {
    "type": "object",
    "properties": {"call": {"type": "object", "properties": {"flag": {"type": "boolean"}, "n": {"type": "integer"}}}},
    "required": ["call"],
}


class TestLookUp:
    @pytest.fixture(autouse=True)
    def _parts(self, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.constraint = compiler.compile(grammar_of(SCHEMA), param="").constraint()
        self.drafter = Drafter()

    def sequence(self, text: str, answer: str = "") -> Sequence:
        """A prompt, and the beginning of an answer to it."""
        ids = [*self.tokenizer.encode(text), *self.tokenizer.encode(answer)]
        sequence = KVMemory(ToyBackend(64).store).open("", as_prompt(ids), room=64)
        assert sequence is not None
        return sequence

    def drafted(self, text: str, answer: str) -> list[str]:
        """The tokens proposed after a prompt and the beginning of an answer, as text."""
        self.constraint.accept(self.tokenizer.encode(answer))
        draft = self.drafter.propose(self.sequence(text, answer), self.constraint, "", forced=True)
        return [self.tokenizer.decode([token]) for token in draft.tokens]

    def test_text_that_the_grammar_forbids_does_not_hide_a_recent_call(self) -> None:
        self.drafter.remember(as_prompt(self.tokenizer.encode('{"call": {"flag": true, "n": 4}}')), "")
        drafted = self.drafted('The schema: {"flag": {"type": "boolean"}}.', '{"call": {"flag":')
        assert drafted[0] == " true"

    def test_a_copied_value_ends_where_its_copy_would_go_on_with_what_does_not_fit(self) -> None:
        drafted = self.drafted('{"n": 246. Next.', '{"call": {"flag": true, "n":')
        assert "".join(drafted) == " 246}}"

    def test_brackets_that_close_together_are_one_token_where_the_model_has_one(self) -> None:
        drafted = self.drafted('{"n": 24}\nNext.', '{"call": {"n": 2')
        assert drafted == ["4", "}}"]


class TestLearning:
    """Prompts of lines `ask: x`, each answered by a word; no grammar."""

    @pytest.fixture(autouse=True)
    def _parts(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.drafter = Drafter()

    def proposed(self, text: str, tenant: str = "") -> Draft:
        return self.drafter.propose(self.open(text), None, tenant, forced=False)

    def open(self, text: str) -> Sequence:
        sequence = KVMemory(ToyBackend(64).store).open("", as_prompt(self.tokenizer.encode(text)), room=64)
        assert sequence is not None
        return sequence

    def answered(self, text: str, answer: str, tenant: str = "") -> None:
        """Let the drafter see what the model chose after a text."""
        sequence = self.open(text)
        self.drafter.propose(sequence, None, tenant, forced=False)
        start = len(sequence)
        sequence.extend(self.tokenizer.encode(answer))
        self.drafter.learn(sequence, tenant, start, range(start, len(sequence)))

    # After the whole line stood one word, after its last words alone another.
    TWO_WAYS = "The sky of today is blue. The wall is green. The sky of today is"

    def first(self, text: str) -> str:
        return self.tokenizer.decode(self.proposed(text).tokens[:1])

    def test_the_longest_match_is_believed_as_long_as_nothing_is_known(self) -> None:
        assert self.first(self.TWO_WAYS) == " blue"

    def test_the_match_that_was_right_in_such_a_place_is_believed(self) -> None:
        for _ in range(3):
            self.answered(self.TWO_WAYS, " green")
        assert self.first(self.TWO_WAYS) == " green"

    def test_a_draft_goes_on_where_the_model_has_gone(self) -> None:
        text = "The sky of today is blue as ink. The wall is green as grass. The sky of today is"
        sequence = self.open(text)
        self.drafter.propose(sequence, None, "", forced=False)
        start = len(sequence)
        sequence.extend(self.tokenizer.encode(" green"))
        self.drafter.learn(sequence, "", start, range(start, len(sequence)))
        draft = self.drafter.propose(sequence, None, "", forced=False)
        assert self.tokenizer.decode(draft.tokens).startswith(" as grass.")

    def test_chances_rise_with_what_comes_true_and_fall_along_a_draft(self) -> None:
        before = self.proposed(self.TWO_WAYS).chances
        for _ in range(5):
            self.answered(self.TWO_WAYS, " blue. The wall")
        after = self.proposed(self.TWO_WAYS).chances
        assert after[0] > before[0]
        assert after == sorted(after, reverse=True)

    def test_what_has_become_unlikely_is_not_drafted(self) -> None:
        for _ in range(30):
            self.answered("Once upon a time. Once upon a", " hill")
        assert max(self.proposed("Once upon a time. Once upon a").chances, default=0.0) < 0.1

    def test_what_one_tenant_taught_another_does_not_feel(self) -> None:
        before = self.proposed(self.TWO_WAYS, "other").chances
        self.answered(self.TWO_WAYS, " green", "one")
        assert self.proposed(self.TWO_WAYS, "other").chances == before


class TestNGramIndex:
    @staticmethod
    def find(index: NGramIndex, context: list[int]) -> dict[int, int | None]:
        return {size: index.find(size, key) for size, key in drafting._keys(context)}

    def test_a_fork_knows_what_stood_before_it_went_its_own_way(self) -> None:
        base = NGramIndex()
        base.update(as_prompt([1, 2, 3, 4, 5, 6]))
        fork = NGramIndex(base, 4)
        fork.update(as_prompt([1, 2, 3, 4, 7, 2, 3]))
        assert self.find(fork, [1, 2]) == {1: 6, 2: 2}, "its own come first"
        assert self.find(fork, [3, 4]) == {1: 4, 2: 4}
        assert self.find(fork, [4, 5]) == {1: None, 2: None}, "what the other said later is not its own"

    def test_of_many_tokens_at_once_the_last_are_indexed(self) -> None:
        index = NGramIndex()
        index.update(as_prompt(range(100_000)))
        assert self.find(index, [99_997, 99_998])[2] == 99_999
        assert self.find(index, [50_000, 50_001])[2] is None

    def test_forks_of_forks_don_t_go_on_for_ever(self) -> None:
        index = NGramIndex()
        for length in range(100):
            index = NGramIndex(index, length)
        assert index.depth <= 8
