"""Interrupted at any moment, a run goes on with the same result as an uninterrupted one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens

import vocabext.distill.stage as stage
from vocabext.checkpoint.folder import Rows, load_rows
from vocabext.collect import collect
from vocabext.distill import distill_file
from vocabext.distill.input_rows.engine import GroupFit, fit_rows
from vocabext.distill.input_rows.resume import FinishedGroups
from vocabext.files.jsonl import write_jsonl
from vocabext.model.frozen import FrozenModel
from vocabext.options import CollectConfig, DistillConfig
from vocabext.tokenizer import load_tokenizer

CONFIG = DistillConfig(epochs=2, dtype="float32", device="cpu", cache_gib=0.0, leave_out=0.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_folder(tmp_path / "base")
    found = collect(DOCUMENTS, load_tokenizer(folder), new_tokens(folder),
                    CollectConfig(snippets=8, window=24, min_snippets=2))
    write_jsonl(tmp_path / "snippets.jsonl", "snippets", {}, [r.to_json() for r in found])
    return tmp_path


def run(source: Path, output: str, config: DistillConfig = CONFIG) -> Path:
    distill_file(source / "snippets.jsonl", str(source / "base"), source / output, config)
    return source / output


def count_calls(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Count the groups that are trained; interrupt at one of them, if that is asked for."""
    calls: list[int] = []
    train = fit_rows

    def fit(*inputs: Any, **options: Any) -> GroupFit:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(calls))
        return train(*inputs, **options)

    monkeypatch.setattr(stage, "fit_rows", fit)
    return calls


def assert_same_rows(rows: Rows, whole: Rows) -> None:
    assert torch.equal(rows.input_ND, whole.input_ND)
    assert rows.output_ND is not None
    assert whole.output_ND is not None
    assert torch.equal(rows.output_ND, whole.output_ND)


def timeless(header: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in two runs: all but the seconds that the output rows took."""
    writing = {key: value for key, value in header["writing"].items() if not key.endswith("_seconds")}
    return {**header, "writing": writing}


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_same_result(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        calls = count_calls(patched)
        _, whole, header = load_rows(run(source, "whole.safetensors"))
        total = len(calls)
    assert total >= 3  # groups of one token
    for stop in (1, total - 1):
        name = f"killed-{stop}.safetensors"
        with monkeypatch.context() as patched:
            count_calls(patched, stop_at=stop)
            with pytest.raises(KeyboardInterrupt):
                run(source, name)
        kept = sorted(path.name for path in (source / f".{name}.vocabext-groups").iterdir())
        assert len(kept) == stop
        with monkeypatch.context() as patched:
            calls = count_calls(patched)
            _, rows, again = load_rows(run(source, name))
            assert_same_rows(rows, whole)
            assert timeless(again) == timeless(header)
            assert len(calls) == total - stop
        assert not (source / f".{name}.vocabext-groups").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_stops_in_the_middle_of_a_group_goes_on_with_the_same_result(
    source: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Stop at a random pass of the model, go on, stop again, and so on until it is done."""
    passes: list[int] = []
    stop = [0]
    run_model = FrozenModel._run

    def counted(self: FrozenModel, *inputs: Any, **options: Any) -> torch.Tensor:
        passes.append(len(passes))
        if len(passes) == stop[0]:
            raise KeyboardInterrupt
        return run_model(self, *inputs, **options)

    monkeypatch.setattr(FrozenModel, "_run", counted)
    _, whole, header = load_rows(run(source, "whole.safetensors"))
    total, rng = len(passes), np.random.default_rng(seed)
    stopped = 0
    while not (source / "rows.safetensors").exists():
        passes.clear()
        # Early enough that some stops fall into the first group, late enough to come to an end.
        stop[0] = int(rng.integers(1, total + 1)) if stopped < 20 else 0
        try:
            run(source, "rows.safetensors")
        except KeyboardInterrupt:
            stopped += 1
    assert stopped > 0
    _, rows, again = load_rows(source / "rows.safetensors")
    assert_same_rows(rows, whole)
    assert timeless(again) == timeless(header)


KILLED = """
import sys, time
from pathlib import Path
from vocabext.options import DistillConfig
from vocabext.distill import distill_file
import vocabext.distill.stage as stage
train, groups = stage.fit_rows, []
def fit(*inputs, **options):
    print("group", flush=True)
    groups.append(train(*inputs, **options))
    if len(groups) == 3:
        print("trained", flush=True)
        time.sleep(60)  # it is killed here: trained, and not yet written down
    return groups[-1]
stage.fit_rows = fit
folder = Path(sys.argv[1])
config = DistillConfig(epochs=2, dtype="float32", device="cpu", cache_gib=0.0, leave_out=0.0)
distill_file(folder / "snippets.jsonl", str(folder / "base"), folder / "rows.safetensors", config)
"""


@pytest.mark.slow
def test_a_process_that_the_system_kills_goes_on_with_the_same_result(source: Path) -> None:
    _, whole, header = load_rows(run(source, "whole.safetensors"))
    with subprocess.Popen([sys.executable, "-c", KILLED, str(source)], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(4)] == [*["group\n"] * 3, "trained\n"]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (source / "rows.safetensors").exists()
    assert len(list((source / ".rows.safetensors.vocabext-groups").glob("*.safetensors"))) >= 2
    _, rows, again = load_rows(run(source, "rows.safetensors"))
    assert_same_rows(rows, whole)
    assert timeless(again) == timeless(header)


@pytest.mark.slow
def test_what_other_options_finished_is_not_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        count_calls(patched, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            run(source, "rows.safetensors")
    other = DistillConfig(**{**vars(CONFIG), "epochs": 3})
    _, rows, _ = load_rows(run(source, "rows.safetensors", other))
    _, fresh, _ = load_rows(run(source, "fresh.safetensors", other))
    assert torch.equal(rows.input_ND, fresh.input_ND)


@pytest.mark.slow
def test_what_another_version_finished_is_not_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(stage, "WORK_VERSION", stage.WORK_VERSION - 1)
        count_calls(patched, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            run(source, "rows.safetensors")
    calls = count_calls(monkeypatch)
    run(source, "rows.safetensors")
    every = len(calls)
    run(source, "fresh.safetensors")
    assert len(calls) == 2 * every


def test_a_damaged_group_is_made_again(tmp_path: Path) -> None:
    fit = GroupFit(torch.ones(2, 3), torch.ones(2), torch.zeros(2), torch.tensor([4, 5]))
    groups = FinishedGroups(tmp_path / "groups", "digest")
    assert groups.load("a") is None
    groups.save("a", fit)
    back = groups.load("a")
    assert back is not None
    assert torch.equal(back.shown_G, fit.shown_G)
    assert FinishedGroups(tmp_path / "groups", "other").load("a") is None
    path = next((tmp_path / "groups").iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    assert groups.load("a") is None
    groups.remove()
    assert not (tmp_path / "groups").exists()
