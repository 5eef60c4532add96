"""The choice of tokens where the logits are: that of `Sampler`, so that only the tokens travel to the host.

A choice depends on its row alone, to the bit. Maxima and sorting are exact, and ties go to the lower token. Sums over
the vocabulary are the difficulty: a GPU adds floats in an order that depends on how many rows there are. So weights
become integers first, in units of 2**-40 of the likeliest one's, and the order of their sums makes no difference.

Greedy choices are those of `Sampler` always. Others differ where a random number falls so near the border of two tokens
that it matters how a device rounds `exp`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slipstream.backend.torch.operators import Operators, StepOutput, Tensor
from slipstream.backend.torch.plain import likeliest, mask_out
from slipstream.backend.torch.staging import Staging
from slipstream.sampling import NO_TOKEN, Choice, Row, TokenLogprob, chances_of
from slipstream.types import FloatArray

_UNIT = 2.0**40
"""Of a weight of 1. So the sum of 2**23 of them fits into 64 bits."""
_ROWS = 64
"""Rows that are chosen from at a time, which bounds the memory that it takes."""


class DeviceLogits:
    """Logits on the device: see `slipstream.backend.logits.Logits`.

    What is plainly greedy, as nearly all rows are, costs the host little: a step has found it already, and under a
    grammar's mask one operator does. The others take a dozen kernels, each launched by the host.
    """

    def __init__(self, output: StepOutput, operators: Operators, staging: Staging) -> None:
        self._output = output
        self._operators = operators
        self._staging = staging

    def host(self) -> FloatArray:
        """See `Logits.host`."""
        found: FloatArray = self._output.logits.float().cpu().numpy()
        return found

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """See `Logits.choose`."""
        found = [row.mask is None and _is_greedy(row) for row in rows]
        with torch.inference_mode():
            others = iter(self._choose([row for row, each in zip(rows, found, strict=True) if not each]))
            tokens = self._staging.fetch(self._output.argmax).tolist() if any(found) else []
        return [Choice(tokens[row.index]) if each else next(others) for row, each in zip(rows, found, strict=True)]

    def kept(self, count: int) -> "DeviceLogits":
        """See `Logits.kept`."""
        output = StepOutput(*(each[:count].clone() for each in self._output))
        return DeviceLogits(output, self._operators, self._staging)

    def _choose(self, rows: Sequence[Row]) -> list[Choice]:
        """The choices that the step hasn't found.

        Greedy rows that have a mask go along with others, if there are any: who uploads twice waits for the step.
        """
        if not all(map(_is_greedy, rows)):
            return _adjusted_or_drawn(self._output.logits, rows, self._staging)
        if not rows:
            return []
        arrays: dict[str, npt.NDArray[Any]] = {
            "rows": np.array([row.index for row in rows], np.int64),
            "masks": np.stack([row.mask for row in rows if row.mask is not None]),
        }
        there = self._staging.upload(arrays)
        tokens = self._operators.argmax(self._output.logits, (there["rows"], there["masks"]))
        return [Choice(token) for token in self._staging.fetch(tokens).tolist()]


def _is_greedy(row: Row) -> bool:
    """Whether the likeliest of a row's tokens is wanted, or of those that its mask allows, and nothing else."""
    return row.token is None and row.sampler.plainly_greedy


def _adjusted_or_drawn(logits: Tensor, rows: Sequence[Row], staging: Staging) -> list[Choice]:
    """The choices for any rows of a step's logits [step rows, vocab_size]."""
    wanted = [row.sampler.params.logprobs for row in rows]
    most = max((count for count in wanted if count is not None), default=None)
    parts = [_Part(rows[at : at + _ROWS], logits.shape[1]) for at in range(0, len(rows), _ROWS)]
    found = staging.fetch(torch.cat([part.found(logits, staging, most) for part in parts]))
    at, choices = 0, []
    for part in parts:
        choices += part.choices(found[at : at + len(part.rows)])
        at += len(part.rows)
    return choices


