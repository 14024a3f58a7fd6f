import copy
import dataclasses
import html.parser
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vocabext.cli.serve_bench import _show
from vocabext.cli.show import to_plain
from vocabext.errors import UsageError
from vocabext.serve.bench.client import Load
from vocabext.serve.bench.journal import Pass
from vocabext.serve.bench.scenarios import Point
from vocabext.serve.bench.stage import BenchConfig
from vocabext.serve.bench.summary import summarize
from vocabext.serve.model import card_of
from vocabext.serve.predict import (
    DEVICES,
    Lengths,
    ModelShape,
    PredictConfig,
    measured_beside,
    predict_loads,
    predict_memory,
)
from vocabext.serve.report import charts, page, speed

SECTIONS = ("shorter", "examples", "faster", "faithful", "writing", "tokens", "verified", "worse", "method")
WITH_PREDICTION = (*SECTIONS[:3], "predicted", *SECTIONS[3:])
SCHEMA = Path(page.__file__).with_name("report.schema.json")
HOSTILE = "<script>alert('&')</script>"


def lengths_result() -> dict[str, Any]:
    return {
        "artifact": "lengths", "version": 2, "base": "b", "expanded": "e", "corpus": ["held.jsonl"],
        "documents": 200, "characters": 9000, "bytes": 9100, "base_tokens": 2500, "expanded_tokens": 1800,
        "saved_share": 0.28, "saved_share_interval": [0.26, 0.3],
        "base_tokens_per_document": 12.5, "expanded_tokens_per_document": 9.0,
        "base_tokens_per_1000_characters": 277.8, "expanded_tokens_per_1000_characters": 200.0,
        "tokens_per_document_percentiles": {role: dict.fromkeys(("0", "5", "25", "50", "75", "95", "100"), 9.0)
                                            for role in ("base", "expanded")},
        "tokens_per_1000_characters_percentiles": {role: dict.fromkeys(("0", "5", "25", "50", "75", "95", "100"), 200.0)
                                                   for role in ("base", "expanded")},
        "tokens_per_1000_characters_histogram": {"edges": [150.0, 200.0, 250.0, 300.0], "base": [10, 90, 100],
                                                 "expanded": [90, 100, 10]},
        "saved_share_percentiles": {"0": 0, "5": 0.1, "25": 0.2, "50": 0.27, "75": 0.3, "95": 0.5, "100": 0.6},
        "saved_share_histogram": {"edges": [0.0, 0.2, 0.4, 0.6], "documents": [50, 100, 50]},
        "documents_not_shorter": 3, "documents_longer": 0, "invariant": {"documents": 200, "differing": 0, "first": ""},
        "new_tokens": {"total": 10, "used": 8, "share_of_tokens": 0.2, "share_of_characters": 0.4,
                       "most_saving": [{"token": f" {HOSTILE}", "count": 40, "base_tokens": 5, "saved_tokens": 160},
                                       {"token": " heart", "count": 30, "base_tokens": 3, "saved_tokens": 60}],
                       "never_used_count": 2, "never_used": [" zebra", HOSTILE]},
        "cache": {"bytes_per_token": 6144, "base_bytes_per_document": 76800.0, "expanded_bytes_per_document": 55296.0,
                  "saved_bytes_per_document": 21504.0, "context_tokens": 512, "base_context_characters": 1843.2,
                  "expanded_context_characters": 2560.0},
        "passages": [{"document": "held.jsonl:1", "saved_share": 0.4, "percentile": 50,
                      "base_pieces": [["a ", False], [HOSTILE, False], [" he", False], ["art", False]],
                      "expanded_pieces": [["a ", False], [HOSTILE, False], [" heart", True]]}],
        "encoding_seconds": 0.1, "megabytes_per_second": 10.0,
        "provenance": {"command": "vocabext serve lengths b e", "date": "2026-01-02T03:04:05+00:00",
                       "versions": {"python": "3.11"}, "hardware": {"cpu": "a processor", "cores": 2, "gpus": []}},
    }


READ, WRITE, WRITE_8, MIXED_RATE = (Point("prefill"), Point("decode"), Point("decode", 8), Point("mixed", None, 2.0))
POINTS = (READ, WRITE, WRITE_8, MIXED_RATE)


