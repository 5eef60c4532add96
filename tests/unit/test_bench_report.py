"""Reports, from results made up so that what they come to can be told by hand."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slipstream_bench import html, tables
from slipstream_bench.floor import pass_seconds, turn_seconds
from slipstream_bench.plots import COLOURS, lines, of_all, stacked_bars
from slipstream_bench.records import FloorRates, Result, RunFile, ServerDescription, Settings, TurnResult
from slipstream_bench.report import REFERENCE, ServerSummary, Summary, rows, summary

PEER = "other:best"
RATES = FloorRates(
    bytes_per_second=1000.0,
    operations_per_second=1000.0,
    layer_bytes=60,
    layer_weights=2,
    head_bytes=30,
    head_weights=5,
    kv_bytes_per_token=1,
)


def turn(number: int, seconds: float, **fields: Any) -> TurnResult:
    """Turns that begin at 100 prompt tokens, with 20 new ones each after an answer of 10."""
    prompt = 100 + 30 * number
    known = {
        "agent": 0,
        "turn": number,
        "tool": "commit",
        "seconds": seconds,
        "first_token_seconds": seconds / 2,
        "prompt_tokens": prompt,
        "cached_tokens": prompt - 20 if number else 0,
        "output_tokens": 10,
        "valid": True,
    }
    return TurnResult.model_validate({**known, **fields})


def result(server: str, round_number: int, *seconds: float, workload: str = "agent-6", **fields: Any) -> Result:
    turns = [turn(number, each, **fields) for number, each in enumerate(seconds)]
    return Result(workload=workload, round=round_number, server=server, seconds=sum(seconds), turns=turns)


def summary_of(folder: Path, *results: Result, rates: FloorRates | None = None) -> Summary:
    file = RunFile(folder)
    for record in results:
        file.add(record)
    if rates is not None:
        file.add(rates)
    return summary(file)


def only(known: Summary, server: str) -> ServerSummary:
    (workload,) = known.workloads
    return next(each for each in workload.servers if each.server == server)


def test_later_turns_leave_out_the_first_and_rounds_have_a_median_each(tmp_path: Path) -> None:
    rounds = [(9.0, 0.1, 0.2, 0.3), (9.0, 0.4, 0.4, 0.4), (9.0, 0.3, 0.3, 0.9)]
    known = only(summary_of(tmp_path, *(result(REFERENCE, n, *each) for n, each in enumerate(rounds))), REFERENCE)
    assert known.later is not None
    assert (known.later.median, known.later.least, known.later.most) == pytest.approx((300, 200, 400))
    assert known.first_turn is not None
    assert known.first_turn.median == pytest.approx(9000)
    assert known.per_output_token is not None
    assert known.per_output_token.median == pytest.approx((1.2 / 30) * 1e3)


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    known = summary_of(
        tmp_path,
        *(result(REFERENCE, n, 1.0, each) for n, each in enumerate((0.1, 0.2, 0.4))),
        *(result(PEER, n, 1.0, each) for n, each in enumerate((0.4, 0.4, 0.4))),
    )
    ratio = only(known, PEER).ratio
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.most) == pytest.approx((2, 1, 4))
    assert only(known, REFERENCE).ratio is None


def test_a_round_that_one_server_failed_in_is_no_pair(tmp_path: Path) -> None:
    failed = result(PEER, 1, 1.0, 99.0).model_copy(update={"error": "it died"})
    known = summary_of(tmp_path, *(result(REFERENCE, n, 1.0, 0.1) for n in range(2)), result(PEER, 0, 1.0, 0.3), failed)
    peer = only(known, PEER)
    assert peer.ratio is not None
    assert peer.ratio.most == pytest.approx(3)
    assert (peer.rounds, peer.errors, peer.turns) == (1, ["it died"], 2)


def test_a_server_that_failed_is_shown_with_its_error(tmp_path: Path) -> None:
    failed = Result(workload="agent-6", round=0, server=PEER, error="illegal instruction <avx>")
    known = summary_of(tmp_path, result(REFERENCE, 0, 1.0, 0.1), failed)
    (workload,) = known.workloads
    assert [PEER, "failed"] in [cells[:2] for cells in rows(workload)]
    assert "illegal instruction <avx>" in tables.markdown(known)
    assert "illegal instruction &lt;avx&gt;" in html.page(known, of_all(known))
    assert any("illegal instruction <avx>" in str(each) for each in tables.terminal(known, 80))


def test_what_was_recomputed_is_compared_with_what_was_new(tmp_path: Path) -> None:
    exact = only(summary_of(tmp_path / "exact", result(REFERENCE, 0, 1, 1, 1)), REFERENCE)
    assert (exact.recomputed_tokens, exact.beyond_delta) == (20, 0)
    forgetful = only(summary_of(tmp_path / "none", result(REFERENCE, 0, 1, 1, 1, cached_tokens=0)), REFERENCE)
    assert (forgetful.recomputed_tokens, forgetful.beyond_delta) == (145, 160 - 20)


def test_an_answer_that_the_client_wrote_anew_is_new(tmp_path: Path) -> None:
    turns = [
        turn(0, 1),
        turn(1, 1, rewritten="answer", cached_tokens=100),
        turn(2, 1, rewritten="results", cached_tokens=5),
    ]
    known = only(summary_of(tmp_path, Result(workload="rewrite", round=0, server=REFERENCE, turns=turns)), REFERENCE)
    assert known.beyond_delta == 0


def test_what_a_server_does_not_tell_is_not_guessed(tmp_path: Path) -> None:
    known = summary_of(tmp_path, result(REFERENCE, 0, 1, 1, cached_tokens=None))
    assert only(known, REFERENCE).recomputed_tokens is None
    assert rows(known.workloads[0])[0][-2:] == ["not reported", "not reported"]


def test_the_later_turns_of_repeats_are_those_of_the_agents_after_the_first(tmp_path: Path) -> None:
    first, again = result(REFERENCE, 0, 5.0, 4.0).turns, [turn(n, 0.01, agent=1) for n in range(2)]
    known = summary_of(tmp_path, Result(workload="repeat", round=0, server=REFERENCE, turns=[*first, *again]))
    server = only(known, REFERENCE)
    assert server.later is not None
    assert server.later.median == pytest.approx(10)
    assert [point.turn for point in server.points] == [1, 2, 3, 4]


def test_agents_who_take_turns_are_one_point(tmp_path: Path) -> None:
    turns = [turn(number, 0.1 * (agent + 1), agent=agent) for number in range(2) for agent in range(3)]
    server = only(summary_of(tmp_path, Result(workload="fleet-8", round=0, server=REFERENCE, turns=turns)), REFERENCE)
    assert [(point.turn, point.milliseconds) for point in server.points] == [
        (1, pytest.approx(200)),
        (2, pytest.approx(200)),
    ]


def test_a_pass_is_as_slow_as_memory_or_as_arithmetic() -> None:
    assert pass_seconds(RATES, tokens=1, context=10) == pytest.approx((60 + 30 + 10) / 1000)
    assert pass_seconds(RATES, tokens=100, context=10) == pytest.approx(2 * (2 * 100 + 5) / 1000)
    assert turn_seconds(RATES, delta=100, free=3, context=10) == pytest.approx(0.41 + 3 * 0.1)


def test_a_pass_multiplies_queries_with_the_keys_and_values_of_the_context() -> None:
    rates = RATES.model_copy(update={"operations_per_pair": 10})
    pairs = 98 + 99 + 100
    assert pass_seconds(rates, 3, 100) == pytest.approx((2 * (2 * 3 + 5) + 10 * pairs) / 1000)


def test_the_floor_counts_the_delta_and_the_tokens_that_the_grammar_leaves_open(tmp_path: Path) -> None:
    report = {
        "prompt_tokens": 110,
        "delta_tokens": 20,
        "completion_tokens": 10,
        "forced_tokens": 7,
        "forward_passes": 2,
        "queue_ms": 1.0,
        "prefill_ms": 300.0,
        "decode_ms": 500.0,
    }
    known = summary_of(tmp_path, result(REFERENCE, 0, 9.0, 1.6, 1.6, report=report), rates=RATES)
    (workload,) = known.workloads
    assert workload.floor is not None
    assert workload.floor.later.median == pytest.approx(4 * 200)  # four passes of 60 + 30 + 110 bytes
    assert workload.floor.ratio.median == pytest.approx(2)
    text = tables.markdown(known)
    assert "Floor: 800 ms, 1/2.00." in text
    assert "| floor" not in text
    server = only(known, REFERENCE)
    assert server.passes_per_token == pytest.approx(0.2)
    assert server.points[1].parts == pytest.approx({"queue": 1, "prefill": 300, "decode": 500, "other": 799})
    assert "What a turn of ours is spent on" in html.page(known, of_all(known))


def test_the_page_is_whole_and_asks_for_nothing_else(tmp_path: Path) -> None:
    described = ServerDescription(server=PEER, description="other --fast", notes=["weights in bf16"])
    known = summary_of(tmp_path, result(REFERENCE, 0, 1, 1, 1), result(PEER, 0, 2, 2, 2))
    known = known.model_copy(update={"commands": ["slipstream bench run --out 'a & b'"], "servers": [described]})
    page = html.page(known, of_all(known))
    ElementTree.fromstring(re.sub(r"<!doctype html>|<meta\b[^>]*>", "", page).replace("<br>", "<br/>"))
    assert not re.search(r"(src|href)=[\"'][^#]", page)
    for title in ("Time of a turn", "Time by length of the context", "Prompt tokens computed"):
        assert page.count(f"<h3>{title}</h3>") == 1
    for text in ("a &amp; b", "other --fast", "weights in bf16"):
        assert text in page
    assert "other --fast" in tables.markdown(known)


def test_lines_that_are_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    def axis(plot: str) -> list[str]:
        return re.findall(r">([\d,]+)</text>", plot)

    near = lines({"a": [(1, 100), (2, 120)], "b": [(1, 1000), (2, 900)]}, x_label="turn", y_label="ms")
    far = lines({"a": [(1, 100), (2, 120)], "b": [(1, 9000), (2, 8000)]}, x_label="turn", y_label="ms")
    assert "0" in axis(near)
    assert "0" not in axis(far)
    assert {"100", "1,000"} <= set(axis(far))


def test_a_server_keeps_its_colour_where_another_has_no_line() -> None:
    plot = lines({"a": [], "b": [(1, 10), (2, 20)]}, x_label="turn", y_label="tokens")
    assert COLOURS[1] in plot
    assert COLOURS[0] not in plot


def test_all_commands_that_made_a_run_are_named_once(tmp_path: Path) -> None:
    file = RunFile(tmp_path)
    for command in ("slipstream bench run -s vllm", "slipstream bench run", "slipstream bench run -s vllm"):
        file.add(Settings(model="m", seed=0, constraint="tools", command=command))
    known = summary(RunFile(tmp_path))
    assert known.commands == ["slipstream bench run -s vllm", "slipstream bench run"]
    assert "    slipstream bench run -s vllm\n    slipstream bench run\n" in tables.markdown(known)


def test_markdown_has_a_row_for_each_server_under_as_many_columns(tmp_path: Path) -> None:
    known = summary_of(tmp_path, result(REFERENCE, 0, 1, 1), result(PEER, 0, 2, 2))
    lines = [line for line in tables.markdown(known).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[2].strip() for line in lines[2:]] == [REFERENCE, PEER]


def test_markdown_has_ranges_of_what_matters_most_only(tmp_path: Path) -> None:
    rounds = [result(server, n, 1 + n, 1 + n * at) for n in range(2) for at, server in enumerate((REFERENCE, PEER))]
    lines = [line for line in tables.markdown(summary_of(tmp_path, *rounds)).splitlines() if line.startswith("|")]
    titles, _, _, peer = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert [title for title, cell in zip(titles, peer, strict=True) if "(" in cell] == ["later turns, ms", "to ours"]


def drawn(svg: str, style: str) -> list[list[tuple[float, float]]]:
    """The corners of all shapes of a style."""
    shapes = re.findall(rf'<path d="([^"]+)"[^>]*style="{style}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", shape)] for shape in shapes]


def test_markdown_names_servers_whose_calls_are_not_valid(tmp_path: Path) -> None:
    known = summary_of(tmp_path, result(REFERENCE, 0, 1, 1), result(PEER, 0, 2, 2, valid=False))
    assert f"All calls are valid, except 2 of 2 of {PEER} in agent-6." in tables.markdown(known)
    sound = summary_of(tmp_path / "sound", result(REFERENCE, 0, 1, 1))
    assert "All calls are valid.\n" in tables.markdown(sound)


def test_a_line_goes_through_its_points_and_up_is_more() -> None:
    plot = lines({"a": [(2, 20), (1, 10)], "b": [(1, 5), (2, 5)]}, x_label="turn", y_label="ms")
    rising, level = (drawn(plot, f'fill: none;[^"]*stroke: {colour}')[0] for colour in COLOURS[:2])
    assert rising[0][0] < rising[1][0]
    assert rising[0][1] > rising[1][1]
    assert level[0][1] == level[1][1] > rising[0][1]
    assert plot == lines({"a": [(2, 20), (1, 10)], "b": [(1, 5), (2, 5)]}, x_label="turn", y_label="ms")


def test_bars_stand_on_each_other() -> None:
    plot = stacked_bars(
        {1: {"prefill": 30, "decode": 60}, 2: {"prefill": 30, "decode": 30}}, x_label="turn", y_label="ms"
    )
    bars = [corners for colour in COLOURS[:2] for corners in drawn(plot, f"fill: {colour}")[:2]]
    heights = [max(y for _, y in corners) - min(y for _, y in corners) for corners in bars]
    assert heights == pytest.approx([heights[0], heights[0], 2 * heights[0], heights[0]], abs=0.2)


@pytest.mark.parametrize("values", [[(1.0, 0.0)], [(1.0, 3.0)], [(0.0, 0.0), (5.0, 0.0)]])
def test_a_plot_of_one_point_or_of_nothing_but_zeros_is_a_plot(values: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(lines({"a": values}, x_label="x", y_label="y"))


def test_markdown_shows_how_time_grows_with_the_context_where_it_grows(tmp_path: Path) -> None:
    short = summary_of(tmp_path / "short", result(REFERENCE, 0, 1, 1))
    assert "![" not in tables.markdown(short)
    growing = summary_of(tmp_path / "long", result(REFERENCE, 0, *[1.0] * 12, workload="growth"))
    assert "](growth-time-by-context.svg)" in tables.markdown(growing)
