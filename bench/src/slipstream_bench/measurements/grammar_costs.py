"""What grammars cost over real vocabularies: loading a vocabulary, compiling the grammar of a request, a token's mask.

    python -m slipstream_bench.measurements.grammar_costs

The tools are the six of the bench's coding agent, in the form of each vocabulary's own family. Masks are those of
answers of random tokens, such as the grammar allows. The real vocabularies are fetched; no model's weights are needed.
All times are the processor's, on one core: who else uses the machine makes less of a difference to them.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.models.families import FAMILIES
from tests.real_vocabularies import vocabulary

from slipstream.chat import Tool, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.engine.grammar import Grammar, GrammarCompiler
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.processor import this_processor
from slipstream.sampling.sampler import masked
from slipstream.tokenizer import Tokenizer
from slipstream_bench.coding import TOOLS

Mode = Literal["required", "auto"]
MODES: tuple[Mode, ...] = ("required", "auto")


class Vocabulary(NamedTuple):
    """A `tokenizer.json`, and what else a server knows of the model."""

    name: str
    path: Path
    template: str
    width: int
    """Of the logits."""
    eos: str


class Costs:
    """Seconds of the processor, by what they were spent on."""

    def __init__(self) -> None:
        self.reading: list[float] = []
        """The tokenizer's file."""
        self.loading: list[float] = []
        """The vocabulary into the compiler, and a grammar of a letter."""
        self.compiling: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        self.masks: dict[Mode, list[float]] = {mode: [] for mode in MODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=4, help="random answers to a grammar")
    parser.add_argument("--tokens", type=int, default=60, help="the longest of them")
    parser.add_argument("--families", nargs="+", default=["qwen3", "gemma3"], choices=[each.name for each in FAMILIES])
    options = parser.parse_args()
    console = Console(width=120)
    known = [_default(), *(_of_family(name) for name in options.families)]
    costs = {each.name: Costs() for each in known}
    for number in track(range(options.rounds), "Rounds", console=console):
        for each in known:
            measure(each, costs[each.name], number, options.answers, options.tokens)
    processor = this_processor()
    console.print(f"{processor.name} ({', '.join(processor.instruction_sets)}), {processor.cores} cores")
    console.print(_table(known, costs))


def measure(known: Vocabulary, costs: Costs, seed: int, answers: int, most_tokens: int) -> None:
    """One round over a vocabulary, which is loaded anew."""
    started = time.process_time()
    tokenizer = Tokenizer.from_file(known.path)
    costs.reading.append(time.process_time() - started)
    dialect = Dialect(known.template, tokenizer)
    stop = tokenizer.token_id(known.eos)
    assert stop is not None
    compiler = GrammarCompiler(tokenizer, vocab_size=known.width, stop_token_ids=(stop,), ends=dialect.ends)
    started = time.process_time()
    compiler.compile('start: "a"', param="tools")
    costs.loading.append(time.process_time() - started)
    tools = tuple(Tool(**tool["function"]) for tool in TOOLS)
    for mode in MODES:
        started = time.process_time()
        written = dialect.grammar(ToolUse(tools, mode), None, opens_reasoning=False)
        assert written is not None
        grammar = compiler.compile(written.source, param="tools")
        costs.compiling[mode].append(time.process_time() - started)
        rng = np.random.default_rng(seed)
        for _ in range(answers):
            costs.masks[mode] += _masks(grammar, known.width, stop, rng, most_tokens)


def _masks(grammar: Grammar, width: int, stop: int, rng: np.random.Generator, most_tokens: int) -> list[float]:
    """The time that each mask of a random answer took."""
    constraint = grammar.constraint()
    seconds: list[float] = []
    while len(seconds) < most_tokens and not constraint.finished:
        if forced := constraint.forced():
            constraint.accept(forced)
            continue
        logits = rng.normal(size=width).astype(np.float32)
        started = time.process_time()
        mask = constraint.mask()
        seconds.append(time.process_time() - started)
        token = int(masked(logits, mask).argmax())
        if token == stop:
            break
        constraint.accept([token])
    return seconds


def _default() -> Vocabulary:
    model = ModelStore().ensure(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    eos = tokenizer.token_bytes(model.manifest.stop_token_ids[-1]).decode()
    return Vocabulary(model.name, model.tokenizer_path, model.chat_template or "", model.manifest.vocab_size, eos)


def _of_family(name: str) -> Vocabulary:
    family = next(each for each in FAMILIES if each.name == name)
    return Vocabulary(name, vocabulary(family.vocabulary), family.template, family.width, family.eos)


def _table(known: list[Vocabulary], costs: dict[str, Costs]) -> Table:
    table = Table("", *(f"{each.name}, {each.width:,} tokens" for each in known))
    each = [costs[vocabulary.name] for vocabulary in known]

    def row(title: str, cells: list[str]) -> None:
        table.add_row(title, *cells)

    row("reading the tokenizer", [_milliseconds(cost.reading) for cost in each])
    row("loading it into the compiler", [_milliseconds(cost.loading) for cost in each])
    for mode in MODES:
        row(f"compiling, {mode}", [_milliseconds(cost.compiling[mode]) for cost in each])
    for mode in MODES:
        row(f"a mask, {mode}: median, 99 of 100", [_microseconds(cost.masks[mode]) for cost in each])
    return table


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:,.0f} ms"


def _microseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e6:,.0f} us, {np.percentile(seconds, 99) * 1e6:,.0f} us"


if __name__ == "__main__":
    main()
