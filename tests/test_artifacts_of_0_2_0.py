"""What version 0.2.0 wrote is read by the version of today."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from gateway_rig import fake_engine, gateway
from safetensors.torch import load_file

from vocabext.cli.main import cli
from vocabext.tokenizer.scheme import OURS

OLD = Path(__file__).parent / "data" / "0.2.0"


def command(*arguments: object) -> str:
    """Run the command line in this process; returns what it wrote to stdout."""
    outcome = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="vocabext")
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy: some verbs write into the folder that they read."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def header(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8").partition("\n")[0]))


def test_its_candidates_are_collected(old: Path, tmp_path: Path) -> None:
    command("collect", old / "candidates.jsonl", "--corpus", old / "corpus.jsonl", "--model", old / "base",
            "--snippets", 6, "--window", 24, "--min-snippets", 2, "-o", tmp_path / "snippets.jsonl")
    found, before = ([json.loads(line) for line in (path / "snippets.jsonl").read_text().splitlines()[1:]]
                     for path in (tmp_path, old))
    # Nobody counted the sections then.
    assert found == [{**line, "sections": 0} for line in before]


def test_its_snippets_are_distilled(old: Path, tmp_path: Path) -> None:
    command("distill", old / "snippets.jsonl", "--model", old / "base", "--epochs", 1, "--dtype", "float32", "--device",
            "cpu", "-o", tmp_path / "rows.safetensors")
    found, before = (load_file(path / "rows.safetensors") for path in (tmp_path, old))
    assert found.keys() == before.keys()
    assert len(found["input"]) >= len(before["input"])
    assert all(found[name].isfinite().all() for name in found)


def test_its_rows_are_patched_to_the_same_weights_and_tokenizer(old: Path, tmp_path: Path) -> None:
    command("patch", old / "rows.safetensors", "--model", old / "base", "-o", tmp_path / "new")
    found, before = (load_file(path / "model.safetensors") for path in (tmp_path / "new", old / "expanded"))
    assert found.keys() == before.keys()
    assert all(found[name].equal(before[name]) for name in before)
    text = (tmp_path / "new" / "tokenizer.json").read_text()
    assert OURS in text
    assert json.loads(text.replace(OURS, "")) == json.loads((old / "expanded" / "tokenizer.json").read_text())


@pytest.mark.slow
def test_its_folder_is_verified_inspected_and_compared(old: Path) -> None:
    command("verify", old / "expanded", "--against", old / "base", "--corpus", old / "heldout.jsonl")
    assert json.loads((old / "expanded" / "verify.json").read_text())["passed"] is True
    assert "4 new tokens" in command("inspect", old / "expanded")
    assert "muscle" in command("diff", old / "base", old / "expanded")


def test_its_folder_is_measured_as_it_was(old: Path) -> None:
    before = json.loads((old / "expanded" / "eval.json").read_text())
    command("eval", old / "expanded", "--against", old / "base", "--corpus", old / "heldout.jsonl", "--prompts", 1,
            "--device", "cpu", "--dtype", "float32")
    found = json.loads((old / "expanded" / "eval.json").read_text())
    for was, row in zip(before["rows"], found["rows"], strict=True):
        assert row["name"] == was["name"]
        assert row["bits_per_byte"] == pytest.approx(was["bits_per_byte"], rel=1e-3)


def test_its_folder_is_taken_back_byte_for_byte(old: Path, tmp_path: Path) -> None:
    command("revert", old / "expanded", "-o", tmp_path / "base")
    names = {path.name for path in (old / "base").iterdir()}
    assert {path.name for path in (tmp_path / "base").iterdir()} == names
    assert not [name for name in names if (tmp_path / "base" / name).read_bytes() != (old / "base" / name).read_bytes()]


def test_its_results_are_put_on_one_page(old: Path, tmp_path: Path) -> None:
    command("serve", "report", old / "expanded", "--lengths", old / "lengths.json", "--bench",
            old / "bench.json", "--eval", old / "expanded" / "eval.json", "--verify", old / "expanded" / "verify.json",
            "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    bench = json.loads((old / "bench.json").read_text())
    assert bench["points"][0]["metrics"]["request_seconds"]["verdict"] in page
    assert " muscle" in page


@pytest.mark.slow
def test_its_gateway_state_goes_on(old: Path, tmp_path: Path) -> None:
    shutil.copy(old / "gateway-state.json", tmp_path / "state.json")
    with (fake_engine(tmp_path, "base") as base, fake_engine(tmp_path, "expanded") as expanded,
          gateway(tmp_path, base.url, expanded.url, "--model-name", "m") as running):
        status = running.status()
        assert (status["expanded_percent"], status["mirror_percent"], status["serial"]) == (50.0, 10.0, 2)
        assert [change["reason"] for change in status["changes"]] == ["a canary", ""]
        assert running.swap("--rollback")["serial"] == 3
