"""The benchmark for a GPU: rehearsed on the processor with the embedded model, and a part that fails is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def rehearse(out: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(ROOT / "benchmarks" / "gpu.sh"), str(out)], capture_output=True, text=True, check=False,
                          env=os.environ | {"SIZE": "tiny", "DEVICE": "cpu", "PYTHON": sys.executable} | environment)


@pytest.mark.fuzz
def test_every_part_runs_on_the_processor(tmp_path: Path) -> None:
    done = rehearse(tmp_path, TOKENS="5")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["runs"]
    # The same device and type twice: the very same rows. bfloat16 goes another way, not a much longer one.
    assert runs[0]["distance_quartiles"] == runs[1]["distance_quartiles"] == [0, 0, 0]
    assert 0 < runs[2]["distance_quartiles"][1] < 1
    assert all(run["base_bits_per_byte"] < run["bits_per_byte"] for run in runs)
    assert (tmp_path / "distill_tiny.json").is_file()


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    """A Python that always fails stands for a benchmark that does."""
    fails = tmp_path / "python"
    fails.write_text("#!/bin/sh\nexit 7\n", encoding="utf-8")
    fails.chmod(0o755)
    done = rehearse(tmp_path / "out", PYTHON=str(fails))
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line] == [
        "gpu.sh: distill_tiny ended with 7", "gpu.sh: rows ended with 7"]
