"""Numbers between bounds as regular expressions of the text that spells them, exact to the last digit."""

import json
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, lcm

from slipstream.chat.schema.losses import UnsupportedError

_MOST_DIGITS = 400
INTEGER = "-?(?:0|[1-9][0-9]*)"
NUMBER = f"{INTEGER}(?:\\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}})?"


def exact(value: float | Decimal) -> Fraction:
    """A number of a JSON document as it's written: 0.1 is a tenth."""
    return Fraction(value if isinstance(value, int) else Decimal(str(value)))


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers that fit all of this."""

    low: Fraction | None = None
    high: Fraction | None = None
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""
    integral: bool | None = None
    """Whether they are integers, or are not."""
    step: Fraction | None = None
    """What they are multiples of."""
    values: tuple[int | float | Decimal, ...] | None = None
    """The only ones, if they are listed."""
    without: frozenset[Fraction] = frozenset()
    no_steps: frozenset[Fraction] = frozenset()
    """What they are no multiples of."""

    def __contains__(self, value: float | Decimal) -> bool:
        number = exact(value)
        if (self.low is not None and (number < self.low or (self.above and number == self.low))) or (
            self.high is not None and (number > self.high or (self.below and number == self.high))
        ):
            return False
        if self.integral is not None and self.integral != (number.denominator == 1):
            return False
        if (self.step is not None and (number / self.step).denominator != 1) or number in self.without:
            return False
        if any((number / step).denominator == 1 for step in self.no_steps):
            return False
        return self.values is None or any(exact(each) == number for each in self.values)

    def and_also(self, other: "Numbers") -> "Numbers | None":
        """Those that fit both; None if it's known that there are none."""
        lows = [(each.low, each.above) for each in (self, other) if each.low is not None]
        highs = [(each.high, not each.below) for each in (self, other) if each.high is not None]
        low, above = max(lows, default=(None, False))
        high, closed = min(highs, default=(None, True))
        if self.integral is not None and other.integral is not None and self.integral != other.integral:
            return None
        steps = [step for step in (self.step, other.step) if step is not None]
        both = Numbers(
            low,
            high,
            above,
            not closed,
            self.integral if other.integral is None else other.integral,
            steps[0] if len(steps) == 1 else _common_multiple(*steps) if steps else None,
            None,
            self.without | other.without,
            self.no_steps | other.no_steps,
        )
        listed = self.values if self.values is not None else other.values
        if listed is not None:
            values = tuple(value for value in listed if value in self and value in other)
            return replace(both, values=values) if values else None
        return None if both._is_empty() else both

    def _is_empty(self) -> bool:
        if self.low is None or self.high is None:
            return False
        if self.integral or (self.step is not None and self.step.denominator == 1):
            first, last = self._integer_bounds()
            assert first is not None
            assert last is not None
            step = self.step or Fraction(1)
            if step.denominator == 1:
                first = -(-first // step.numerator) * step.numerator
            return first > last
        return self.low > self.high or (self.low == self.high and (self.above or self.below))

    def complements(self) -> list["Numbers"]:
        """All other numbers, as one or several sets."""
        if self.values is not None:
            return [Numbers(without=frozenset(map(exact, self.values)))]
        result = []
        if self.low is not None:
            result.append(Numbers(high=self.low, below=not self.above))
        if self.high is not None:
            result.append(Numbers(low=self.high, above=not self.below))
        if self.integral is not None:
            result.append(Numbers(integral=not self.integral))
        if self.step is not None:
            result.append(Numbers(no_steps=frozenset({self.step})))
        for step in self.no_steps:
            result.append(Numbers(step=step))
        if self.without:
            result.append(Numbers(values=tuple(map(_plain, self.without))))
        return result

    def _integer_bounds(self) -> tuple[int | None, int | None]:
        first = last = None
        if self.low is not None:
            first = floor(self.low) + 1 if self.above else ceil(self.low)
        if self.high is not None:
            last = ceil(self.high) - 1 if self.below else floor(self.high)
        return first, last

    def _steps(self) -> tuple[Fraction | None, Fraction | None]:
        """The least and the largest multiple of the step between the bounds, where there are bounds."""
        assert self.step is not None
        first, last = replace(
            self,
            low=None if self.low is None else self.low / self.step,
            high=None if self.high is None else self.high / self.step,
        )._integer_bounds()
        return (None if first is None else first * self.step), (None if last is None else last * self.step)

    def terminal(self) -> str:
        """The Lark terminal of how they are written. Raises `UnsupportedError` for multiples, see `as_schema`."""
        if self.values is not None:
            return " | ".join(json.dumps(json.dumps(_plain(value))) for value in self.values).join("()")
        if self.no_steps or (self.step is not None and not (self.step == 1 and self.integral)):
            raise UnsupportedError("multipleOf")
        written = f"/{self._expression()}/"
        if not self.without:
            return written
        return f"({written} & ~({' | '.join(map(_spellings, sorted(self.without)))}))"

    def _expression(self) -> str:
        if self.integral:
            return _integers(*self._integer_bounds())
        if self.integral is None and self.low is None and self.high is None:
            return NUMBER
        return _decimals(self.low, self.high, self.above, self.below, fractional=self.integral is False)

    def as_schema(self) -> dict[str, object]:
        """Multiples between bounds in words of JSON Schema, for the compiler's own arithmetic.

        Raises `UnsupportedError` if they are too large for it, or not that simple.
        """
        if self.no_steps or self.without or self.step is None or self.integral is False:
            raise UnsupportedError("multipleOf")
        known: dict[str, object] = {"type": "integer" if self.integral else "number", "multipleOf": _plain(self.step)}
        low, high = self._steps()  # the compiler takes 0 for a multiple that is more than 0 and at most the step
        if low is not None:
            known["minimum"] = _plain(low)
        if high is not None:
            known["maximum"] = _plain(high)
        bounds = [value for value in (self.step, low, high) if value is not None]
        if any(exact(float(value)) != value or abs(value) >= 2**53 for value in bounds) or self.step < Fraction(
            1, 10**6
        ):
            raise UnsupportedError("multipleOf")
        return known


def _common_multiple(first: Fraction, second: Fraction) -> Fraction:
    denominator = lcm(first.denominator, second.denominator)
    return Fraction(lcm(int(first * denominator), int(second * denominator)), denominator)


def _plain(value: Fraction | float | Decimal) -> int | float:
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else float(value)
    return float(value) if isinstance(value, Decimal) else value


def _spellings(value: Fraction) -> str:
    """The terminal of all ways to write a number, without an exponent or with any: zeros make no difference."""
    if value.denominator == 1:
        zero = "-?0" if value == 0 else str(value.numerator)
        return f"/{zero}(?:\\.0+)?/" if value else f"/{zero}(?:\\.0+)?(?:[eE][+-]?[0-9]+)?/"
    sign, whole, fraction = _digits(value)
    return f"/{sign}{whole}\\.{fraction}0*/"


def _digits(value: Fraction) -> tuple[str, str, str]:
    """Sign, digits before the point and after it, without zeros at the end."""
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
    return "-" if value < 0 else "", whole, fraction.rstrip("0")


@lru_cache(maxsize=1024)
def _integers(first: int | None, last: int | None) -> str:
    """Integers from `first` to `last`."""
    if first is None and last is None:
        return INTEGER
    ways = []
    if last is None or last >= 0:
        ways.append(_naturals(max(first or 0, 0), last))
    if first is None or first < 0:
        lowest = 1 if last is None or last >= 0 else -last
        ways.append(f"-(?:{_naturals(lowest, None if first is None else -first)})")
    return "|".join(ways)


def _naturals(first: int, last: int | None) -> str:
    """Integers from `first`, at least 0, to `last`."""
    if max(len(str(first)), len(str(last or 0))) > _MOST_DIGITS:
        raise UnsupportedError("number")
    ways = []
    digits = len(str(first))
    while last is None or 10 ** (digits - 1) <= last or digits == 1:
        low = first if digits == len(str(first)) else 10 ** (digits - 1)
        if last is None and low == 10 ** (digits - 1) and digits > 1:
            ways.append(f"[1-9][0-9]{{{digits - 1},}}")
            break
        high = 10**digits - 1 if last is None else min(last, 10**digits - 1)
        ways.append(_same_length(str(low), str(high)))
        digits += 1
        if last is not None and len(str(last)) < digits:
            break
    return "|".join(ways)


def _same_length(low: str, high: str) -> str:
    """Digits that spell a number from one to another of as many digits."""
    if low == high:
        return low
    if len(low) == 1:
        return f"[{low}-{high}]"
    if low[0] == high[0]:
        return f"{low[0]}(?:{_same_length(low[1:], high[1:])})"
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    ways = []
    if set(low[1:]) != {"0"}:
        ways.append(f"{first}(?:{_same_length(low[1:], '9' * rest)})")
        first += 1
    upper = []
    if set(high[1:]) != {"9"}:
        upper.append(f"{last}(?:{_same_length('0' * rest, high[1:])})")
        last -= 1
    if first <= last:
        ways.append(f"[{first}-{last}][0-9]{{{rest}}}")
    return "|".join((*ways, *upper))


@lru_cache(maxsize=1024)
def _decimals(low: Fraction | None, high: Fraction | None, above: bool, below: bool, *, fractional: bool) -> str:
    """Numbers between bounds without an exponent; `fractional` says that they are no integers."""
    ways = []
    if high is None or high > 0 or (high == 0 and not below):
        start = (low, above) if low is not None and low >= 0 else (Fraction(0), False)
        ways += _magnitudes(*start, high, below, fractional=fractional)
    if low is None or low < 0:
        start = (-high, below) if high is not None and high <= 0 else (Fraction(0), True)
        sizes = _magnitudes(*start, None if low is None else -low, above, fractional=fractional)
        ways += [f"-(?:{'|'.join(sizes)})"] if sizes else []
    if not ways:
        raise UnsupportedError("number")
    return "|".join(ways)


def _magnitudes(low: Fraction, above: bool, high: Fraction | None, below: bool, *, fractional: bool) -> list[str]:
    """Numbers from `low`, at least 0, to `high`: by what stands before the point."""
    _, whole_low, after_low = _digits(low)
    first = int(whole_low)
    some = r"\.[0-9]*[1-9][0-9]*" if fractional else r"(?:\.[0-9]+)?"
    if high is None:
        ways = [_with_fraction(whole_low, _fractions(after_low, None, above, False, fractional=fractional))]
        return [way for way in (*ways, f"(?:{_naturals(first + 1, None)}){some}") if way]
    _, whole_high, after_high = _digits(high)
    last = int(whole_high)
    if first == last:
        way = _with_fraction(whole_low, _fractions(after_low, after_high, above, below, fractional=fractional))
        return [way] if way else []
    ways = [_with_fraction(whole_low, _fractions(after_low, None, above, False, fractional=fractional))]
    if last - first > 1:
        ways.append(f"(?:{_naturals(first + 1, last - 1)}){some}")
    ways.append(_with_fraction(whole_high, _fractions("", after_high, False, below, fractional=fractional)))
    return [way for way in ways if way]


def _with_fraction(whole: str, fraction: tuple[bool, list[str]]) -> str:
    """The number with one of the fractions, each a regular expression, or with none if that's allowed."""
    none, some = fraction
    if not some:
        return whole if none else ""
    return f"{whole}(?:\\.(?:{'|'.join(some)})){'?' if none else ''}"


def _fractions(low: str, high: str | None, above: bool, below: bool, *, fractional: bool) -> tuple[bool, list[str]]:
    """Digits after the point from `low` to `high`, or to any: whether there may be none, and how they look.

    Bounds come without zeros at the end, which make no difference to a number.
    """
    none = not fractional and not low and not above and (high is None or bool(high) or not below)
    ways = _digits_between(low, high, above, below)
    if not fractional:
        return none, ways
    # An integer has zeros alone after the point, or nothing.
    return False, [way for way in ways if way != "0+"] if low or above else _digits_between("", high, True, below)


def _digits_between(low: str, high: str | None, above: bool, below: bool) -> list[str]:
    """Digits, at least one, that as a fraction are from `low` to `high`."""
    if high is not None and (low > high or (low == high and (above or below))):
        return []
    if high is None:
        return _digits_from(low, above)
    if not low:
        ways = _digits_to(high, below)
        return [way for way in ways if way != "0+"] and _positive_to(high, below) if above else ways
    if high and low[0] == high[0]:
        ends = not low[1:] and not above and (bool(high[1:]) or not below)
        return _after(low[0], _digits_between(low[1:], high[1:], above, below), ends=ends)
    first, last = int(low[0]), int(high[0]) if high else 0
    ways = _after(str(first), _digits_from(low[1:], above), ends=not low[1:] and not above)
    if last - first > 1:
        ways.append(f"[{first + 1}-{last - 1}][0-9]*")
    return ways + _up_to(str(last), high[1:], below)


def _digits_from(low: str, above: bool) -> list[str]:
    """Digits, at least one, that as a fraction are `low` or more."""
    if not low:
        return ["[0-9]*[1-9][0-9]*"] if above else ["[0-9]+"]
    digit = int(low[0])
    ways = _after(low[0], _digits_from(low[1:], above), ends=not low[1:] and not above)
    if digit < 9:
        ways.append(f"[{digit + 1}-9][0-9]*")
    return ways


def _digits_to(high: str, below: bool) -> list[str]:
    """Digits, at least one, that as a fraction are `high` or less."""
    if not high:
        return [] if below else ["0+"]
    digit = int(high[0])
    ways = [f"[0-{digit - 1}][0-9]*"] if digit else []
    return ways + _up_to(high[0], high[1:], below)


def _positive_to(high: str, below: bool) -> list[str]:
    """Digits that as a fraction are more than 0 and `high` or less."""
    if not high:
        return []
    digit = int(high[0])
    if digit == 0:
        return [f"0(?:{way})" for way in _positive_to(high[1:], below)]
    ways = [f"[1-{digit - 1}][0-9]*"] if digit > 1 else []
    return [*ways, "0[0-9]*[1-9][0-9]*", *_up_to(high[0], high[1:], below)]


def _up_to(digit: str, rest: str, below: bool) -> list[str]:
    """Digits that begin with one and go on with what as a fraction is `rest` or less, or with nothing if that fits."""
    return _after(digit, _digits_to(rest, below), ends=bool(rest) or not below)


def _after(digit: str, ways: list[str], *, ends: bool) -> list[str]:
    """A digit and one of the ways to go on after it, or none if it may be the end."""
    if ways:
        return [f"{digit}(?:{'|'.join(ways)})" + ("?" if ends else "")]
    return [digit] if ends else []
