"""Everything that serves a model, put together."""

import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from slipstream.backend import Backend
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged import PagedBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.chat import Conversations, Template, template_of
from slipstream.chat.answers import Dialect
from slipstream.chat.foreign import ForeignTemplate
from slipstream.config import EngineConfig
from slipstream.engine import EngineCore
from slipstream.engine.grammar import GrammarCompiler
from slipstream.engine.response_cache import ResponseCache
from slipstream.errors import ModelError, StateError
from slipstream.fields import DEVICE, STATE_DIR
from slipstream.models import Model
from slipstream.processor import give_back_memory, resident_bytes
from slipstream.sandbox import Allowance
from slipstream.sessions import Database, KVConnector, SavedKV, SessionLimits, Sessions
from slipstream.sessions.private import private_folder
from slipstream.tokenizer import Tokenizer
from slipstream.turns import Turns

_GIL_SWITCH_SECONDS = 0.0005
"""The engine thread wants the interpreter back right after each forward pass; Python's default lets it wait 5 ms."""

Progress = Callable[[float], None]
"""Is called with the fraction of the start-up work done."""
Measure = Callable[[Progress], Backend]
"""The second half of loading a backend, which measures steps and wants the processor for itself."""
Load = Callable[[Model, EngineConfig], Measure]
"""The first half, which compiles the model."""


def _openvino(model: Model, config: EngineConfig) -> Measure:
    if config.device == "cuda":
        raise ModelError(f"{model.name} runs on the processor; a GPU takes models in safetensors: leave out ", DEVICE)
    paged = PagedModel(model.ir_path, threads=config.threads)
    return lambda progress: OpenVINOBackend(paged, kv_memory=config.kv_memory, progress=progress)


def _torch(model: Model, config: EngineConfig) -> Measure:
    try:
        from slipstream.backend.torch.backend import TorchBackend, operators_for  # torch is not installed everywhere
        from slipstream.backend.torch.model import TorchModel, device_of
    except ImportError as error:
        raise ModelError(
            f"{model.name} is a model in safetensors, which needs packages that are not installed ({error}): "
            "pip install 'slipstream[gpu]', or take a GGUF file or an OpenVINO IR"
        ) from error
    device = device_of(config.device)
    operators = operators_for(device)
    loaded = TorchModel.load(model.path, device, operators[0], config.threads)
    return lambda progress: TorchBackend(loaded, operators, kv_memory=config.kv_memory, progress=progress)


BACKENDS: dict[str, Load] = {"openvino": _openvino, "safetensors": _torch}
"""What loads a model, by the kind of its weights."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of this process, in bytes, as the system has it; all zero where the system doesn't say."""

    resident: int
    """All of it."""
    model: int
    """The weights, with what was loaded beside them: tokenizer and grammar tables."""
    kv: int
    """Keys and values: it grows with the tokens held, up to `--kv-memory`; 0 if they are on a GPU."""
    other: int
    """The interpreter, libraries, conversations, cached answers, and the rest."""


