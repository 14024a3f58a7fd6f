import copy
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from serve import pictures, report
from serve.compare import Series, compare
from vocabext.errors import UsageError

SECTIONS = ("shorter", "examples", "faster", "faithful", "tokens", "verified", "worse", "method")
HOSTILE = "<script>alert('&')</script>"


def lengths_result() -> dict[str, Any]:
    return {
        "artifact": "lengths", "version": 1, "base": "b", "expanded": "e", "corpus": ["held.jsonl"],
        "documents": 200, "characters": 9000, "bytes": 9100, "base_tokens": 2500, "expanded_tokens": 1800,
        "saved_share": 0.28, "saved_share_interval": [0.26, 0.3],
        "base_tokens_per_document": 12.5, "expanded_tokens_per_document": 9.0,
        "base_tokens_per_1000_characters": 277.8, "expanded_tokens_per_1000_characters": 200.0,
        "saved_share_percentiles": {"0": 0, "5": 0.1, "25": 0.2, "50": 0.27, "75": 0.3, "95": 0.5, "100": 0.6},
        "saved_share_histogram": {"edges": [0.0, 0.2, 0.4, 0.6], "documents": [50, 100, 50]},
        "documents_not_shorter": 3, "documents_longer": 0, "invariant": {"documents": 200, "differing": 0, "first": ""},
        "new_tokens": {"total": 10, "used": 8, "share_of_tokens": 0.2, "share_of_characters": 0.4,
                       "most_saving": [{"token": f" {HOSTILE}", "count": 40, "base_tokens": 5, "saved_tokens": 160},
                                       {"token": " heart", "count": 30, "base_tokens": 3, "saved_tokens": 60}],
                       "never_used": [" zebra", HOSTILE]},
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


def bench_result(*, speedup: float = 1.5) -> dict[str, Any]:
    base = [[1.0, 1.01, 0.99]] * 5

    def metrics(name: str, factor: float) -> dict[str, Any]:
        import numpy as np

        first = Series(np.asarray(base), np.ones((5, 3)))
        other = Series(np.asarray(base) / factor, np.ones((5, 3)))
        return {name: compare(first, other, first).to_json(), "ttft_seconds": compare(first, other, first).to_json()}

    def role(requests: int, tokens: int) -> dict[str, Any]:
        return {"requests": requests, "failed_requests": 0, "errors": [], "prompt_tokens_per_run": tokens,
                "output_tokens_per_run": 3, "output_characters_per_run": 12}

    def scenario(name: str, main: str, factor: float, output_tokens: int) -> dict[str, Any]:
        return {"name": name, "main_metric": main, "requests_per_run": 3, "prompt_characters": 900,
                "output_tokens_per_request": output_tokens, "base": role(30, 300), "expanded": role(15, 210),
                "metrics": metrics(main, factor)}

    return json.loads(json.dumps({
        "artifact": "bench", "version": 1, "base": "b", "expanded": "e", "corpus": ["held.jsonl"], "device": "cpu",
        "server_flags": ["--no-enable-prefix-caching"], "method": ["Measured with care."],
        "tokenize_agreement": {"base": {"prompts": 6, "agreeing": 6}, "expanded": {"prompts": 6, "agreeing": 6}},
        "scenarios": [scenario("prefill", "seconds_per_text", speedup, 1),
                      scenario("decode", "seconds_per_1000_output_characters", 1.0, 64)],
        "sample_answers": [{"prompt": HOSTILE, "base": "one", "expanded": "two"}], "runs": [], "provenance": {},
    }))


def eval_result() -> dict[str, Any]:
    def row(name: str, bits: float, same: float | None) -> dict[str, Any]:
        return {"name": name, "tokens": 1800, "target_nll_nats": 2.5, "bits_per_byte": bits,
                "greedy_same_share": same, "greedy_common_characters": None}

    return {"artifact": "eval", "version": 1, "documents": 200, "bytes": 9100,
            "rows": [row("base", 1.0, 1.0), row("mean", 1.8, 0.1), row("distilled", 1.04, 0.6)],
            "gap_recovered": 0.95, "gap_recovered_interval": [0.93, 0.97],
            "shorter": {"base_tokens": 2500, "expanded_tokens": 1800, "ratio": 1.39}}


def verify_result(*, passed: bool = True) -> dict[str, Any]:
    return {"artifact": "verify", "version": 1, "passed": passed, "checks": [
        {"name": "invariant", "verdict": "pass", "detail": "200 documents"},
        {"name": "old rows", "verdict": "pass" if passed else "fail", "detail": HOSTILE},
        {"name": "corpus", "verdict": "not checked", "detail": "none given"}]}


def everything() -> dict[str, dict[str, Any] | None]:
    return {"lengths": lengths_result(), "bench": bench_result(), "eval": eval_result(), "verify": verify_result()}


class Structure(html.parser.HTMLParser):
    """Checks that elements close in order, and collects ids, tags, links and text."""

    VOID = ("meta", "br", "img", "link", "input", "hr", "circle", "rect", "line", "path")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)
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
    page = report.render_report(folder, everything())
    structure = Structure(page.html)
    assert tuple(structure.ids) == SECTIONS
    assert structure.tags.count("svg") == 5  # lengths, intervals, two of rounds, bits per byte
    assert page.missing == ()
    assert "Not measured" not in page.html


