import json
from pathlib import Path

import pytest

from vocabext.errors import OutputExistsError, UsageError
from vocabext.serve.bench.client import Load
from vocabext.serve.bench.journal import Journal, Pass, is_partial
from vocabext.serve.bench.scenarios import DECODE, PREFILL, Point

READ, WRITE = Point(PREFILL), Point(DECODE, None, 2.0)
SETTINGS = {"options": {"pairs": 5, "concurrency": (1,)}, "models": {"base": {"name": "b"}}}


def load(seconds: float = 1.0) -> Load:
    return Load(seconds, (seconds, None), (0.5, None), (10, 0), (5, 1), (3, 0), ("reset",), ("answer", ""))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal.open(tmp_path / "bench.json", SETTINGS)
    made.passes = [Pass(0, place, point, load()) for point in (READ, WRITE) for place in range(3)][:5]
    made.save()
    return made


def test_runs_come_back_as_they_were(journal: Journal) -> None:
    again = Journal.open(journal.path, SETTINGS)
    assert [one.to_json() for one in again.passes] == [one.to_json() for one in journal.passes]
    assert again.passes[0].load.request_seconds == (1.0, None)
    assert again.passes[-1].point == WRITE
    assert again.resumed == 1
    assert again.has(0, 1, WRITE)
    assert not again.has(0, 2, WRITE)


def test_a_block_that_was_cut_short_is_dropped_and_counted(journal: Journal) -> None:
    journal.keep_blocks([[(0, place, point) for place in range(3)] for point in (READ, WRITE)])
    assert [one.point for one in journal.passes] == [READ] * 3
    assert journal.dropped == 2


def test_other_settings_are_never_mixed(journal: Journal) -> None:
    other = {**SETTINGS, "options": {"pairs": 7, "concurrency": (1,)}}
    with pytest.raises(UsageError, match=r"of other settings \(pairs was 5, now it is 7\); choose another output"):
        Journal.open(journal.path, other)
    assert Journal.open(journal.path, other, force=True).passes == []


def test_a_complete_result_or_another_file_is_not_touched(tmp_path: Path, journal: Journal) -> None:
    document = json.loads(journal.path.read_text())
    journal.path.write_text(json.dumps({**document, "state": "complete"}))
    other = tmp_path / "other.json"
    other.write_text("precious")
    for path in (journal.path, other):
        with pytest.raises(OutputExistsError):
            Journal.open(path, SETTINGS)
    assert other.read_text() == "precious"


@pytest.mark.parametrize(("document", "expected"), [
    ({"artifact": "bench", "state": "partial"}, True), ({"artifact": "bench", "state": "complete"}, False),
    ({"artifact": "lengths", "state": "partial"}, False), (None, False), ([], False)])
def test_only_a_bench_that_was_cut_short_is_partial(document: object, expected: bool) -> None:
    assert is_partial(document) is expected