class _Part:
    """Some rows, those that take their likeliest token before those drawn by chance, and these before chosen ones."""

    def __init__(self, rows: Sequence[Row], vocab_size: int) -> None:
        kinds = [2 if row.token is not None else 0 if row.sampler.params.greedy else 1 for row in rows]
        self._places = sorted(range(len(rows)), key=kinds.__getitem__)
        self.rows = [rows[place] for place in self._places]
        self._greedy, self._drawn = kinds.count(0), kinds.count(1)
        self._vocab_size = vocab_size

    def found(self, logits: Tensor, staging: Staging, most: int | None) -> Tensor:
        """What travels: int64 [rows, 1], the tokens.

        With log-probabilities float64 [rows, 2 + 2 * most]: token, its log-probability, alternatives and theirs.
        """
        given = staging.upload(self._arrays())
        greedy, chosen = self._greedy, self._greedy + self._drawn
        adjusted = logits[given["index"][:chosen]].float()
        _adjust(adjusted, given)
        tokens = torch.cat((likeliest(adjusted[:greedy]), _drawn(adjusted[greedy:], given), given["tokens"]))
        if most is None:
            return tokens[:, None]
        return torch.cat((tokens[:, None].double(), _reported(logits[given["index"]].float(), tokens, most)), 1)

    def choices(self, found: npt.NDArray[Any]) -> list[Choice]:
        """The choices for the rows as they were given, from what has travelled."""
        choices: list[Choice] = [Choice(0)] * len(self.rows)
        for place, row, of_row in zip(self._places, self.rows, found.tolist(), strict=True):
            token, count = int(of_row[0]), row.sampler.params.logprobs
            logprob = None
            if count is not None:
                top, values = (of_row[begin : begin + count] for begin in (2, 2 + (len(of_row) - 2) // 2))
                logprob = TokenLogprob(token, of_row[1], tuple(zip(map(int, top), values, strict=True)))
            choices[place] = Choice(token, logprob)
        return choices

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the device has to know of the rows."""
        chosen = self._greedy + self._drawn
        drawn = self.rows[self._greedy : chosen]
        params = [row.sampler.params for row in drawn]
        masks = [(at, row.mask) for at, row in enumerate(self.rows[:chosen]) if row.mask is not None]
        arrays: dict[str, npt.NDArray[Any]] = {
            "index": np.array([row.index for row in self.rows], np.int64),
            "tokens": np.array([row.token for row in self.rows[chosen:]], np.int64),
            "masked": np.array([at for at, _ in masks], np.int64),
            "masks": np.stack([mask for _, mask in masks]) if masks else np.empty((0, 0), np.int32),
            # A lower temperature is as good as greedy, and could overflow.
            "temperature": np.array([max(each.temperature, 1e-6) for each in params], np.float32),
            "top_k": np.array([each.top_k or self._vocab_size for each in params], np.int64),
            "min_p": np.array([each.min_p for each in params], np.float32),
            "top_p": np.array([each.top_p for each in params], np.float64),
            "chance": chances_of(drawn),
        }
        return arrays | self._adjustments(chosen)

    def _adjustments(self, chosen: int) -> dict[str, npt.NDArray[Any]]:
        """By operation, the elements that it changes, counted through all rows, and a number for each."""
        places: list[list[npt.NDArray[np.int64]]] = [[np.empty(0, np.int64)] for _ in range(3)]
        values: list[list[FloatArray]] = [[np.empty(0, np.float32)] for _ in range(3)]
        for at, row in enumerate(self.rows[:chosen]):
            if row.sampler.adjusts:
                for number, (ids, numbers) in enumerate(row.sampler.adjustments()):
                    places[number].append(ids + at * self._vocab_size)
                    values[number].append(numbers)
        found: dict[str, npt.NDArray[Any]] = {}
        for number in range(3):
            found[f"places {number}"] = np.concatenate(places[number])
            found[f"values {number}"] = np.concatenate(values[number])
        return found


def _adjust(logits: Tensor, given: dict[str, Tensor]) -> None:
    """Apply masks, and then penalties and biases in their order, to float32 logits [n, vocab_size]."""
    if len(given["masked"]):
        logits[given["masked"]] = mask_out(logits[given["masked"]], given["masks"])
    flat = logits.view(-1)
    for number in range(3):
        places, values = given[f"places {number}"], given[f"values {number}"]
        if len(places):
            before = flat[places]
            scaled = torch.where(before > 0, before / values, before * values)
            flat[places] = before + values if number else scaled


def _drawn(logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The tokens that chance draws from rows, int64 [n]: `Sampler.draw` with sums of integers."""
    temperature, top_k, min_p, top_p, chance = (
        given[name][:, None] for name in ("temperature", "top_k", "min_p", "top_p", "chance")
    )
    peak = logits.amax(1, keepdim=True)
    possible = peak.isfinite()
    weights = torch.exp((logits - peak) / temperature).where(possible, 1)  # or sums would lead beyond the row
    weights, ids = weights.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = (rank < top_k) & (weights >= min_p)
    cumulative = _integers(weights).masked_fill(~kept, 0).cumsum(1)
    all_kept = cumulative[:, -1:]
    least = torch.where(top_p < 1, (top_p * all_kept.double()).ceil().long(), all_kept)
    last = (cumulative < least).sum(1, keepdim=True)
    nucleus = cumulative.gather(1, last)
    place = (cumulative <= (chance * nucleus.double()).floor().long()).sum(1, keepdim=True)
    tokens = ids.gather(1, torch.minimum(place, last))  # rounding must not step past the last candidate
    return tokens.where(possible, NO_TOKEN)[:, 0]


def _reported(logits: Tensor, tokens: Tensor, most: int) -> Tensor:
    """Log-probabilities of tokens, and the likeliest others: float64 [n, 1 + 2 * most]."""
    peak = logits.amax(1, keepdim=True)
    total = _integers(torch.exp(logits - peak)).sum(1, keepdim=True).double() / _UNIT
    normaliser = peak.double() + total.log()
    own = logits.gather(1, tokens.clamp(min=0)[:, None]).double() - normaliser
    if not most:
        return own
    top, ids = (each[:, :most] for each in logits.sort(dim=1, descending=True, stable=True))
    return torch.cat((own, ids.double(), top.double() - normaliser), 1)


def _integers(weights: Tensor) -> Tensor:
    """Float32 weights of at most 1 in units, int64."""
    return (weights.double() * _UNIT).round().long()
