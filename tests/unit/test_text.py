"""Text that may be shown: whole characters, and nothing that could still turn out to be a stop string."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from slipstream.engine.text import TextStream
from slipstream.tokenizer import IncrementalDecoder, Tokenizer


def stream(tokenizer: Tokenizer, *stop: str) -> TextStream:
    return TextStream(IncrementalDecoder(tokenizer), stop)


def tokens_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """One token for each part; fails where the vocabulary has none."""
    ids = []
    for part in parts:
        (token,) = tokenizer.encode(part)
        ids.append(token)
    return ids


def byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text spelled in tokens of one byte each."""
    single = {tokenizer.token_bytes(token): token for token in range(17, 1000)}
    return [single[bytes([byte])] for byte in text.encode()]


def fed(text: TextStream, tokens: list[int]) -> list[str]:
    """What each token makes certain, up to the one that completes a stop string."""
    shown = []
    for token in tokens:
        shown.append(text.feed((token,)))
        if text.stopped:
            break
    return shown


def test_without_stop_strings_text_comes_with_its_token(tokenizer: Tokenizer) -> None:
    assert fed(stream(tokenizer), tokens_of(tokenizer, "The", " answer", " is")) == ["The", " answer", " is"]


def test_special_tokens_are_not_part_of_the_text(tokenizer: Tokenizer) -> None:
    assert fed(stream(tokenizer, "<|im_end|>"), tokens_of(tokenizer, "a", "<|im_end|>", "b")) == ["a", "", "b"]


class TestStopStrings:
    def test_one_within_a_token_cuts_the_token(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "wer")
        assert fed(text, tokens_of(tokenizer, "The", " answer", " is")) == ["The", " ans"]
        assert text.stopped
        assert text.finish() == ""

    def test_one_across_tokens_is_held_back_from_its_beginning(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "wer is n")
        assert fed(text, tokens_of(tokenizer, "The", " answer", " is", " not")) == ["The", " ans", "", ""]
        assert text.stopped

    def test_a_beginning_that_comes_to_nothing_is_shown_after_all(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "wer is n")
        shown = fed(text, tokens_of(tokenizer, "The", " answer", " is", " yes"))
        assert shown == ["The", " ans", "", "wer is yes"]
        assert not text.stopped

    def test_what_is_held_back_at_the_end_is_shown(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "wer is n")
        assert fed(text, tokens_of(tokenizer, " answer", " is")) == [" ans", ""]
        assert text.finish() == "wer is"
        assert text.finish() == ""

    def test_of_several_the_first_in_the_text_counts(self, tokenizer: Tokenizer) -> None:
        assert fed(stream(tokenizer, "wer", "ns"), tokens_of(tokenizer, "The", " answer")) == ["The", " a"]

    def test_of_two_with_the_same_beginning_the_completed_one_counts(self, tokenizer: Tokenizer) -> None:
        parts = tokens_of(tokenizer, "a", "b", "c", "d")
        assert "".join(fed(stream(tokenizer, "abcx", "abcd"), parts)) == ""

    def test_a_later_beginning_is_held_back_when_an_earlier_one_comes_to_nothing(self, tokenizer: Tokenizer) -> None:
        parts = tokens_of(tokenizer, "a", "b", "c", "d")
        assert fed(stream(tokenizer, "abx", "bcx"), parts) == ["", "", "a", "bcd"]

    def test_the_longest_possible_beginning_is_held_back(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "abac", "abad")
        assert fed(text, tokens_of(tokenizer, "a", "b", "a", "b", "a", "d")) == ["", "", "", "ab", "", ""]
        assert text.stopped

    def test_a_repeated_character_does_not_lose_its_place(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "aab")
        assert fed(text, tokens_of(tokenizer, "a", "a", "a", "b")) == ["", "", "a", ""]
        assert text.stopped

    def test_one_at_the_very_start_leaves_nothing(self, tokenizer: Tokenizer) -> None:
        assert fed(stream(tokenizer, "The"), tokens_of(tokenizer, "The")) == [""]


class TestCharactersInSeveralTokens:
    def test_half_a_character_is_never_shown(self, tokenizer: Tokenizer) -> None:
        shown = fed(stream(tokenizer), byte_tokens(tokenizer, "é€😀"))
        assert shown == ["", "é", "", "", "€", "", "", "", "😀"]

    def test_a_character_that_stays_unfinished_is_shown_as_a_replacement(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer)
        assert "".join(fed(text, byte_tokens(tokenizer, "a€")[:-1])) == "a"
        assert text.finish() == "\ufffd"

    def test_they_can_be_stop_strings(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "€!")
        assert "".join(fed(text, byte_tokens(tokenizer, "5 €?€!x"))) == "5 €?"
        assert text.stopped

    def test_the_same_first_bytes_are_not_the_same_character(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "😀")
        assert "".join(fed(text, byte_tokens(tokenizer, "😁"))) + text.finish() == "😁"

    def test_text_and_half_a_character_are_released_in_order(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "b€")
        assert "".join(fed(text, byte_tokens(tokenizer, "ab€")[:-1])) == "a"
        assert text.finish() == "b\ufffd"

    def test_the_replacement_can_complete_a_stop_string(self, tokenizer: Tokenizer) -> None:
        text = stream(tokenizer, "b\ufffd")
        assert "".join(fed(text, byte_tokens(tokenizer, "ab€")[:-1])) == "a"
        assert text.finish() == ""


# Few characters, so that stop strings come up, overlap and nearly come up; of one to four bytes.
Characters = st.sampled_from("aab é€😀")
Texts = st.text(Characters, max_size=24)
Stops = st.lists(st.text(Characters, min_size=1, max_size=5), max_size=4)
Cuts = st.lists(st.integers(0, 60), max_size=12)


def tokenised(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[int]:
    """The text in tokens of which some are whole words and some single bytes."""
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    return [
        token
        for index, part in enumerate(parts)
        for token in (byte_tokens(tokenizer, part) if index % 2 else tokenizer.encode(part))
    ]


def cut_when_first_seen(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
    """The slow way: after each token, look at all text so far."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        whole = text if count == len(tokens) else text.rstrip("\ufffd")
        found = [whole.find(stop) for stop in stops if stop in whole]
        if found:
            return whole[: min(found)], True
    return tokenizer.decode(tokens), False


@settings(max_examples=250)
@given(text=Texts, stops=Stops, cuts=Cuts, missing=st.integers(0, 3))
@example(text="aaab", stops=["aab"], cuts=[], missing=0)
def test_pieces_join_to_the_text_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int], missing: int
) -> None:
    tokens = tokenised(tokenizer, text, cuts)
    tokens = tokens[: max(0, len(tokens) - missing)]
    stopping = stream(tokenizer, *stops)
    shown = fed(stopping, tokens)
    expected, stopped = cut_when_first_seen(tokenizer, tokens, stops)
    assert "".join(shown) + stopping.finish() == expected
    assert stopping.stopped == stopped


@settings(max_examples=150)
@given(text=Texts, stops=Stops.filter(bool), cuts=Cuts)
def test_no_more_is_held_back_than_could_begin_a_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int]
) -> None:
    tokens = tokenised(tokenizer, text, cuts)
    stopping = stream(tokenizer, *stops)
    shown = ""
    for count, token in enumerate(tokens, start=1):
        shown += stopping.feed((token,))
        if stopping.stopped:
            return
        so_far = tokenizer.decode(tokens[:count]).rstrip("\ufffd")
        held = so_far.removeprefix(shown)
        assert so_far == shown + held
        assert held == "" or any(stop.startswith(held) for stop in stops)
