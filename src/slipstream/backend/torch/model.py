"""A model of `transformers` that runs steps over KV blocks of ours."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from slipstream.backend.self_test import OF_PROCESSORS
from slipstream.backend.steps import BLOCK_SIZE, SCRATCH_BLOCK, PagedChunk, StepClass, StepInputs, lay_out
from slipstream.backend.store import Blob, Exported
from slipstream.backend.torch.checkpoint import SCALES
from slipstream.backend.torch.chooser import DeviceLogits
from slipstream.backend.torch.graphs import CudaRecorder, Graphs, Recorder
from slipstream.backend.torch.hooks import NAME, computing, hook
from slipstream.backend.torch.joined import join
from slipstream.backend.torch.layers import seated, windows_of
from slipstream.backend.torch.loading import METHOD, repack
from slipstream.backend.torch.operators import CHUNK_LENGTHS, TOKEN_TILES, Operators, Step, StepOutput
from slipstream.backend.torch.side_stream import SideStream
from slipstream.backend.torch.staging import Staging
from slipstream.errors import ModelError
from slipstream.fields import DEVICE
from slipstream.processor import this_processor
from slipstream.sampling import Row, Sampler, SamplingParams
from slipstream.types import IntArray

OF_GPUS = StepClass((16, 32, 64, 128, 256, 384, 512, 768, 1024), (16, 32, 64, 128))
"""Few, so that steps soon are CUDA graphs: a GPU takes as long for 2 tokens as for 16, and hardly longer for 200, since
it reads the weights for either."""
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")


class TorchModel:
    """A model on its device: a `BlockModel`.

    KV is `[blocks, layers, 2, kv_heads, 32, head_dim]` in the weights' precision, of those layers that lie side by side
    (see `layers.seated`): a block is contiguous over these, so that copying one is one copy, and exporting some is one
    gather. On a GPU, steps, copies of blocks and gathers are queued on one stream: each finds what those before it
    left, so blocks can be given away before they are read. `path` is the file of the weights, or their index.
    """

    def __init__(self, model: Any, path: Path, operators: Operators) -> None:
        self.path = path
        self.operators = operators
        self._model = model
        hook(model)
        join(model)
        self._device: torch.device = model.device
        self.threads = torch.get_num_threads()
        on_gpu = self._device.type == "cuda"
        self.candidates = OF_GPUS if on_gpu else OF_PROCESSORS
        self.gpu = str(torch.cuda.get_device_name(self._device)) if on_gpu else None
        config = self._model.config.get_text_config()
        self.vocab_size = int(self._model.get_output_embeddings().weight.shape[0])
        self._dtype: torch.dtype = self._model.dtype
        self.precision = str(self._dtype).removeprefix("torch.")
        """Of weights, keys and values: `bfloat16`, `float16` or `float32`."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        windows = windows_of(model)
        self._seats = seated(windows)
        self.window_tables, self.window = max(table for table, _ in self._seats), max(windows)
        self.has_full_attention = 0 in windows
        side_by_side = 1 + max(place for _, place in self._seats)
        self._block = (side_by_side, 2, config.num_key_value_heads, BLOCK_SIZE, head_dim)
        self.block_bytes = int(np.prod(self._block)) * self._dtype.itemsize
        self.states = None
        self.queues = on_gpu
        self._new_clock: Callable[[], _DeviceClock | _HostClock] = _DeviceClock if on_gpu else _HostClock
        self._under_way: deque[StepInputs | tuple[StepOutput, _DeviceClock | _HostClock]] = deque()
        self._finished: list[_DeviceClock | _HostClock] = []
        self._seconds = 0.0
        self._staging = Staging(self._device)
        self._graphs: Graphs | None = None
        self._side: SideStream | None = None
        if on_gpu:
            self.record_with(CudaRecorder())
            self.read_with(SideStream())
        self.allocate(0)

    @classmethod
    def load(cls, folder: Path, device: torch.device, operators: Operators, threads: int | None = None) -> Self:
        """That of a folder with `config.json` and safetensors; raises `ModelError` if it can't be had."""
        if threads:
            torch.set_num_threads(threads)
        path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), folder / _WEIGHTS[-1])
        return cls(_load(folder, device), path, operators)

    @property
    def settings(self) -> str:
        """All that decides which kernels compute a step, how large it may be, and how KV is stored."""
        processor = this_processor()
        device = self.gpu or f"{processor.name} {' '.join(processor.instruction_sets)}, {self.threads} threads"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        sizes = f"steps of {', '.join(map(str, self.candidates.sizes))}"
        return "; ".join((versions, device, self.precision, self.operators.name, sizes))

    @property
    def prepared(self) -> tuple[int, ...]:
        """Nothing has to be prepared for a step's size."""
        return ()

    def record_with(self, recorder: Recorder) -> None:
        """Record small steps and replay them, from now on, as far as the operators allow it."""

        def room(rows: int) -> StepOutput:
            logits = torch.empty(rows, self.vocab_size, dtype=self._dtype, device=self._device)
            return StepOutput(logits, torch.empty(rows, dtype=torch.int64, device=self._device))

        self._graphs = Graphs(recorder, self._staging, BLOCK_SIZE, 1 + self.window_tables, self._compute, room)

    def read_with(self, side: SideStream) -> None:
        """Copy blocks to the host beside the next steps, from now on."""
        self._side = side

    def allocate(self, num_blocks: int) -> None:
        """Have so many blocks, all zero, in place of those before. Raises `ModelError` if they don't fit."""
        if self._graphs is not None:
            self._graphs.clear()
        self._kv = torch.empty(0)  # first give back what there was
        if self.gpu:
            torch.cuda.empty_cache()  # of which something small may have been cut off meanwhile
        try:
            self._kv = torch.zeros((num_blocks, *self._block), dtype=self._dtype, device=self._device)
        except RuntimeError as error:
            size = num_blocks * self.block_bytes
            raise ModelError(f"{size:,} bytes for keys and values can't be had beside the weights: {error}") from error

    def warm_up(self) -> None:
        """Have the kernels of steps of all sizes compiled, so that no request and no measurement waits for them.

        Raises `ModelError` if one can't be, or fails.
        """
        self.allocate(1)
        for size in (CHUNK_LENGTHS[0], *TOKEN_TILES, TOKEN_TILES[-1] + 1):  # the last in several tiles
            table = np.full(-(-size // BLOCK_SIZE), SCRATCH_BLOCK, np.int32)
            chunk = PagedChunk(np.zeros(size, np.int32), 0, table, size)
            self.start(lay_out([chunk], size, size, windows=self.window_tables))
            logits = self.finish()
        sampler = Sampler(SamplingParams(temperature=0), 0, np.empty(0, np.int32), self.vocab_size)
        mask = np.full(-(-self.vocab_size // 32), -1, np.int32)
        try:
            logits.choose([Row(0, sampler, 0, mask=mask)])  # who waits hears of what failed in any of the steps
        except Exception as error:
            raise self._failure(error) from error

    def start(self, inputs: StepInputs) -> None:
        """Start a step; see `Runner.start`. Raises `ModelError` if it can't be computed.

        A processor computes it when it's waited for: until then the host has other things to do.
        """
        self._under_way.append(self._run(inputs) if self.queues else inputs)

    def finish(self) -> DeviceLogits:
        """The logits of the first step under way; see `Runner.finish`. Who reads them, or `seconds`, waits for it.

        When a step fails, so do all that are under way: nobody waits for the others of its chunk.
        """
        if not self._under_way:
            raise ModelError("the forward pass failed, since another that was under way did")
        first = self._under_way.popleft()
        output, clock = first if isinstance(first, tuple) else self._run(first)
        self._finished.append(clock)
        return DeviceLogits(output, self.operators, self._staging)

    def _run(self, inputs: StepInputs) -> tuple[StepOutput, "_DeviceClock | _HostClock"]:
        """Compute a step, or let the device begin with it."""
        try:
            clock = self._new_clock()
            with torch.inference_mode():
                replayed = self._graphs.run(inputs) if self._graphs is not None and self.operators.recordable else None
                output = self._compute(Step.of(inputs, BLOCK_SIZE, self._staging)) if replayed is None else replayed
            clock.stop()
        except Exception as error:  # those of Triton, as when a kernel can't be compiled, are no `RuntimeError`
            raise self._failure(error) from error
        return output, clock

    @property
    def seconds(self) -> float:
        """What all steps took, once they are done. Raises `ModelError` if one failed."""
        finished, self._finished = self._finished, []
        try:
            taken = sum(clock.seconds() for clock in finished)
        except RuntimeError as error:
            raise self._failure(error) from error
        self._seconds += taken
        return self._seconds

    def _failure(self, error: Exception) -> ModelError:
        """What to raise if a step failed; none is under way any more."""
        self._under_way.clear()
        return ModelError(f"the forward pass failed: {error}")

    def _compute(self, step: Step) -> StepOutput:
        """The output of a step."""
        with computing(self.operators, step, self._kv, self._seats):
            found = self._model(
                input_ids=step.tokens, position_ids=step.positions, use_cache=False, logits_to_keep=step.logit_rows
            )
        logits: torch.Tensor = found.logits[0]
        return StepOutput(logits, self.operators.argmax(logits))

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another, in all layers."""
        self._kv[target].copy_(self._kv[source])

    def read_blocks(self, blocks: IntArray) -> Exported:
        """A copy of what the blocks hold, uint16 [blocks, elements]."""

        def gather() -> torch.Tensor:
            return self._kv[self._at(blocks)].flatten(1).view(torch.int16)

        if self._side is None:
            return Exported.here(gather().numpy().view(np.uint16))
        return self._side.copy(gather, len(blocks) * self.block_bytes)

    def write_blocks(self, blocks: IntArray, contents: Blob) -> None:
        """Fill blocks with what `read_blocks` gave."""
        given = torch.from_numpy(np.ascontiguousarray(contents).view(np.int16)).view(self._dtype)
        self._kv[self._at(blocks)] = given.to(self._device).view(-1, *self._block)

    def _at(self, blocks: IntArray) -> torch.Tensor:
        return self._staging.send(blocks.astype(np.int64))


class _HostClock:
    """How long a step takes where it is computed at once."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        return self._ended - self._started


class _DeviceClock:
    """How long a step takes on a device that runs beside the host."""

    def __init__(self) -> None:
        self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._ends[0].record()

    def stop(self) -> None:
        self._ends[1].record()

    def seconds(self) -> float:
        """Of the step, once it is done."""
        self._ends[1].synchronize()
        return float(self._ends[0].elapsed_time(self._ends[1])) / 1e3


def device_of(name: str) -> torch.device:
    """The device that a name means; `auto` is a GPU where there is one. Raises `ModelError` if it isn't there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        message = "there is no GPU that this build of torch can use: install torch for it, or leave out "
        raise ModelError(message, DEVICE)
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _load(folder: Path, device: torch.device) -> Any:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what matters of its report is raised below
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if (given := getattr(config, "quantization_config", None)) is not None:
            config.quantization_config = {"quant_method": METHOD, "given": given, "folder": str(folder)}
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            attn_implementation=NAME,
            experts_implementation=NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if lost := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
            raise ModelError(f"{folder} lacks weights of the model, or has them in other shapes: {', '.join(lost[:5])}")
        if scales := sorted(name for name in report["unexpected_keys"] if name.endswith(SCALES)):
            raise ModelError(f"{folder} has scales of weights that have none in the model: {', '.join(scales[:5])}")
        repack(model, device)
        return model.eval().to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} can't be loaded: {error}") from error