def bench_result(*, speedup: float = 1.5, pairs: int = 5, state: str = "complete", failed: int = 0) -> dict[str, Any]:
    """A result made by our own summary of planted runs: reading is faster, writing is not."""
    choose = random.Random(0)

    def load(point: Point, place: int) -> Load:
        faster = speedup if place == 1 and point.scenario != "decode" else 1.0
        seconds = [(1.0 + 0.1 * i) * choose.uniform(0.995, 1.005) / faster for i in range(3)]
        times = tuple(None if place == 1 and i < failed else s for i, s in enumerate(seconds))
        return Load(sum(seconds), times, tuple(s and s / 10 for s in times), (300,) * 3,
                    (70 if place == 1 else 100,) * 3, (64,) * 3, ("reset",) * (place == 1 and failed > 0), ())

    runs = [Pass(number, place, point, load(point, place)) for number in range(pairs) for point in POINTS
            for place in range(3)]
    options = {**dataclasses.asdict(BenchConfig(pairs=5)), "target_request_seconds": 1.15}
    target = {"ttft_seconds": None, "request_seconds": 1.15}
    return json.loads(json.dumps({
        "artifact": "bench", "version": 2, "state": state, "base": "b", "expanded": "e", "corpus": ["held.jsonl"],
        "device": "cpu", "options": options, "server_flags": ["--no-enable-prefix-caching"],
        "method": ["Measured with care."],
        "tokenize_agreement": {"base": {"prompts": 6, "agreeing": 6}, "expanded": {"prompts": 6, "agreeing": 6}},
        "points": summarize(runs, POINTS, {p.scenario: [300] * 3 for p in POINTS}, target),
        "answers_below_wanted": {"base": 0, "expanded": 0}, "failures": [], "dropped_runs": 0, "resumed": 0,
        "sample_answers": [{"prompt": HOSTILE, "base": "one", "expanded": "two"}],
        "runs": [run.to_json() for run in runs],
        "provenance": {"hardware": {"cpu": "a processor", "cores": 2, "gpus": []}},
    }))


def predict_result() -> dict[str, Any]:
    shape = ModelShape(10**9, 32000, 2048, True, 16, 2048, 65536, 4096)
    lengths, device, config = Lengths(0.25, 0.2), DEVICES["h100"], PredictConfig()
    expanded = dataclasses.replace(shape, rows=33000)
    return json.loads(json.dumps({
        "artifact": "predict", "version": 1, "base": "b", "expanded": "e", "device": dataclasses.asdict(device),
        "options": dataclasses.asdict(config), "lengths": {"length_ratio": 1.25},
        "loads": predict_loads(shape, expanded, lengths, device, config),
        "memory": predict_memory(shape, expanded, lengths, device, config),
        "measured": measured_beside(bench_result()), "notes": ["A bound."], "provenance": {},
    }))


def eval_result() -> dict[str, Any]:
    def row(name: str, bits: float, same: float | None) -> dict[str, Any]:
        return {"name": name, "tokens": 1800, "target_nll_nats": 2.5, "bits_per_byte": bits,
                "greedy_same_share": same, "greedy_common_characters": None}

    return {"artifact": "eval", "version": 1, "documents": 200, "bytes": 9100,
            "rows": [row("base", 1.0, 1.0), row("mean", 1.8, 0.1), row("distilled", 1.04, 0.6)],
            "gap_recovered": 0.95, "gap_recovered_interval": [0.93, 0.97],
            "shorter": {"base_tokens": 2500, "expanded_tokens": 1800, "ratio": 1.39}, "writing": writing_result()}


def writing_result() -> dict[str, Any]:
    def row(name: str, adoption: float | None, false_use: float, per_step: float) -> dict[str, Any]:
        return {"name": name, "merged": {"adoption": None, "false_use": 0.003},
                "places": {"places": 5000, "deserved": 700, "adoption": adoption, "false_use": false_use,
                           "nll_rise_nats": 0.0125},
                "greedy": {"characters_per_step": per_step, "share_of_possible_gain": 0.4321, "identical": 3,
                           "similar": 5, "worse": 8, "examples": [
                               {"kind": "similar", "prompt": HOSTILE, "base": "one", "expanded": "two"}]},
                "sampling": {"kl_nats_per_piece": 0.0421}}

    return {"base": {"prompts": 16, "characters_per_step": 3.25, "characters_per_step_if_all_adopted": 5.5},
            "rows": [row("mean", 0.0, 0.0, 3.3), row("distilled", 0.815, 0.0095, 4.75)]}


