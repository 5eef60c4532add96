"""Numbers between bounds as regular expressions of the text that spells them, exact to the last digit."""

import json
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, lcm

from slipstream.chat.schema.losses import UnsupportedError

_MOST_DIGITS = 400
INTEGER = "-?(?:0|[1-9][0-9]*)"
NUMBER = f"{INTEGER}(?:\\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}})?"


def exact(value: float | Decimal | Fraction) -> Fraction:
    """A number of a JSON document as it's written: 0.1 is a tenth."""
    return Fraction(value if isinstance(value, int | Fraction) else Decimal(str(value)))


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers that fit all of this. One that a bound excludes is `without` it."""

    low: Fraction | None = None
    high: Fraction | None = None
    step: Fraction | None = None
    """What they are multiples of; of 1 if they are integers."""
    values: tuple[int | float | Decimal, ...] | None = None
    """The only ones, if they are listed."""
    without: frozenset[Fraction] = frozenset()
    no_steps: frozenset[Fraction] = frozenset()
    """What they are no multiples of."""

    def __contains__(self, value: float | Decimal | Fraction) -> bool:
        number = exact(value)
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            return False
        if (self.step is not None and (number / self.step).denominator != 1) or number in self.without:
            return False
        if self._is_no_step(number):
            return False
        return self.values is None or any(exact(each) == number for each in self.values)

    def _is_no_step(self, number: Fraction) -> bool:
        return any((number / step).denominator == 1 for step in self.no_steps)

    def and_also(self, other: "Numbers") -> "Numbers | None":
        """Those that fit both; None if it's known that there are none."""
        steps = [step for step in (self.step, other.step) if step is not None]
        both = Numbers(
            max((each.low for each in (self, other) if each.low is not None), default=None),
            min((each.high for each in (self, other) if each.high is not None), default=None),
            steps[0] if len(steps) == 1 else _common_multiple(*steps) if steps else None,
            None,
            self.without | other.without,
            self.no_steps | other.no_steps,
        )
        listed = self.values if self.values is not None else other.values
        if listed is not None:
            values = tuple(value for value in listed if value in self and value in other)
            return replace(both, values=values) if values else None
        low, high = both._bounds()
        nothing = low is not None and high is not None and (low > high or (low == high and low not in both))
        return None if nothing or (both.step is not None and both._is_no_step(both.step)) else both

    def complements(self) -> list["Numbers"]:
        """All other numbers, as one or several sets."""
        if self.values is not None:
            return [Numbers(without=frozenset(map(exact, self.values)))]
        result = []
        if self.low is not None:
            result.append(Numbers(high=self.low, without=frozenset({self.low}) - self.without))
        if self.high is not None:
            result.append(Numbers(low=self.high, without=frozenset({self.high}) - self.without))
        if self.step is not None:
            result.append(Numbers(no_steps=frozenset({self.step})))
        for step in self.no_steps:
            result.append(Numbers(step=step))
        if others := self.without - {self.low, self.high}:
            result.append(Numbers(values=tuple(map(_plain, others))))
        return result

    def _bounds(self) -> tuple[Fraction | None, Fraction | None]:
        """The bounds; of multiples the least and the largest one between them."""
        step, low, high = self.step, self.low, self.high
        if step is None:
            return low, high
        if low is not None:
            low = ceil(low / step) * step
            while low in self.without:
                low += step
        if high is not None:
            high = floor(high / step) * step
            while high in self.without:
                high -= step
        return low, high

    def terminal(self) -> str:
        """The Lark terminal of how they are written. Raises `UnsupportedError` for multiples, see `as_schema`."""
        if self in (Numbers(), INTEGERS):
            return "JSON_INTEGER" if self.step else "JSON_NUMBER"
        if self.values is not None:
            return " | ".join(json.dumps(json.dumps(_plain(value))) for value in self.values).join("()")
        if (written := _WRITTEN.get((self.step, self.no_steps))) is None:
            raise UnsupportedError("multipleOf")
        low, high = self._bounds()
        parts = [written, *(f"~{_spelled(value)}" for value in sorted(self.without))]
        if low is not None:
            parts.append(_outward("", low) if low > 0 else f"(~{_outward('-', low)} | {_spelled(low)})")
        if high is not None:
            parts.append(_outward("-", high) if high < 0 else f"(~{_outward('', high)} | {_spelled(high)})")
        return " & ".join(parts).join("()")

    def as_schema(self) -> dict[str, object]:
        """Multiples between bounds in words of JSON Schema, for the compiler's own arithmetic.

        Raises `UnsupportedError` if they are too large for it, or not that simple.
        """
        low, high = self._bounds()  # the compiler takes 0 for a multiple that is more than 0 and at most the step
        between = replace(self, low=low, high=high, without=frozenset())
        if self.no_steps or self.step is None or any(map(between.__contains__, self.without)):
            raise UnsupportedError("multipleOf")
        kind = "integer" if self.step.denominator == 1 else "number"
        known: dict[str, object] = {"type": kind, "multipleOf": _plain(self.step)}
        if low is not None:
            known["minimum"] = _plain(low)
        if high is not None:
            known["maximum"] = _plain(high)
        bounds = [value for value in (self.step, low, high) if value is not None]
        too_large = any(exact(float(value)) != value or abs(value) >= 2**53 for value in bounds)
        if too_large or self.step < Fraction(1, 10**6):
            raise UnsupportedError("multipleOf")
        return known


