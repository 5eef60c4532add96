"""Responses that are kept, so that they can be read again and gone on from."""

import logging
import sqlite3
from collections import OrderedDict
from dataclasses import dataclass

from pydantic import TypeAdapter

from slipstream.chat import Message
from slipstream.sessions import Database

logger = logging.getLogger(__name__)

STORE_BYTES = 128 * 2**20
"""What the store keeps by default: some ten thousand responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A node of a conversation's tree: the answer, what it was an answer to, and the way there.

    It stands for itself: going on from it needs no other record.
    """

    id: str
    response: str
    """The response object, as JSON text."""
    input_items: str
    """The items that its request brought, as a JSON list, each with an id."""
    messages: tuple[Message, ...]
    """The conversation up to and including the answer, without instructions."""

    @property
    def size(self) -> int:
        """About how many bytes it takes; messages that records share count for each."""
        texts = (
            len(message.text) + sum(len(call.arguments) for call in message.tool_calls) for message in self.messages
        )
        return len(self.response) + len(self.input_items) + sum(texts)


_KIND = "response"
_RECORD = TypeAdapter(StoredResponse)


class ResponseStore:
    """Stored responses by tenant and id, the most recently used that fit; in the database too, if there is one.

    For the event loop alone.
    """

    def __init__(self, database: Database | None = None, *, max_bytes: int = STORE_BYTES) -> None:
        self._database = database
        self._max_bytes = max_bytes
        self._bytes = 0
        self._records: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        for tenant, _, value in database.records(_KIND) if database is not None else ():
            self._add(tenant, _RECORD.validate_json(value))

    def put(self, tenant: str, record: StoredResponse) -> None:
        """Keep a response."""
        self._add(tenant, record)
        if self._database is not None:
            try:
                self._database.put_record(_KIND, tenant, record.id, _RECORD.dump_json(record))
            except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
                logger.warning("response %s can't be saved and is in memory alone: %s", record.id, error)

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The response of that id, if it's still there."""
        record = self._records.get((tenant, response_id))
        if record is not None:
            self._records.move_to_end((tenant, response_id))
        return record

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forget a response; tells whether it was there. Those that went on from it stay."""
        record = self._records.pop((tenant, response_id), None)
        if record is None:
            return False
        self._bytes -= record.size
        if self._database is not None:
            self._database.delete_record(_KIND, tenant, response_id)
        return True

    def _add(self, tenant: str, record: StoredResponse) -> None:
        self._records[tenant, record.id] = record
        self._bytes += record.size
        while self._bytes > self._max_bytes:
            self.delete(*next(iter(self._records)))
