"""`POST /v1/responses/compact`: the model summarises a conversation, which goes on from that."""

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from slipstream.server.compaction import sealed
from slipstream.server.extension import report_of
from slipstream.server.responses_items import item_id
from slipstream.server.stream import Answer
from slipstream.turns import Piece


class CompactionAnswer(Answer):
    """What was said by the user, and the summary in place of everything else."""

    async def whole(self) -> bytes:
        """The items that the conversation goes on from, and what it took to make them."""
        (choice,) = self.turn.choices
        response, report = f"resp_{secrets.token_hex(12)}", report_of(self.turn)
        assert isinstance(choice.request.prompt, tuple)
        *messages, _ = choice.request.prompt  # which ends with the wish for a summary
        said = [message for message in messages if message.role == "user"]
        output = [_user_item(response, place, message.text) for place, message in enumerate(said)]
        summary = {"type": "compaction", "encrypted_content": sealed(choice.reader.message.text)}
        output.append({"id": item_id(response, "compaction", len(output)), **summary})
        head = {"id": response, "object": "response.compaction", "created_at": int(time.time()), "output": output}
        usage = response_usage(report, kept=choice.request.reuse, reasoning=0)
        return json.dumps(head | {"usage": usage, "slipstream": report}).encode()

    def events(self, piece: Piece) -> Iterable[bytes]:  # noqa: ARG002
        """None: it's answered whole."""
        return ()

    async def end(self) -> bytes:
        """Nothing."""
        return b""


def response_usage(report: Mapping[str, Any], *, kept: bool, reasoning: int) -> dict[str, Any]:
    """The `usage` of a turn, by its report; what was computed counts as written to the cache if it's `kept`."""
    return {
        "input_tokens": report["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": report["reused_tokens"],
            "cache_write_tokens": report["delta_tokens"] if kept else 0,
        },
        "output_tokens": report["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": report["prompt_tokens"] + report["completion_tokens"],
    }


def _user_item(response: str, place: int, text: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    id = item_id(response, "message", place)
    return {"id": id, "type": "message", "role": "user", "status": "completed", "content": content}
