"""Sessions: conversations by name, what may be done with them, and how they outlive the process."""

from slipstream.sessions.database import Database, StoredResponse
from slipstream.sessions.history import History
from slipstream.sessions.kv_connector import KVConnector
from slipstream.sessions.saved_kv import SavedKV
from slipstream.sessions.sessions import Sessions
from slipstream.sessions.state import SessionInfo, SessionLimits, SessionState, SessionTurn
from slipstream.sessions.turns import SessionTurns

__all__ = [
    "Database",
    "History",
    "KVConnector",
    "SavedKV",
    "SessionInfo",
    "SessionLimits",
    "SessionState",
    "SessionTurn",
    "SessionTurns",
    "Sessions",
    "StoredResponse",
]
