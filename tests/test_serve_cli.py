import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vocabext.cli.main import cli

CORPUS = '{"text": "a text of some words"}\n'
HEAVY = {"torch", "transformers", "tokenizers", "vllm", "numpy", "jinja2"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["serve", *map(str, arguments)], prog_name="vocabext")


@pytest.mark.parametrize("verb", ["", "lengths", "start", "bench", "report"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = ("import sys\nfrom vocabext.cli.main import cli\n"
            f"try: cli.main(['serve', *'{verb}'.split(), '--help'])\n"
            "except SystemExit as end: assert not end.code\n"
            f"loaded = {HEAVY!r} & set(sys.modules)\nassert not loaded, loaded")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_verbs_are_listed_in_the_order_of_use() -> None:
    lines = run("--help").stdout.split("Commands:")[1].split("\n")
    assert [line.split()[0] for line in lines if line.strip()] == ["lengths", "start", "bench", "report"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(CORPUS)
    return path


@pytest.mark.parametrize("verb", ["lengths", "bench"])
def test_an_output_that_exists_is_kept(verb: str, tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text("precious")
    done = run(verb, "BASE", "EXPANDED", "--corpus", corpus, "-o", output)
    assert (done.exit_code, output.read_text()) == (2, "precious")
    assert "exists already" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("verb", ["lengths", "bench"])
@pytest.mark.parametrize(("what", "message"), [
    ("model", "the model folder nowhere/at-all/base does not exist"), ("corpus", "gone.jsonl")])
def test_what_is_missing_is_named_in_one_line(
    verb: str, what: str, message: str, tmp_path: Path, corpus: Path
) -> None:
    source = corpus if what == "model" else tmp_path / "gone.jsonl"
    done = run(verb, "nowhere/at-all/base", "nowhere", "--corpus", source, "-o", tmp_path / "out.json")
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


@pytest.mark.parametrize("verb", ["start", "bench"])
def test_a_missing_vllm_is_named_with_its_command(
    verb: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    rest = [] if verb == "start" else [tmp_path, "--corpus", corpus, "-o", tmp_path / "out.json"]
    done = run(verb, tmp_path, *rest)
    assert done.exit_code == 1
    assert done.stderr == "error: vllm is not installed; run: pip install 'vocabext[serve]'\n"


def test_a_place_for_logs_that_cannot_be_is_wrong_usage(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.require_vllm", lambda: None)
    done = run("start", tmp_path, "--log", tmp_path / "no" / "server.log")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "no does not exist; create it" in done.stderr
    done = run("bench", "BASE", "EXPANDED", "--corpus", corpus, "-o", tmp_path / "out.json", "--logs", corpus)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "is a file, but the logs need a folder; choose another with --logs" in done.stderr


def test_an_option_out_of_range_is_wrong_usage(tmp_path: Path, corpus: Path) -> None:
    done = run("bench", "BASE", "EXPANDED", "--corpus", corpus, "-o", tmp_path / "out.json", "--pairs", 0)
    assert done.exit_code == 2
    assert "--pairs is 0; it must be at least 1" in done.stderr


def test_a_report_is_written_whole_and_says_what_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    done = run("report", tmp_path, "-o", output)
    assert done.exit_code == 0
    assert done.stdout == "Nothing has been measured yet.\n"
    assert "bench was not measured" in done.stderr
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert run("report", tmp_path, "-o", output).exit_code == 2
    assert run("report", tmp_path, "-o", output, "--force").exit_code == 0


def test_flags_behind_the_dashes_reach_both_servers(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fake(base: str, expanded: str, corpus: Any, **rest: Any) -> dict[str, Any]:
        seen.update(rest, base=base, expanded=expanded)
        return {"scenarios": [], "tokenize_agreement": {}, "artifact": "bench"}

    monkeypatch.setattr("serve.bench.run_bench", fake)
    done = run("bench", "B", "E", "--corpus", corpus, "-o", tmp_path / "out.json", "--pairs", 7, "--json",
               "--", "--max-num-seqs", "4")
    assert done.exit_code == 0, done.output
    assert seen["config"].vllm_flags == ("--max-num-seqs", "4")
    assert (seen["config"].pairs, seen["base"], seen["expanded"]) == (7, "B", "E")
    assert json.loads(done.stdout)["artifact"] == json.loads((tmp_path / "out.json").read_text())["artifact"] == "bench"
    assert not list(tmp_path.glob("*.logs"))


def test_logs_are_kept_when_a_bench_fails(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vocabext.errors import ServerError

    def fail(*_: Any, log_folder: Path, **__: Any) -> None:
        (log_folder / "base.log").write_text("the reason")
        raise ServerError("the base server stopped")

    monkeypatch.setattr("serve.bench.run_bench", fail)
    done = run("bench", "B", "E", "--corpus", corpus, "-o", tmp_path / "out.json")
    assert done.exit_code == 1
    assert (tmp_path / "out.logs" / "base.log").read_text() == "the reason"
    assert not (tmp_path / "out.json").exists()
