"""The servers that the bench can measure; one file each."""

from collections.abc import Mapping

from slipstream_bench.peers.base import Configuration, Endpoint, Peer, PeerError, bench_home
from slipstream_bench.peers.llama_server import LlamaServer
from slipstream_bench.peers.ollama import Ollama
from slipstream_bench.peers.openvino_genai import OpenVINOGenAI
from slipstream_bench.peers.sglang import SGLang
from slipstream_bench.peers.slipstream import Slipstream
from slipstream_bench.peers.vllm import VLLM

PEERS: Mapping[str, type[Peer]] = {
    peer.name: peer for peer in (Slipstream, LlamaServer, VLLM, OpenVINOGenAI, SGLang, Ollama)
}
"""By name, in the order of reports."""

__all__ = ["PEERS", "Configuration", "Endpoint", "Peer", "PeerError", "Slipstream", "bench_home"]