def verify_result(*, passed: bool = True) -> dict[str, Any]:
    return {"artifact": "verify", "version": 1, "passed": passed, "checks": [
        {"name": "invariant", "verdict": "pass", "detail": "200 documents"},
        {"name": "old rows", "verdict": "pass" if passed else "fail", "detail": HOSTILE},
        {"name": "corpus", "verdict": "not checked", "detail": "none given"}]}


def everything() -> dict[str, dict[str, Any] | None]:
    return {"lengths": lengths_result(), "bench": bench_result(), "eval": eval_result(), "verify": verify_result(),
            "predict": predict_result()}


class Structure(html.parser.HTMLParser):
    """Checks that elements close in order, and collects ids, tags, links and text."""

    VOID = ("meta", "br", "img", "link", "input", "hr", "circle", "rect", "line", "path")

    def __init__(self, made: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(made)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "line", "path", "circle"):
            return
        assert self.open.pop() == tag


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model-x"
    made.mkdir()
    return made


def test_a_full_report_has_every_section_and_picture(folder: Path) -> None:
    made = page.render_report(folder, everything())
    structure = Structure(made.html)
    assert tuple(structure.ids) == WITH_PREDICTION
    # two of lengths, intervals, three of rounds, bits per byte; four over the load: time, first token, rate, goodput
    assert structure.tags.count("svg") == 2 + 1 + 3 + 1 + 4
    assert made.missing == ()
    assert "Not measured" not in made.html


def test_reading_and_writing_are_shown_apart(folder: Path) -> None:
    made = page.render_report(folder, everything())
    for value in (*map(page.percent, (0.28, 0.4321, 0.815)), "+0.0400", "700", "3.25", "5.50", "4.75", "0.95%",
                  "0.0125", "3 / 5 / 8", "0.0421"):
        assert value in made.html, value
        assert value in made.markdown, value
    assert made.document["writing"] == writing_result()
    assert any("0.95% of held-out places the model writes a new token" in line for line in made.document["worse"])
    results = everything()
    del (results["eval"] or {})["writing"]
    made = page.render_report(folder, results)
    assert "how the model writes new tokens" in made.html
    assert "## Reading and writing" not in made.markdown
    assert made.document["writing"] is None


def test_a_report_needs_nothing_but_itself(folder: Path) -> None:
    made = page.render_report(folder, everything()).html
    structure = Structure(made)
    assert not structure.links
    assert not {"script", "link", "img", "iframe"} & set(structure.tags)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", made)


def test_text_from_files_cannot_become_markup(folder: Path) -> None:
    made = page.render_report(folder, everything()).html
    assert "<script" not in made
    assert made.count("&lt;script&gt;") >= 5  # token, never used, passages, prompt, detail


def test_light_dark_and_print_are_provided_for(folder: Path) -> None:
    made = page.render_report(folder, {}).html
    assert "prefers-color-scheme: dark" in made
    assert "@media print" in made


def test_without_results_every_section_says_how_to_measure(folder: Path) -> None:
    made = page.render_report(folder, page.gather(folder, folder, {}))
    assert tuple(Structure(made.html).ids) == SECTIONS
    assert made.missing == page.ARTIFACTS
    assert made.headline == "Nothing has been measured yet."
    for command in ("vocabext serve lengths", "vocabext serve bench", "vocabext eval", "vocabext verify"):
        assert command in made.html


@pytest.mark.parametrize("name", page.ARTIFACTS)
def test_any_single_result_may_be_missing(folder: Path, name: str) -> None:
    made = page.render_report(folder, {**everything(), name: None, "predict": None})
    assert tuple(Structure(made.html).ids) == SECTIONS
    assert made.missing == (name,)
    assert "Not measured" in made.html


def test_the_headline_carries_its_uncertainty(folder: Path) -> None:
    made = page.render_report(folder, everything())
    found = made.headline
    first = made.document["headline"][0]
    assert first.startswith("Held-out text needs 28.0 % fewer tokens (95 % interval 26.0 % to 30.0 %); in vLLM, read")
    assert first.count(". ") == 0  # one sentence
    assert "reading is 1.50 times as fast (" in found
    assert "writing is not measurably different (" in found
    assert "recovered 95.0 %" in found


def test_without_lengths_the_headline_takes_them_from_the_evaluation(folder: Path) -> None:
    assert "28.0 % fewer tokens." in page.render_report(folder, {"eval": eval_result()}).headline


