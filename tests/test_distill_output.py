"""`distill` and output rows: what is made, what is refused, what is said and what the header records."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens
from tiny_families import tiny_family

import vocabext.distill.stage as stage
from vocabext.checkpoint.folder import Rows, load_rows
from vocabext.cli.distill import distill as command
from vocabext.collect import collect
from vocabext.distill import distill_file
from vocabext.errors import UsageError
from vocabext.files.jsonl import write_jsonl
from vocabext.options import CollectConfig, DistillConfig
from vocabext.progress import Task, no_progress
from vocabext.tokenizer import load_tokenizer

QUICK = {"epochs": 1, "dtype": "float32", "device": "cpu", "leave_out": 0.0}


def snippets(folder: Path) -> Path:
    """Write the snippets of a base folder beside it."""
    found = collect(DOCUMENTS, load_tokenizer(folder), new_tokens(folder),
                    CollectConfig(snippets=8, window=24, min_snippets=2))
    path = folder.parent / "snippets.jsonl"
    write_jsonl(path, "snippets", {}, [r.to_json() for r in found])
    return path


def made(folder: Path, said: list[str], **options: Any) -> tuple[Rows, dict[str, Any]]:
    output = folder.parent / "rows.safetensors"
    config = DistillConfig(**{**QUICK, **options})
    distill_file(snippets(folder), str(folder), output, config, force=True, say=said.append)
    _, rows, header = load_rows(output)
    return rows, header


@pytest.mark.slow
def test_a_model_that_keeps_one_matrix_gets_no_output_rows_and_says_so(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "base", "gemma2")
    for kind in ("fit", "none"):
        with pytest.raises(UsageError, match=f"--output-rows is '{kind}', but vLLM ties the head of Gemma2ForCausalLM"):
            made(folder, [], output_rows=kind)
    said: list[str] = []
    rows, header = made(folder, said)
    assert rows.output_ND is None
    assert said[:1] == [header["writing"]["why"]]
    assert header["writing"]["kind"] == "input"
    assert "vLLM ties the head of Gemma2ForCausalLM" in said[0]
    said.clear()
    _, header = made(folder, said, output_rows="input")
    assert header["writing"] == {"kind": "input", "why": None}
    assert not any("output rows" in line for line in said)


def test_a_head_with_a_bias_is_not_fitted_to_and_that_is_said(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "base", "phi")
    with pytest.raises(UsageError, match="--output-rows is 'fit', but the head of PhiForCausalLM has a bias"):
        made(folder, [], output_rows="fit")
    said: list[str] = []
    rows, header = made(folder, said)
    assert rows.output_ND is not None
    assert said[:1] == [header["writing"]["why"]]
    assert header["writing"]["kind"] == "none"


def test_the_mean_says_that_it_makes_no_output_rows(tmp_path: Path) -> None:
    said: list[str] = []
    rows, header = made(tiny_folder(tmp_path / "base"), said, method="mean")
    assert rows.output_ND is None
    assert said[:1] == [header["writing"]["why"]]
    assert "--method mean makes no output rows" in said[0]


def test_text_that_leaves_nothing_to_judge_by_makes_silent_rows(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    rows, header = made(folder, [], writing_places=1)
    assert rows.output_ND is not None
    assert bool((rows.output_ND == rows.output_ND[0]).all())
    assert (header["writing"]["kind"], header["writing"]["written"]) == ("fit", 0)
    assert {token["silent"] for token in header["writing"]["silent"]} == {"no place to judge it by"}
    rows, header = made(folder, [], writing_places=1, output_rows="none")
    assert rows.output_ND is not None
    assert bool((rows.output_ND == rows.output_ND[0]).all())
    assert header["writing"]["kind"] == "none"


def test_the_command_lists_tokens_that_nothing_could_be_judged_of(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    arguments = [str(snippets(folder)), "--model", str(folder), "-o", str(tmp_path / "rows.safetensors"),
                 "--epochs", "1", "--writing-places", "1", "--dtype", "float32", "--device", "cpu",
                 "--leave-out", "0"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "does not write them (3 of 3)" in result.stdout
    assert "no place to judge it by" in result.stdout
    result = CliRunner().invoke(command, [*arguments, "--force", "--method", "mean", "--json"])
    assert json.loads(result.stdout)["writing"]["why"] in result.stderr


def test_a_bound_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = stage.make_output_rows

    def wrong(*inputs: Any, **options: Any) -> stage.OutputRows:
        found = make(*inputs, **options)
        assert (found.bound, found.bound_met) == (0.01, True)
        assert found.held_out is not None
        worse = {**vars(found.held_out), "false_use": 0.0234}
        return stage.replace(found, held_out=type(found.held_out)(**worse), bound_met=False)

    monkeypatch.setattr(stage, "make_output_rows", wrong)
    said: list[str] = []
    _, header = made(tiny_folder(tmp_path / "base"), said)
    assert said[0].startswith("tokens without two different texts (one snippet, or windows of one text): 1; nothing ")
    assert said[1:] == ["new tokens are written wrongly at 2.34% of held-out places, above the 1.00% of --false-use; "
                    "collect more snippets, or pass --output-rows none"]
    assert (header["writing"]["bound"], header["writing"]["bound_met"]) == (0.01, False)


@pytest.mark.slow
def test_options_of_output_rows_keep_the_finished_input_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = tiny_folder(tmp_path / "base"), list[int]()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    train = stage.fit_rows

    def counted(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        return train(*inputs, **options)

    monkeypatch.setattr(stage, "fit_rows", counted)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "make_output_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made(folder, [])
    assert calls
    calls.clear()
    kept, _ = made(folder, [], output_rows="none", false_use=0.05, writing_places=50, leave_out=9.0)
    assert not calls
    fresh, _ = made(folder, [])
    assert calls
    assert torch.equal(kept.input_ND, fresh.input_ND)


def test_the_states_of_output_rows_are_stated_before_the_work(tmp_path: Path) -> None:
    folder, said = tiny_folder(tmp_path / "base"), list[str]()

    def progress(description: str, /, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
        said.append(description)
        return nullcontext(no_progress("").__enter__())

    result = distill_file(snippets(folder), str(folder), tmp_path / "rows.safetensors", DistillConfig(**QUICK),
                          progress=progress)  # type: ignore[arg-type]
    assert result.memory is not None
    assert result.output is not None
    assert result.memory.writing_bytes > result.output.places * 64 * 4 > 0
    assert "; for the output rows, afterwards: " in said[0]
