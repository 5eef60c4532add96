"""What a GPU makes of the torch backend: products, attention and whole steps, by bits and by time, in one table.

    python -m slipstream_bench.gpu_check

Needs no network once the default model is there, whose vocabulary it takes: weights are random, and made on the device.
With `--device cpu` it runs on the processor in tiny sizes, which shows that it works and nothing else. Results are
written as JSON, and compared with those of the last run on the same device that are kept in a folder.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from slipstream.backend import calibration
from slipstream.backend.self_test import SELF_TEST_BLOCKS
from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, lay_out
from slipstream.backend.torch.backend import operators_for
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import AttentionShape, Operators, Step, Tensor
from slipstream.backend.torch.staging import Staging
from slipstream.errors import ModelError
from slipstream.processor import this_processor
from slipstream.tokenizer import Tokenizer
from slipstream_bench.gpu_agents import MODES, Fleet, check_scenarios, generated, model_folder, random_model
from slipstream_bench.gpu_peers import PEERS, Installed, find, serving, turns, write_folder
from slipstream_bench.gpu_report import Result, print_table
from slipstream_bench.peers.base import PeerError

_QUERIES = 48


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    rows: tuple[int, ...]
    """Of products, whose bits are compared."""
    timed_rows: tuple[int, ...]
    shapes: dict[str, tuple[int, int]]
    """Of weights, by name."""
    heads: tuple[int, int, int]
    """Heads, those of keys, and the size of one."""
    contexts: tuple[int, ...]
    models: dict[str, dict[str, int]]
    vocabulary: int
    steps: tuple[int, ...]
    agents: tuple[tuple[int, int], ...]
    """How many talk at once, and for how many turns."""
    scenarios: int
    """Of exactness."""
    copied: int
    """Bytes that are copied to measure bandwidth."""
    dtype: torch.dtype


FULL = Sizes(
    rows=(1, 2, 3, 4, 7, 8, 16, 17, 32, 48, 64, 96, 128, 200, 256, 512),
    timed_rows=(1, 16, 64, 128, 512),
    shapes={
        "8B qkv": (6144, 4096),
        "8B o": (4096, 4096),
        "8B gate, up": (24576, 4096),
        "8B down": (4096, 12288),
        "1.7B gate, up": (12288, 2048),
        "0.6B down": (1024, 3072),
        "8B head": (151936, 4096),
    },
    heads=(32, 8, 128),
    contexts=(1000, 8000, 32000),
    models={
        "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    },
    vocabulary=151_936,
    steps=(1, 16, 128, 512),
    agents=((1, 6), (1, 35), (8, 6), (64, 6)),
    scenarios=1000,
    copied=1 << 30,
    dtype=torch.bfloat16,
)
TINY = Sizes(
    rows=(1, 3, 17),
    timed_rows=(1, 17),
    shapes={"tiny": (96, 128)},
    heads=(4, 2, 16),
    contexts=(70,),
    models={"tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}},
    vocabulary=49_152,
    steps=(1, 16),
    agents=((1, 2),),
    scenarios=4,
    copied=1 << 20,
    dtype=torch.float32,
)


class Check:
    """A run on one device, until its time is up; `pythons` have servers to compare with, by their names."""

    def __init__(self, device: torch.device, sizes: Sizes, seconds: float, pythons: Mapping[str, Path]) -> None:
        self.device = device
        self.sizes = sizes
        self._pythons = pythons
        self._until = time.monotonic() + seconds
        self.machine = self._machine()

    @property
    def timely(self) -> bool:
        """Whether there is time for more."""
        return time.monotonic() < self._until

    def run(self) -> Iterator[Result]:
        """All parts, the cheapest first."""
        yield from _inferred(self._products())
        yield from _inferred(self._attention())
        yield from self._scenarios()  # on an engine's own thread, which may write to nothing that was made in that mode
        yield from _inferred(self._steps())
        yield from self._agents()
        yield from self._peers()

    def _machine(self) -> dict[str, Any]:
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copied = 2 * self.sizes.copied / self.ms(lambda: target.copy_(source)) / 1e6
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        packages = {name: version(name) for name in ("slipstream", "torch", "transformers")}
        return {"device": gpu or this_processor().name, "gpu": bool(gpu), "gb_per_second": round(copied, 1), **packages}

    def _products(self) -> Iterator[Result]:
        """Products by number of rows: the library's own, those of rows padded to sixteen, and the operators'."""
        choices: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "library": F.linear,
            "library, padded": lambda x, w: F.linear(F.pad(x, (0, 0, 0, -len(x) % 16)), w)[: len(x)],
        }
        choices |= {kind_of(each): each.linear for each in self._with_own("linear")}
        for case, (n, k) in self.sizes.shapes.items():
            weight, x = self.random(n, k) * 0.02, self.random(self.sizes.rows[-1], k)
            for choice, product in choices.items():
                if not self.timely:
                    return
                yield self._product(Result("product", case, choice), product, x, weight)

    def _product(
        self, result: Result, product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
    ) -> Result:
        whole = product(x, weight)
        exact = x[:16].double() @ weight.double().T
        differ = [rows for rows in self.sizes.rows if not torch.equal(product(x[:rows].clone(), weight), whole[:rows])]
        moved = not torch.equal(product(x.flip(0).contiguous(), weight).flip(0), whole)
        result.exact = not differ and not moved
        error = float((whole[:16].double() - exact).abs().max() / exact.abs().max())
        result.note = (
            f"error {error:.0e}" + (f", differs at {differ}" if differ else "") + (", by place" if moved else "")
        )
        result.ms = {str(rows): self.ms(partial(product, x[:rows], weight)) for rows in self.sizes.timed_rows}
        result.floor_ms = self._floor(weight.numel() * weight.element_size())
        return result

    def _attention(self) -> Iterator[Result]:
        """Attention after contexts of some lengths: over cuts and beside another sequence, and how long it takes."""
        _, kv_heads, dim = self.sizes.heads
        for context in self.sizes.contexts:
            sequence = _Sequence(self, context)
            for operators in self._with_own("attend"):
                if not self.timely:
                    return
                whole = sequence.attend(operators, 0, _QUERIES)
                cuts = pairwise((0, 7, 9, 40, _QUERIES))
                parts = torch.cat([sequence.attend(operators, start, end, beside=5) for start, end in cuts])
                result = Result("attention", f"{context} keys", kind_of(operators), torch.equal(parts, whole))
                for tokens in (2, 16, _QUERIES):
                    result.ms[str(tokens)] = self.ms(partial(sequence.attend, operators, 0, tokens))
                result.floor_ms = self._floor(2 * kv_heads * dim * context * self.sizes.dtype.itemsize)
                yield result

    def _with_own(self, name: str) -> list[Operators]:
        """The device's kinds of operators, without those that share this one with a faster kind."""
        kinds = {getattr(type(each), name): each for each in reversed(operators_for(self.device))}
        return [*reversed(kinds.values())]

    def _steps(self) -> Iterator[Result]:
        """Whole steps of models of random weights: the self-test, and what steps take; fused and not."""
        kinds = operators_for(self.device)
        kinds = [each for each in kinds if each.recordable] or kinds  # the others are slow
        for case, shape in self.sizes.models.items():
            if not self.timely:
                return
            model = self._model(shape)
            weights = sum(each.numel() * each.element_size() for each in model.parameters())
            with TemporaryDirectory() as folder:
                runner = TorchModel(model, Path(folder) / "none", kinds[0])
                for operators in kinds:
                    if self.timely:
                        yield self._step(Result("step", case, kind_of(operators)), runner, operators, weights)
            del model, runner

    def _step(self, result: Result, runner: TorchModel, operators: Operators, weights: int) -> Result:
        runner.operators = operators
        runner.warm_up()
        runner.allocate(SELF_TEST_BLOCKS)
        found = calibration.calibrate(runner, lambda _: None)
        result.exact = found.exact
        result.note = f"steps of {found.step_class.sizes[0]} to {found.step_class.sizes[-1]} tokens"
        for tokens in self.sizes.steps:
            result.ms[str(tokens)] = self.ms(partial(_compute, runner, tokens))
        result.floor_ms = self._floor(weights)
        return result

    def _scenarios(self) -> Iterator[Result]:
        """Random scenarios on a whole engine, against a computation from scratch."""
        if not self.timely:
            return
        result = Result("exactness", "scenarios", "")
        shape = next(iter(self.sizes.models.values())) | {"num_hidden_layers": 2}
        until = time.monotonic() + (self._until - time.monotonic()) / 4
        with TemporaryDirectory() as folder:
            checked, fault = check_scenarios(Path(folder), partial(self._model, shape), self.sizes.scenarios, until)
        result.exact = fault is None if checked or fault else None
        result.note = fault or (f"{checked} scenarios" if checked else "needs the repository's tests: run it there")
        yield result

    def _agents(self) -> Iterator[Result]:
        """Agents' turns, with all that Slipstream does for them, and with less; and what `transformers` takes."""
        for case, shape in reversed(self.sizes.models.items()):  # the large ones matter most
            taken: list[tuple[int, int]] = []
            try:
                with TemporaryDirectory() as folder:
                    make = partial(self._model, shape)
                    memory, vocabulary = self._kv_memory(shape), self.sizes.vocabulary
                    with Fleet(Path(folder), make, kv_memory=memory, vocab_size=vocabulary) as fleet:
                        for result, tokens in self._turns(case, fleet):
                            taken = taken or tokens[1:]
                            yield result
                if taken and self.timely:
                    seconds = generated(self._model(shape, attention="sdpa"), taken[:5])
                    yield Result("agents", f"{case}, 1 agent", "transformers", ms={"turn": round(seconds * 1e3, 2)})
            except (ModelError, torch.OutOfMemoryError) as error:
                yield Result("agents", case, "", note=f"not run: {error}")

    def _turns(self, case: str, fleet: Fleet) -> Iterator[tuple[Result, list[tuple[int, int]]]]:
        """What turns take, and the tokens of their prompts and answers."""
        for agents, count in self.sizes.agents:
            for mode in MODES:
                if not self.timely:
                    return
                fleet.run(mode, agents, 2, "warm-up")
                found = fleet.run(mode, agents, count, "measured")
                result = Result("agents", f"{case}, {agents} agents, {count} turns", mode.name, fleet.exact)
                device, host = found.device / found.steps * 1e3, (found.busy - found.device) / found.steps * 1e3
                result.ms = {"turn": found.median * 1e3, "device's step": device, "host's": host}
                result.ms = {name: round(ms, 3) for name, ms in result.ms.items()}
                answers = sum(answer for _, answer in found.tokens)
                result.note = f"host {found.host_share:.0%}, {answers / found.steps:.2f} tokens a step"
                yield result, list(found.tokens)

    def _peers(self) -> Iterator[Result]:
        """The same turns of the same agents on other servers, where they are installed."""
        installed = []
        for peer in PEERS:
            if (found := find(peer, self._pythons.get(peer.name))) is not None:
                installed.append(found)
            else:
                note = f"not installed here; --peer {peer.name}=PYTHON names the Python that has it"
                yield Result("agents", "", peer.name, note=note)
        for case, shape in reversed(self.sizes.models.items()) if installed else ():
            with TemporaryDirectory() as parent:
                own, folder = Path(parent) / "own", Path(parent) / "weights"
                own.mkdir()
                model = model_folder(own, self.sizes.vocabulary)
                write_folder(self._model(shape, model.manifest.vocab_size), model, folder)
                self._give_back()
                for each in installed:
                    yield from self._turns_of(each, case, folder, Tokenizer.from_file(model.tokenizer_path))

    def _turns_of(self, peer: Installed, case: str, folder: Path, tokenizer: Tokenizer) -> Iterator[Result]:
        """What turns take on a server."""
        if not self.timely:
            return
        try:
            with serving(peer, folder, tokenizer, timeout=self._until - time.monotonic()) as endpoint:
                for agents, count in self.sizes.agents:
                    if not self.timely:
                        return
                    turns(endpoint, agents, 2, f"warm-up {agents} {count}")
                    found = turns(endpoint, agents, count, f"measured {agents} {count}")
                    later = [result.seconds for result in found if result.turn]
                    result = Result("agents", f"{case}, {agents} agents, {count} turns", peer.name)
                    result.ms = {"turn": round(statistics.median(later) * 1e3, 3)}
                    result.note = "over HTTP, the others in one process"
                    yield result
        except PeerError as error:
            yield Result("agents", case, peer.name, note=f"not run: {error}")

    def _give_back(self) -> None:
        """Let others have the device's memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _kv_memory(self, shape: dict[str, int]) -> int:
        """Bytes for the largest fleet, as far as the device has them beside the weights."""
        _, kv_heads, dim = self.sizes.heads
        token = shape["num_hidden_layers"] * 2 * kv_heads * dim * int(self.sizes.dtype.itemsize)
        wanted: int = max(agents for agents, _ in self.sizes.agents) * 6000 * token
        if self.device.type != "cuda":
            return wanted
        layer = 4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]
        weights = (2 * self.sizes.vocabulary * shape["hidden_size"] + shape["num_hidden_layers"] * layer) * 2
        return min(wanted, int((torch.cuda.mem_get_info(self.device)[0] - weights) * 0.8))

    def _model(self, shape: dict[str, int], vocabulary: int = 0, **options: str) -> Any:
        _, kv_heads, dim = self.sizes.heads
        sizes = shape | {
            "vocab_size": vocabulary or self.sizes.vocabulary,
            "num_key_value_heads": kv_heads,
            "head_dim": dim,
        }
        return random_model(self.device, self.sizes.dtype, sizes, **options)

    def random(self, *shape: int) -> Tensor:
        """Numbers that are the same at each run."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.sizes.dtype)

    def _floor(self, size: int) -> float:
        """Milliseconds to read so many bytes at the bandwidth of a copy."""
        return round(size / float(self.machine["gb_per_second"]) / 1e6, 4)

    def ms(self, work: Callable[[], object]) -> float:
        """The median of a few runs, the device's work included."""
        taken = []
        for _ in range(8):
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append((time.perf_counter() - started) * 1e3)
        return round(statistics.median(taken[2:]), 4)