def test_a_report_needs_nothing_but_itself(folder: Path) -> None:
    page = report.render_report(folder, everything()).html
    structure = Structure(page)
    assert not structure.links
    assert not {"script", "link", "img", "iframe"} & set(structure.tags)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", page)


def test_text_from_files_cannot_become_markup(folder: Path) -> None:
    page = report.render_report(folder, everything()).html
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5  # token, never used, passages, prompt, detail


def test_light_dark_and_print_are_provided_for(folder: Path) -> None:
    page = report.render_report(folder, {}).html
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_without_results_every_section_says_how_to_measure(folder: Path) -> None:
    page = report.render_report(folder, dict.fromkeys(report.ARTIFACTS))
    assert tuple(Structure(page.html).ids) == SECTIONS
    assert page.missing == report.ARTIFACTS
    assert page.headline == "Nothing has been measured yet."
    for command in ("vocabext serve lengths", "vocabext serve bench", "vocabext eval", "vocabext verify"):
        assert command in page.html


@pytest.mark.parametrize("name", report.ARTIFACTS)
def test_any_single_result_may_be_missing(folder: Path, name: str) -> None:
    page = report.render_report(folder, {**everything(), name: None})
    assert tuple(Structure(page.html).ids) == SECTIONS
    assert page.missing == (name,)
    assert "Not measured" in page.html


def test_the_headline_carries_its_uncertainty(folder: Path) -> None:
    found = report.render_report(folder, everything()).headline
    assert "28.0 % fewer tokens (95 % interval 26.0 % to 30.0 %)" in found
    assert "reading is 1.50 times as fast (" in found
    assert "writing is not measurably different (" in found
    assert "recovered 95.0 %" in found


def test_without_lengths_the_headline_takes_them_from_the_evaluation(folder: Path) -> None:
    assert "28.0 % fewer tokens." in report.render_report(folder, {"eval": eval_result()}).headline


def test_what_got_worse_is_said() -> None:
    bench = bench_result(speedup=0.8)
    bench["scenarios"][1]["expanded"] |= {"failed_requests": 2, "errors": ["reset"]}
    lengths = lengths_result()
    lengths["invariant"]["differing"] = 7
    found = "\n".join(report.what_got_worse(None, lengths, bench, eval_result(), verify_result(passed=False)))
    for line in ("failed verification", "2 of 10 new tokens never occur", "3 of 200 documents are not shorter",
                 "7 documents are not tokenized as pure merges", "Reading (seconds per text) is slower: 0.800×",
                 "is not measurably faster", "2 of 15 requests of the decode load to the expanded server failed: reset",
                 "4.0 % more bits per byte", "40.0 % of the greedy continuations differ"):
        assert line in found


def test_prefill_is_not_shown_twice(folder: Path) -> None:
    page = report.render_report(folder, {"bench": bench_result()}).html
    assert page.count("<td>reading</td>") == 1
    assert page.count("<td>writing</td>") == 2


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_results_are_found_in_the_model_and_beside_the_report(folder: Path, tmp_path: Path) -> None:
    write(folder / "eval.json", eval_result())
    write(tmp_path / "lengths.json", lengths_result())
    found = report.gather(folder, tmp_path, {})
    assert found["eval"] == eval_result()
    assert found["lengths"] == lengths_result()
    assert (found["bench"], found["verify"]) == (None, None)


def test_a_named_result_wins(folder: Path, tmp_path: Path) -> None:
    write(folder / "eval.json", eval_result())
    other = write(tmp_path / "other.json", {**eval_result(), "documents": 7})
    found = report.gather(folder, tmp_path, {"eval": other})["eval"]
    assert found is not None
    assert found["documents"] == 7


@pytest.mark.parametrize(("content", "message"), [
    ("{", "is no JSON document"), ([1], "holds None, but 'eval' is needed here"),
    ({"artifact": "bench", "version": 1}, "holds 'bench', but 'eval' is needed here"),
    ({"artifact": "eval", "version": 9}, "has format version 9, this vocabext reads 1"),
])
def test_a_wrong_result_is_one_clear_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        report.read_result(write(tmp_path / "x.json", content), "eval")


def test_a_missing_folder_or_file_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the model folder .* does not exist"):
        report.gather(tmp_path / "nowhere", tmp_path, {})
    with pytest.raises(UsageError, match=r"gone\.json does not exist"):
        report.gather(folder, tmp_path, {"bench": tmp_path / "gone.json"})


def test_the_card_of_a_base_model_says_so(folder: Path) -> None:
    assert report.card_of(folder) == [("vocabulary", "as published (no vocabext.json)")]


def test_noise_that_is_wilder_than_the_picture_stays_inside() -> None:
    wild = pictures.Estimate("a", 1.0, (0.001, 900.0), 500.0, "1.00×")
    svg = pictures.intervals([wild], label="x", low_text="slower", high_text="faster")
    numbers = [float(n) for n in re.findall(r' (?:x|x1|x2|cx)="(-?[\d.]+)"', svg)]
    assert min(numbers) >= 0
    assert max(numbers) <= pictures.WIDTH


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0, 0.05), (0.93, 1.61), (0, 68), (3, 3)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = pictures.ticks(low, high)
    assert 1 <= len(found) <= 13
    assert all(low <= tick <= high for tick in found)


def test_results_are_not_changed_by_rendering(folder: Path) -> None:
    results = everything()
    before = copy.deepcopy(results)
    report.render_report(folder, results)
    assert results == before