def test_what_got_worse_is_said() -> None:
    bench = bench_result(speedup=0.8, failed=1)
    bench |= {"resumed": 1, "dropped_runs": 2, "answers_below_wanted": {"base": 0, "expanded": 3}}
    bench["points"][0]["base"]["held_up_runs"] = 2
    lengths = lengths_result()
    lengths["invariant"]["differing"] = 7
    found = "\n".join(page.what_got_worse(None, lengths, [bench], eval_result(), verify_result(passed=False)))
    for line in ("failed verification", "2 of 10 new tokens never occur", "3 of 200 documents are not shorter",
                 "7 documents are not tokenized as pure merges", "Reading (seconds per request) is worse: 0.80",
                 "Writing, 8 at once (seconds per 1000 output characters) is not measurably better",
                 "5 of 15 requests of the load writing to the expanded server failed: reset",
                 "2 runs of the load reading took more than 1.5 times their siblings",
                 "taken up again 1 time(s), and 2 runs were measured again", "3 answers of the expanded model stay",
                 "4.0 % more bits per byte", "40.0 % of the greedy continuations differ"):
        assert line in found, line


def test_a_measurement_that_was_stopped_is_shown_as_such(folder: Path) -> None:
    bench = bench_result(pairs=2, state="partial")
    bench["failures"] = [{"after_runs": 24, "message": "the base server stopped by SIGKILL"}]
    made = page.render_report(folder, {"bench": bench})
    assert "In vLLM (stopped after 2 of 5 rounds), reading cannot be judged, too few rounds" in made.headline
    assert "not complete: the base server stopped by SIGKILL." in made.html
    assert made.document["speed"][0]["state"] == "partial"


def test_a_measurement_without_a_whole_round_is_no_error(folder: Path) -> None:
    made = page.render_report(folder, {"bench": {**bench_result(), "points": [], "state": "partial"}})
    assert "stopped before its first round was complete" in made.headline


def test_the_cost_of_a_million_characters_follows_from_the_price(folder: Path) -> None:
    without = page.render_report(folder, everything())
    assert "Cost of a million characters" not in without.html
    made = page.render_report(folder, everything(), price_per_hour=3.6)
    rows = {row["load"]: row for row in made.document["speed"][0]["cost_per_million_characters"]}
    reading = made.document["speed"][0]["points"][0]["metrics"]["input_characters_per_second"]
    assert rows["reading"]["base"] == pytest.approx(1000 / reading["base"])
    assert rows["reading"]["base_interval"][0] <= rows["reading"]["base"] <= rows["reading"]["base_interval"][1]
    assert rows["reading"]["expanded"] < rows["reading"]["base"]
    assert "At 3.6 per hour" in made.html
    assert "cost of a million characters at 3.6 per hour" in made.markdown


def test_several_corpora_and_machines_stand_side_by_side(folder: Path) -> None:
    other = {**lengths_result(), "corpus": ["independent.jsonl"], "saved_share": 0.07}
    gpu = bench_result()
    gpu["provenance"]["hardware"]["gpus"] = ["a GPU"]
    made = page.render_report(folder, {**everything(), "lengths": [lengths_result(), other],
                                         "bench": [bench_result(), gpu]})
    assert "independent.jsonl" in made.html
    assert "7.0 %" in made.html
    assert "Measured on a GPU" in made.html
    assert "Measured on a processor" in made.html
    assert [row["corpus"] for row in made.document["lengths"]] == ["held.jsonl", "independent.jsonl"]
    assert len(made.document["speed"]) == 2


def test_speed_and_quality_stand_side_by_side(folder: Path) -> None:
    rows = {row["measure"]: row for row in page.render_report(folder, everything()).document["speed_and_quality"]}
    assert rows["reading: seconds per request"]["remark"] == "faster"
    assert rows["bits per byte, reading"]["change"] == "+4.0 %"


@pytest.mark.parametrize("results", [{}, {"lengths": lengths_result()}, {"bench": bench_result(pairs=2)}, everything()])
def test_the_json_report_has_the_form_that_its_schema_says(folder: Path, results: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text())
    document = json.loads(json.dumps(to_plain(page.render_report(folder, results, price_per_hour=2.0).document)))
    jsonschema.validate(document, schema)
    assert document["version"] == schema["properties"]["version"]["const"] == page.REPORT_VERSION
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "version": 99}, schema)
    assert "runs" not in document


