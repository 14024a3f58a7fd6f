"""The benchmark of patching: that it runs on a small checkpoint, measures what it says, and writes its section."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vocabext.checkpoint.folder import open_checkpoint, open_rows
from vocabext.tokenizer import load_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"num_rows": 600, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_kv_heads": 2}


@pytest.fixture(autouse=True)
def benchmarks_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
def test_the_synthetic_base_has_its_size_and_a_full_matrix(tmp_path: Path) -> None:
    from synthetic_checkpoint import write_checkpoint, write_rows

    base = write_checkpoint(tmp_path / "base", num_bytes=800_000, shard_bytes=200_000, **TINY)
    checkpoint, tokenizer = open_checkpoint(base), load_tokenizer(base)
    assert 800_000 <= checkpoint.weight_bytes < 900_000
    assert len(checkpoint.shards) > 4
    assert checkpoint.vocab_size == tokenizer.first_new_id == 600
    assert len(tokenizer.encode("aB")) == 1
    tokens = write_rows(tmp_path / "rows.safetensors", base, 20)
    assert len({token.token for token in tokens}) == 20
    assert open_rows(tmp_path / "rows.safetensors").header["base"]["num_used_ids"] == 600


def test_a_process_is_measured() -> None:
    from patch_speed import measure

    script = "x = bytearray(300_000_000); import time; time.sleep(0.2); print('done')"
    began = time.monotonic()
    found = measure([sys.executable, "-c", script], {})
    assert found["stdout"] == "done\n"
    assert 0.2 <= found["wall_seconds"] <= time.monotonic() - began
    assert found["peak_anonymous_bytes"] > 300_000_000
    assert found["peak_resident_bytes"] > 300_000_000
    with pytest.raises(SystemExit, match=r"exit code 1\n.*no such thing"):
        measure([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


@pytest.mark.slow
def test_ways_run_and_leave_the_base_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import patch_speed
    from synthetic_checkpoint import write_checkpoint, write_rows

    base = write_checkpoint(tmp_path / "base", num_bytes=800_000, shard_bytes=200_000, **TINY)
    write_rows(tmp_path / "rows.safetensors", base, 20)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(sys, "argv", ["patch_speed.py", "--folder", str(tmp_path), "--turns", "1", "--tokens", "20",
                                      "--ways", "cp", "copy", "link", "read",
                                      "-o", str(tmp_path / "found.json")])
    patch_speed.main()
    found = json.loads((tmp_path / "found.json").read_text())
    runs = {run["way"]: run for run in found["runs"]}
    assert list(runs) == ["cp", "copy", "link", "read"]
    assert (runs["copy"]["num_linked"], runs["link"]["num_linked"]) == (0, found["checkpoint"]["shards"] - 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "compiled", "found.json", "rows.safetensors"]
    assert "| `vocabext patch --link copy` |" in capsys.readouterr().out


def found(size: float, **seconds: float) -> dict[str, Any]:
    """What a run with two turns would have found."""
    runs = [{"way": way, "turn": turn, "wall_seconds": value + turn, "sync_seconds": 2.0 if way == "cp" else 0.0,
             "cpu_seconds": 1.0, "peak_anonymous_bytes": 2**20, "peak_resident_bytes": 2**21}
            for way, value in seconds.items() for turn in (0, 1)]
    machine = {"processor": "a chip", "cpus": 2, "memory_bytes": 2**34, "file_system": "ext4", "torch": "2",
               "transformers": "5", "date": "2026-11-25"}
    checkpoint = {"bytes": size, "shards": 3, "rewritten_bytes": size / 10, "new_tokens": 1000}
    return {"machine": machine, "checkpoint": checkpoint, "runs": runs}


def test_the_table_compares_what_is_on_the_disk() -> None:
    from patch_tables import table

    lines = table(found(1e10, start=3.5, cp=7.5, copy=14.5)).splitlines()
    assert lines[2].startswith("| Python, torch and transformers imported | 4.0 (3.5, 4.5) |  |  | 1.0 |")
    assert lines[3].startswith("| `cp -r` | 8.0 (7.5, 8.5) | 10.0 |  | 1.0 | 1 | 2 |")
    assert lines[4].startswith("| `vocabext patch --link copy` | 15.0 (14.5, 15.5) | 15.0 | 1.50 | 1.0 |")


def test_the_bar_for_links_is_the_imports_and_the_shards_with_vocabulary() -> None:
    from patch_tables import table

    lines = table(found(1e10, start=3.5, cp=7.5, link=5.5)).splitlines()
    assert lines[4].startswith("| `vocabext patch` (hard links) | 6.0 (5.5, 6.5) | 6.0 | 0.60 |")
    assert lines[5] == "| the bar for links | 5.0 | 5.0 | 0.50 |  |  |  |"  # 4 s, and a tenth of 10 s
    assert len(table(found(1e10, cp=7.5, link=5.5)).splitlines()) == 4


def test_the_section_takes_the_place_of_the_old_one_and_no_other(tmp_path: Path) -> None:
    from patch_tables import section
    from sections import put_section

    path = tmp_path / "benchmarks.md"
    path.write_text("# Benchmarks\n\n## Before\n\ntext\n")
    put_section(path, section([found(3e10, cp=1.0), found(1e10, cp=1.0)]))
    with path.open("a") as file:
        file.write("\n## Behind\n\nmore\n")
    once = path.read_text()
    assert once.index("## Before") < once.index("## Checkpoints") < once.index("10.0 GB") < once.index("30.0 GB")
    put_section(path, section([found(3e10, cp=1.0), found(1e10, cp=1.0)]))
    assert path.read_text() == once
    put_section(path, section([found(2e10, cp=5.0)]))
    assert "30.0 GB" not in path.read_text()
    assert path.read_text().endswith("\n## Behind\n\nmore\n")
    assert path.read_text().startswith("# Benchmarks\n\n## Before\n\ntext\n\n## Checkpoints\n")


def test_the_published_section_is_what_the_results_say(tmp_path: Path) -> None:
    from patch_tables import section
    from sections import section_of

    results = [json.loads(path.read_text()) for path in sorted(BENCHMARKS.glob("patch_speed*.json"))]
    if not results:
        pytest.skip("nothing was measured yet")
    text = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert section_of(text, "Checkpoints") == section(results)
