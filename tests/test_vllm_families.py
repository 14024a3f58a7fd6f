"""Families in vLLM: base and expanded folder write the same greedily. See `vllm_families.py`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm_families
from tiny_families import FAMILIES
from vllm_families import NUM_TOKENS, PROMPTS, compare

# A bias in the head, and tables of several lengths: what is least like other models. Starts take ten seconds each.
FEW = ("phi", "gemma3n-shorter-table")
ALL = "VOCABEXT_ALL_FAMILIES"  # set in the environment, all are tried, which takes ten minutes
NOT_SERVED = {"gemma3-wrapped", "gemma4-wrapped", "llava"}  # by a vLLM without what reads images


@pytest.mark.vllm
@pytest.mark.fuzz
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_families_write_the_same_in_vllm(tmp_path: Path) -> None:
    families = tuple(FAMILIES) if os.environ.get(ALL) else FEW
    done = subprocess.run([sys.executable, vllm_families.__file__, str(tmp_path), *families], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: result for line in done.stdout.splitlines() if line.startswith('{"')
             for name, result in json.loads(line).items()}
    assert list(found) == list(families)
    assert {name for name, result in found.items() if "refused" in result} <= NOT_SERVED
    served = [result for result in found.values() if "refused" not in result]
    assert all(result["same"] == len(PROMPTS) and result["behind new tokens"] == NUM_TOKENS for result in served), found


Written = list[tuple[list[int], list[dict[int, float]]]]


def given(monkeypatch: pytest.MonkeyPatch, new: list[int], gap: float) -> dict[str, Any]:
    """Compare a base that writes [5, 5] with a folder that writes something else, or the same."""
    def written(folder: Path, prompts: list[list[int]]) -> Written:
        ids = new if folder.name == "new" else [5, 5]
        return [(ids, [{5: -1.0, 6: -1.0 - gap}] * 2) for _ in prompts]

    monkeypatch.setattr(vllm_families, "written", written)
    return compare(Path("base"), Path("new"))


def test_what_is_written_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(monkeypatch, [5, 5], 1.0) == {"same": 3, "ties": 0, "behind new tokens": 2}
    assert given(monkeypatch, [5, 6], 1e-6) == {"same": 3, "ties": 3, "behind new tokens": 2}
    assert given(monkeypatch, [5, 6], 1.0) == {"differs": "prompt 0, place 1: 5 in the base, 6 here"}
    assert "differs" in given(monkeypatch, [7, 5], 1e-6)


def test_a_base_that_vllm_refuses_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(folder: Path, prompts: list[list[int]]) -> Written:
        raise ValueError("no such\narchitecture")

    monkeypatch.setattr(vllm_families, "written", written)
    assert compare(Path("base"), Path("new")) == {"refused": "ValueError: no such architecture"}
