"""The servers that the bench can measure; one file each."""

from collections.abc import Mapping

from slipstream.bench.peers.base import Configuration, Endpoint, Peer, PeerError, bench_home
from slipstream.bench.peers.llama_server import LlamaServer
from slipstream.bench.peers.ollama import Ollama
from slipstream.bench.peers.openvino_genai import OpenVINOGenAI
from slipstream.bench.peers.sglang import SGLang
from slipstream.bench.peers.slipstream import Slipstream
from slipstream.bench.peers.vllm import VLLM

PEERS: Mapping[str, type[Peer]] = {
    peer.name: peer for peer in (Slipstream, LlamaServer, VLLM, OpenVINOGenAI, SGLang, Ollama)
}
"""By name, in the order of reports."""

__all__ = ["PEERS", "Configuration", "Endpoint", "Peer", "PeerError", "bench_home"]
