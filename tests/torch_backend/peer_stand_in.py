"""Stands for a Python that has vLLM or SGLang: says its version, and serves a folder in its protocol.

Answers are what a grammar of tokens leaves no choice about; it takes the tokens from the folder's own tokenizer.
"""

import argparse
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, grammar_from
from tokenizers import Tokenizer
from transformers import AutoConfig

_GRAMMAR_FIELDS = {"vllm.entrypoints.openai.api_server": "structured_outputs", "sglang.launch_server": "ebnf"}


def serve(module: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", "--model-path", type=Path, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--port", type=int, required=True)
    options, _ = parser.parse_known_args(arguments)
    assert AutoConfig.from_pretrained(options.model).architectures == ["Qwen3ForCausalLM"]
    assert list(options.model.glob("*.safetensors"))
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    assert "chat_template" in json.loads((options.model / "tokenizer_config.json").read_text())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(b"{}", "application/json")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == options.served_model_name
            assert "response_format" not in body
            grammar: Any = body[_GRAMMAR_FIELDS[module]]
            text = grammar["grammar"] if module.startswith("vllm") else grammar
            assert not LLMatcher.validate_grammar(grammar_from("grammar", text)), "both read grammars so"
            assert re.fullmatch(r"start:( <\[\d+\]>)+", text)
            tokens = [int(token) for token in re.findall(r"\d+", text)]
            said = tokenizer.decode(tokens, skip_special_tokens=False)
            usage = {"prompt_tokens": 1, "completion_tokens": len(tokens)}
            chunks = [{"choices": [{"index": 0, "delta": {"content": said}}]}, {"choices": [], "usage": usage}]
            events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            self.send(events.encode(), "text/event-stream")

        def send(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "-c":
        assert "vllm" in sys.argv[2] or "sglang" in sys.argv[2]
        sys.stdout.write("9.9\n")
    else:
        serve(sys.argv[2], sys.argv[3:])
