"""What `format` demands of a text, as patterns of whole texts. Any other name is a hint: few validators know others."""

from functools import lru_cache

from slipstream.chat.schema.regex import Regex, parse

_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:(?:[0-5][0-9]|60)(?:\\.[0-9]+)?(?:[zZ]|[+-]{_HOUR})"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"
    "02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = f"(?:[0-9]{{4}}-{_DAY}|{_LEAP_YEAR}-02-29)"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = f"(?:{_BYTE}\\.){{3}}{_BYTE}"
_ATOM = "[a-zA-Z0-9!#$%&'*+\\-/=?^_`{|}~]+"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9\\-]{0,61}[a-zA-Z0-9])?"
_DOMAIN = f"{_LABEL}(?:\\.{_LABEL})*"
_HEX = "[0-9a-fA-F]"


def _seconds_down(*units: str) -> str:
    """One or several counts, each of the next smaller unit."""
    return "(?:" + "|".join(_count(units[index:]) for index in range(len(units))) + ")"


def _count(units: tuple[str, ...]) -> str:
    return f"[0-9]+{units[0]}" + (f"(?:{_count(units[1:])})?" if units[1:] else "")


def _ipv6() -> str:
    """Eight groups, or fewer around one `::`; the last two may be an IPv4 address (RFC 4291)."""
    group = f"{_HEX}{{1,4}}"
    last = f"(?:{group}:{group}|{_IPV4})"
    ways = [f"(?:{group}:){{6}}{last}"]
    for after in range(5, -1, -1):
        most = 4 - after + 1
        before = f"(?:(?:{group}:){{0,{most - 1}}}{group})?" if most else ""
        ways.append(f"{before}::(?:{group}:){{{after}}}{last}" if after else f"{before}::{last}")
    ways.append(f"(?:(?:{group}:){{0,5}}{group})?::{group}")
    ways.append(f"(?:(?:{group}:){{0,6}}{group})?::")
    return f"(?:{'|'.join(ways)})"


def _uri() -> str:
    """RFC 3986."""
    plain = "a-zA-Z0-9\\-._~!$&'()*+,;="
    percent = f"%{_HEX}{{2}}"

    def some(more: str) -> str:
        return f"(?:[{plain}{more}]|{percent})"

    host = f"(?:\\[(?:{_ipv6()}|v{_HEX}+\\.[{plain}:]+)\\]|{some('')}*)"
    authority = f"//(?:{some(':')}*@)?{host}(?::[0-9]*)?(?:/{some(':@')}*)*"
    path = f"/?(?:{some(':@')}+(?:/{some(':@')}*)*)?"
    return f"[a-zA-Z][a-zA-Z0-9+\\-.]*:(?:{authority}|{path})(?:\\?{some(':@/?')}*)?(?:#{some(':@/?')}*)?"


_DURATION = (
    f"P(?:{_seconds_down('Y', 'M', 'D')}(?:T{_seconds_down('H', 'M', 'S')})?|T{_seconds_down('H', 'M', 'S')}|[0-9]+W)"
)

_PATTERNS = {
    "date-time": f"{_DATE}[tT]{_TIME}",
    "date": _DATE,
    "time": _TIME,
    "duration": _DURATION,
    "email": f"{_ATOM}(?:\\.{_ATOM})*@(?:{_DOMAIN}|\\[{_IPV4}\\])",
    "hostname": _DOMAIN,
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uri": _uri(),
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
}


@lru_cache(maxsize=64)
def of_format(name: str) -> Regex | None:
    """The pattern of a format; None if it demands nothing."""
    return parse(_PATTERNS[name]) if name in _PATTERNS else None
