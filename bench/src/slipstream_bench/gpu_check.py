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
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from slipstream.backend import calibration
from slipstream.backend.self_test import SELF_TEST_BLOCKS
from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, lay_out
from slipstream.backend.torch.backend import operators_for
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Operators
from slipstream.errors import ModelError
from slipstream.tokenizer import Tokenizer
from slipstream_bench.gpu_agents import MODES, Fleet, check_scenarios, generated, model_folder, random_model
from slipstream_bench.gpu_device import FULL, TINY, Device, Sizes
from slipstream_bench.gpu_operators import attention, choices, kind_of, products
from slipstream_bench.gpu_peers import PEERS, Installed, find, serving, turns, write_folder
from slipstream_bench.gpu_report import Result, print_table
from slipstream_bench.peers.base import PeerError

_FAILED = "failed: "
"""What a part's only result says of it then."""


class Check(Device):
    """All that is done with a device; `pythons` have servers to compare with, by their names."""

    def __init__(self, device: torch.device, sizes: Sizes, seconds: float, pythons: Mapping[str, Path]) -> None:
        super().__init__(device, sizes, seconds)
        self._pythons = pythons

    def run(self) -> Iterator[Result]:
        """All parts, the cheapest first; one that fails is named, and the others go on."""
        parts: dict[str, Callable[[], Iterable[Result]]] = {
            "product": lambda: _inferred(products(self)),
            "attention": lambda: _inferred(attention(self)),
            "choice": lambda: _inferred(choices(self)),
            "exactness": self._scenarios,  # on an engine's own thread, which may write to nothing made in that mode
            "step": lambda: _inferred(self._steps()),
            "agents": self._agents,
            "peers": self._peers,
        }
        for part, results in parts.items():
            try:
                yield from results()
            except Exception as error:
                traceback.print_exc()
                yield Result(part, "", "", note=f"{_FAILED}{error}")

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
        try:
            runner.warm_up()
        except ModelError as error:
            result.note = f"can't be used here: {error}"
            return result
        runner.allocate(SELF_TEST_BLOCKS)
        found = calibration.calibrate(runner, lambda _: None)
        result.exact = found.exact
        result.note = f"steps of {found.step_class.sizes[0]} to {found.step_class.sizes[-1]} tokens"
        for tokens in self.sizes.steps:
            result.ms[str(tokens)] = self.ms(partial(_compute, runner, tokens))
        result.floor_ms = self.floor(weights)
        return result

    def _scenarios(self) -> Iterator[Result]:
        """Random scenarios on a whole engine, against a computation from scratch."""
        if not self.timely:
            return
        result = Result("exactness", "scenarios", "")
        shape = next(iter(self.sizes.models.values())) | {"num_hidden_layers": 2}
        until = time.monotonic() + (self.until - time.monotonic()) / 4
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
            with serving(peer, folder, tokenizer, timeout=self.until - time.monotonic()) as endpoint:
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


def _inferred(part: Iterator[Result]) -> Iterator[Result]:
    """The results of a part that is computed here."""
    while True:
        with torch.inference_mode():
            result = next(part, None)
        if result is None:
            return
        yield result


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
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for result in check.run():
        results.append(result)
        print(f"{result.part} {result.case} {result.choice}", file=sys.stderr)
        report = {"machine": check.machine, "results": [asdict(each) for each in results]}
        options.out.write_text(json.dumps(report, indent=2) + "\n")  # what there is, should it not come to an end
    before: list[dict[str, Any]] = []
    for path in sorted(options.kept.glob("*.json")):
        kept = json.loads(path.read_bytes())
        before = kept["results"] if kept["machine"]["device"] == check.machine["device"] else before
    print_table(check.machine, results, before)
    Console().print(f"written to {options.out}; keep it in {options.kept} to compare later runs with it")
    if failed := [result.part for result in results if result.note.startswith(_FAILED)]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
