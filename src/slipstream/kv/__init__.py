"""KV memory: sequences, who may hold them, and the index that finds shared prefixes."""

from slipstream.kv.memory import KVMemory, KVUsage
from slipstream.kv.prefix_index import PrefixIndex
from slipstream.kv.sequence import Sequence

__all__ = ["KVMemory", "KVUsage", "PrefixIndex", "Sequence"]
