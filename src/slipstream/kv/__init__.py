"""KV memory: blocks, the sequences made of them, and the index that finds shared prefixes."""

from slipstream.kv.block_pool import BlockPool, OutOfBlocksError
from slipstream.kv.memory import KVMemory, KVUsage
from slipstream.kv.prefix_index import PrefixIndex
from slipstream.kv.sequence import Sequence

__all__ = ["BlockPool", "KVMemory", "KVUsage", "OutOfBlocksError", "PrefixIndex", "Sequence"]