def _common_multiple(first: Fraction, second: Fraction) -> Fraction:
    denominator = lcm(first.denominator, second.denominator)
    return Fraction(lcm(int(first * denominator), int(second * denominator)), denominator)


def _plain(value: Fraction | float | Decimal) -> int | float:
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else float(value)
    return float(value) if isinstance(value, Decimal) else value


INTEGERS = Numbers(step=Fraction(1))
_WRITTEN: dict[tuple[Fraction | None, frozenset[Fraction]], str] = {
    (None, frozenset()): r"/-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?/ & ~/-0(?:\.0*)?/",
    (Fraction(1), frozenset()): "/0|-?[1-9][0-9]*/",
    (None, frozenset({Fraction(1)})): r"/-?(?:0|[1-9][0-9]*)\.[0-9]*[1-9][0-9]*/",
}
"""Numbers without exponents, each in one way but for zeros at the end: any, integers, and all others."""


def _spelled(value: Fraction) -> str:
    """The terminal of all ways to write a number without an exponent: zeros make no difference."""
    whole, fraction = _digits(value)
    sign, after = "-" if value < 0 else "", rf"\.{fraction}0*" if fraction else r"(?:\.0+)?"
    return f"/{sign}{whole}{after}/"


def _outward(sign: str, bound: Fraction) -> str:
    """The terminal of numbers of a sign that are no nearer to 0 than a bound: longer ones, or of a larger digit."""
    whole, fraction = _digits(bound)
    leading, after = whole.rstrip("0"), r"(?:\.[0-9]+)?"
    ways = [f"[1-9][0-9]{{{len(whole) if leading else 0},}}{after}"]
    for at, digit in enumerate(leading):
        if digit != "9":
            ways.append(f"{leading[:at]}[{int(digit) + 1}-9][0-9]{{{len(whole) - at - 1}}}{after}")
    for at, digit in enumerate(fraction):
        if digit != "9":
            ways.append(rf"{whole}\.{fraction[:at]}[{int(digit) + 1}-9][0-9]*")
    ways.append(rf"{whole}\.{fraction}[0-9]*" if fraction else f"{leading}[0-9]{{{len(whole) - len(leading)}}}{after}")
    return f"/{sign}(?:{'|'.join(ways)})/"


def _digits(value: Fraction) -> tuple[str, str]:
    """Digits before the point and after it, without zeros at the end."""
    size = abs(value)
    denominator, digits = size.denominator, 0
    while (10**digits) % denominator:
        digits += 1
        if digits > _MOST_DIGITS:
            raise UnsupportedError("number")
    scaled = str(size.numerator * 10**digits // denominator).rjust(digits + 1, "0")
    whole, fraction = (scaled[:-digits], scaled[-digits:]) if digits else (scaled, "")
    if len(whole) > _MOST_DIGITS:
        raise UnsupportedError("number")
    return whole, fraction.rstrip("0")