def test_the_markdown_says_the_same_and_has_no_markup(folder: Path) -> None:
    made = page.render_report(folder, everything(), price_per_hour=2.0)
    assert made.document["headline"][0] in made.markdown
    for line in made.document["worse"]:
        assert f"- {line}" in made.markdown
    assert "<svg" not in made.markdown
    assert "&lt;" not in made.markdown
    tables = [block.splitlines() for block in made.markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 8
    for lines in tables:
        assert len({line.count("|") - line.count("\\|") for line in lines}) == 1, lines[0]


def test_what_a_comparison_leaves_out_is_in_its_row_and_what_has_no_ratio_among_the_costs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = bench_result(failed=1)
    reading = bench["points"][0]
    reading["metrics"]["request_seconds"]["lost_rounds"] = 1
    del reading["metrics"][speed.GOODPUT]
    reading["not_comparable"] = {speed.GOODPUT: "0 of 10 runs of the base and 2 of 5 did none"}
    made = page.render_report(folder, {"bench": bench})
    rows = {(row["load"], row["measure"]): row["left_out"] for row in speed.speed_rows(bench)}
    assert rows["reading", "seconds per request"] == "1 round, 5 requests"
    assert rows["reading", "input characters per second"] == "nothing"
    assert "<td>1 round, 5 requests</td>" in made.html
    assert "| 1 round, 5 requests |" in made.markdown
    reason = "Reading, requests per second within the target: 0 of 10 runs of the base and 2 of 5 did none."
    assert reason in made.document["worse"]
    jsonschema.validate(made.document, json.loads(SCHEMA.read_text()))
    _show(bench)
    assert "1 round, 5 requests" in capsys.readouterr().out


def test_prefill_is_not_shown_twice(folder: Path) -> None:
    made = page.render_report(folder, {"bench": bench_result()})
    assert [row["measure"] for row in speed.speed_rows(bench_result()) if row["load"] == "reading"] == [
        "seconds per request", "input characters per second", "requests per second within the target"]
    assert made.html.count("<td>writing</td>") == 5  # four measures in the table, one row of goodput


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_results_are_found_in_the_model_and_beside_the_report(folder: Path, tmp_path: Path) -> None:
    write(folder / "eval.json", eval_result())
    write(tmp_path / "lengths.json", lengths_result())
    found = page.gather(folder, tmp_path, {})
    assert found["eval"] == eval_result()
    assert found["lengths"] == [lengths_result()]
    assert (found["bench"], found["verify"]) == ([], None)


def test_a_named_result_wins(folder: Path, tmp_path: Path) -> None:
    write(folder / "eval.json", eval_result())
    other = write(tmp_path / "other.json", {**eval_result(), "documents": 7})
    found = page.gather(folder, tmp_path, {"eval": [other]})["eval"]
    assert found is not None
    assert found["documents"] == 7


@pytest.mark.parametrize(("content", "message"), [
    ("{", "is no JSON document"), ([1], "holds None, but 'eval' is needed here"),
    ({"artifact": "bench", "version": 1}, "holds 'bench', but 'eval' is needed here"),
    ({"artifact": "eval", "version": 9}, "has format version 9, this vocabext reads 1"),
])
def test_a_wrong_result_is_one_clear_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        page.read_result(write(tmp_path / "x.json", content), "eval")


def test_a_missing_folder_or_file_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the model folder .* does not exist"):
        page.gather(tmp_path / "nowhere", tmp_path, {})
    with pytest.raises(UsageError, match=r"gone\.json does not exist"):
        page.gather(folder, tmp_path, {"bench": [tmp_path / "gone.json"]})


def test_the_card_of_a_base_model_says_so(folder: Path) -> None:
    assert card_of(folder) == [("vocabulary", "as published (no vocabext.json)")]


def test_noise_that_is_wilder_than_the_picture_stays_inside() -> None:
    wild = charts.Estimate("a", 1.0, (0.001, 900.0), 500.0, "1.00×")
    svg = charts.intervals([wild], label="x", low_text="slower", high_text="faster")
    numbers = [float(n) for n in re.findall(r' (?:x|x1|x2|cx)="(-?[\d.]+)"', svg)]
    assert min(numbers) >= 0
    assert max(numbers) <= charts.WIDTH


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0, 0.05), (0.93, 1.61), (0, 68), (3, 3)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 13
    assert all(low <= tick <= high for tick in found)


def test_results_are_not_changed_by_rendering(folder: Path) -> None:
    results = everything()
    before = copy.deepcopy(results)
    page.render_report(folder, results)
    assert results == before
