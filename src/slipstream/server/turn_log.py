"""The log of turns: a line for each, with what it cost and never what it said."""

import logging
from typing import Any

from slipstream.server.extension import report_of
from slipstream.server.turn import LiveTurn

logger = logging.getLogger("slipstream.turns")


def log_turn(turn: LiveTurn) -> None:
    """Log a turn that is over, however it ended."""
    facts = facts_of(turn)
    text = " ".join(f"{name}={value}" for name, value in facts.items() if value not in (None, ""))
    logger.info("turn %s", text, extra={"facts": facts})


def facts_of(turn: LiveTurn) -> dict[str, Any]:
    """What there is to tell of a turn that is over, but what it said."""
    report = report_of(turn)
    broken = report.pop("reuse_break")
    report.pop("warnings")
    return {
        "turn_id": turn.id,
        "tenant": turn.tenant,
        "outcome": ",".join(dict.fromkeys(str(choice.outputs[-1].finish_reason) for choice in turn.choices)),
        "choices": len(turn.choices),
        **report,
        "reuse_break": broken["kind"] if broken is not None else None,
        "first_token_ms": round(turn.first_token_seconds * 1e3, 3),
        "total_ms": round(turn.seconds * 1e3, 3),
    }
