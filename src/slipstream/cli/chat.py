"""`slipstream chat`: talk to a model in the terminal, and see what each turn costs."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from slipstream.cli.loading import load_engine
from slipstream.cli.options import KVMemory, Model, Threads, readable_errors
from slipstream.config import FLAGS, EngineConfig
from slipstream.errors import InvalidRequestError
from slipstream.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from slipstream.embedded import Session
    from slipstream.engine import SamplingParams, TurnCounters

HELP = "/fork tries another way and /back returns from it, /reset starts anew, /quit or Ctrl-D ends."


def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    kv_memory: KVMemory = "1GiB",
    threads: Threads = None,
) -> None:
    """Talk to a model in the terminal.

    After each answer a line says how many tokens of the conversation were reused from memory, how many were new, how
    many were generated, and how long each part took. Ctrl-C stops an answer.
    """
    from slipstream.engine import SamplingParams

    console = Console()
    with readable_errors():
        config = EngineConfig.model_validate({"kv_memory": kv_memory, "threads": threads})
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
        with load_engine(model, config, console) as engine:
            console.print(f"[bold]{engine.model.name}[/]  [dim]{HELP}[/]", highlight=False)
            _converse(engine.session(system), params, console)


def _converse(session: "Session", params: "SamplingParams", console: Console) -> None:
    start = session.fork()
    branches: list[Session] = []
    while True:
        try:
            text = console.input("[bold green]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        match text:
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                session = start.fork()
                branches.clear()
            case "/fork":
                branches.append(session)
                session = session.fork()
            case "/back" if branches:
                session = branches.pop()
            case _ if text.startswith("/"):
                console.print(HELP, style="dim")
            case _:
                _turn(session, text, params, console)


def _turn(session: "Session", text: str, params: "SamplingParams", console: Console) -> None:
    """Ask, print the answer as it comes, and say what it cost."""
    try:
        with session.stream(text, params=params) as outputs:
            for output in outputs:
                console.print(output.text, end="", markup=False, highlight=False, soft_wrap=True)
                if output.counters is not None:
                    console.print(f"\n{_cost(output.counters)}", style="dim", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n(stopped; this turn is not part of the conversation)", style="dim")
    except InvalidRequestError as error:
        console.print(f"Error: {error.worded(FLAGS)}", style="red", markup=False)


def _cost(counters: "TurnCounters") -> str:
    tokens = max(1, counters.completion_tokens)
    return (
        f"{counters.reused_tokens} tokens reused, {counters.delta_tokens} new in {counters.prefill_ms:.0f} ms, "
        f"{counters.completion_tokens} generated in {counters.decode_ms:.0f} ms "
        f"({counters.forward_passes} forward passes, {counters.decode_ms / tokens:.1f} ms a token)"
    )