class Runtime:
    """A model, ready to generate; close it, or use it in a `with` statement.

    `on_warm_up` is called with the fraction of the start-up work done.

    Raises `ModelError` if the model can't be loaded, `StateError` if its state can't. All methods may be called from
    any thread.
    """

    def __init__(self, model: Model, config: EngineConfig, *, on_warm_up: Progress | None = None) -> None:
        self.model = model
        self._closing, self._closed = threading.Lock(), False
        before = resident_bytes()
        manifest = model.manifest
        pool = ThreadPoolExecutor(1)
        compiled = pool.submit(BACKENDS[model.weights], model, config)  # while the rest loads
        pool.shutdown(wait=False)
        self.tokenizer = Tokenizer.from_file(model.tokenizer_path)
        allowance = Allowance(seconds=config.sandbox_seconds, memory=config.sandbox_memory)
        self._template = template = chat_template(model, self.tokenizer, allowance)
        self.dialect = Dialect(template.shown if template is not None else "", self.tokenizer, config.tool_format)
        """How the model writes its answers."""
        self.conversations = Conversations(template, self.tokenizer, self.dialect)
        self.grammars = GrammarCompiler(
            self.tokenizer,
            vocab_size=manifest.vocab_size,
            stop_token_ids=manifest.stop_token_ids,
            ends=self.dialect.ends,
            allowance=allowance,
        )
        self.database = _open_database(model, config)
        """Where responses are kept; and with a state folder, all that outlives the process."""
        self.backend = compiled.result()(on_warm_up or (lambda _: None))
        sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_SECONDS))
        self.core = EngineCore(
            self.backend,
            self.tokenizer,
            context_length=manifest.context_length,
            stop_token_ids=frozenset(manifest.stop_token_ids),
            step_target=config.step_target_ms / 1e3,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            response_cache=(
                ResponseCache(config.response_cache_memory, model.fingerprint) if self.backend.exact else None
            ),
        )
        self.sessions = Sessions(
            self.core,
            self.conversations,
            limits=SessionLimits(config.max_sessions, config.max_pins, config.max_session_memory, config.session_ttl),
            database=self.database if config.state_dir is not None else None,
            connector=self._open_connector(config.state_dir, config) if config.state_dir is not None else None,
        )
        self.conversations.check_length = self.core.limits.check_characters
        self.turns = Turns(self.core, self.sessions.turns, self.conversations, self.dialect, self.grammars, self.encode)
        give_back_memory()  # what it took to compile the model and its tables
        self._model_bytes = max(0, resident_bytes() - before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def exact(self) -> bool:
        """Whether the same request gives the same tokens here, whatever was cached, batched, drafted or evicted."""
        return self.backend.exact

    @property
    def memory(self) -> MemoryUse:
        """What takes how much memory now."""
        if not (resident := resident_bytes()):
            return MemoryUse(0, 0, 0, 0)
        on_gpu = isinstance(self.backend, PagedBackend) and self.backend.model.gpu is not None
        kv = 0 if on_gpu else self.core.stats().kv.peak * self.backend.store.bytes_per_token
        return MemoryUse(resident, self._model_bytes, kv, max(0, resident - self._model_bytes - kv))

    @property
    def sandbox_deaths(self) -> dict[str, int]:
        """How often a sandbox ended during a call, by what runs in it."""
        template = self._template.sandbox if isinstance(self._template, ForeignTemplate) else None
        sandboxes = {"grammar": self.grammars.sandbox, "template": template}
        return {name: sandbox.deaths if sandbox is not None else 0 for name, sandbox in sandboxes.items()}

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Let running requests finish for so long, abort the rest, and end the engine. Only the first call does."""
        self.core.drain(drain_seconds)
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self.sessions.close()
            self.core.shutdown()
            self.grammars.close()
            if self._template is not None:
                self._template.close()
            self.database.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the beginning-of-text token if the model wants one."""
        ids = self.tokenizer.encode(text)
        bos = self.model.manifest.bos_token_id
        return [bos, *ids] if self.model.manifest.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _open_connector(self, state_dir: Path, config: EngineConfig) -> KVConnector:
        fingerprint = f"{self.model.fingerprint}; {self.backend.fingerprint}"
        saved = SavedKV(state_dir / "kv", fingerprint, config.state_disk, anew=self.database.is_new)
        return KVConnector(self.core, self.conversations, saved, config.state_bandwidth)


def _open_database(model: Model, config: EngineConfig) -> Database:
    if config.state_dir is None:
        return Database(None, model.fingerprint)
    try:
        private_folder(config.state_dir)
        return Database(config.state_dir / "state.db", model.fingerprint)
    except (OSError, sqlite3.Error) as error:
        message = f"{config.state_dir} can't keep state: {error}; choose another "
        raise StateError(message, STATE_DIR) from error


def chat_template(model: Model, tokenizer: Tokenizer, allowance: Allowance | None = None) -> Template | None:
    """A model's own, told the texts of its tokens; raises `ModelError` if it does not compile."""
    if (source := model.chat_template) is None:
        return None
    tokens = {"bos_token": model.manifest.bos_token_id, "eos_token": model.manifest.eos_token_id}
    texts = {name: tokenizer.token_bytes(id).decode() for name, id in tokens.items() if id is not None}
    return template_of(source, texts, allowance)