class _Sequence:
    """Queries after a context, and the blocks of theirs and of another sequence."""

    def __init__(self, check: Check, context: int) -> None:
        heads, kv_heads, dim = check.sizes.heads
        blocks = -(-(context + _QUERIES + 2) // BLOCK_SIZE)
        self._context = context
        self._staging = Staging(check.device)
        self._tables = np.random.default_rng(0).permutation(2 * blocks).astype(np.int32).reshape(2, -1) + 1
        self._kv = check.random(2 * blocks + 1, 2, kv_heads, BLOCK_SIZE, dim)
        self._query = check.random(_QUERIES, heads, dim)

    def attend(self, operators: Operators, start: int, end: int, beside: int = 0) -> Tensor:
        """The attention of queries `start` to `end`, in a step with so many tokens of the other sequence."""
        own = PagedChunk(np.ones(end - start, np.int32), self._context + start, self._tables[0], 0)
        other = PagedChunk(np.ones(beside, np.int32), 40, self._tables[1], 0)
        chunks = [other, own] if beside else [own]
        step = Step.of(lay_out(chunks, sum(max(2, len(each.tokens)) for each in chunks), 1), BLOCK_SIZE, self._staging)
        rows = torch.cat((self._query[:beside], self._query[start:end]))
        rows = F.pad(rows, (0, 0, 0, 0, 0, step.tokens.shape[1] - len(rows)))  # a lone token has a dummy beside it
        found = operators.attend(rows, self._kv, step, AttentionShape(rows.shape[2] ** -0.5), None)
        return found[beside : beside + end - start]


def _inferred(part: Iterator[Result]) -> list[Result]:
    """The results of a part that is computed here."""
    with torch.inference_mode():
        return list(part)


def kind_of(operators: Operators) -> str:
    """What operators are called, without their sizes."""
    return operators.name.partition(",")[0]


def _compute(runner: TorchModel, tokens: int) -> None:
    """A step of one sequence without a past, over the scratch block."""
    count = max(2, tokens)
    table = np.zeros(-(-(count + 1) // BLOCK_SIZE), np.int32)
    runner.start(lay_out([PagedChunk(np.ones(tokens, np.int32), 0, table, 1)], count, 1))
    runner.finish()


def main() -> None:
    """Run all parts, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, no measurement")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=Path("bench-results/gpu-check.json"))
    parser.add_argument("--kept", type=Path, default=Path("bench/gpu-check"), help="results to compare with")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="a Python that has vllm, or sglang, installed",
    )
    options = parser.parse_args()
    pythons = {name: Path(python) for name, _, python in (each.partition("=") for each in options.peer)}
    if unknown := sorted({*pythons} - {peer.name for peer in PEERS}):
        sys.exit(f"--peer knows {', '.join(peer.name for peer in PEERS)}, not {', '.join(unknown)}")
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit(
            f"there is no GPU that torch {torch.__version__} can use, so there is nothing to check. "
            "`make gpu-check ARGS='--device cpu'` runs every part on the processor in tiny sizes, and measures nothing"
        )
    check = Check(torch.device(options.device), FULL if on_gpu else TINY, options.seconds, pythons)
    results = list(check.run())
    before: list[dict[str, Any]] = []
    for path in sorted(options.kept.glob("*.json")):
        kept = json.loads(path.read_bytes())
        before = kept["results"] if kept["machine"]["device"] == check.machine["device"] else before
    print_table(check.machine, results, before)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": check.machine, "results": [asdict(result) for result in results]}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    Console().print(f"written to {options.out}; keep it in {options.kept} to compare later runs with it")


if __name__ == "__main__":
    main()
