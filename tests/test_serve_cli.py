import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from planted import overwrite_last_byte
from tiny_checkpoints import tiny_folder
from tiny_expanded import expanded_pair, mark_verified

from vocabext.cli.main import cli
from vocabext.serve.engine import Server, free_port

FAKE = Path(__file__).parent / "support" / "fake_server.py"

CORPUS = '{"text": "a text of some words"}\n'
HEAVY = {"torch", "transformers", "tokenizers", "vllm", "numpy", "jinja2"}

# `bench` looks for vLLM before anything else.
WITH_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["serve", *map(str, arguments)], prog_name="vocabext")


@pytest.mark.parametrize("verb", ["", "lengths", "predict", "start", "bench", "report"])
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
    assert [line.split()[0] for line in lines if line.strip()][:5] == [
        "lengths", "predict", "start", "bench", "report"]


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


@pytest.mark.parametrize("verb", ["lengths", pytest.param("bench", marks=WITH_VLLM)])
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
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    rest = [] if verb == "start" else [tmp_path, "--corpus", corpus, "-o", tmp_path / "out.json"]
    done = run(verb, tmp_path, *rest)
    assert done.exit_code == 1
    assert done.stderr == "error: vllm is not installed; run: pip install 'vocabext[serve]'\n"


def test_a_place_for_logs_that_cannot_be_is_wrong_usage(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vocabext.serve.engine.require_vllm", lambda: None)
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
    assert json.loads((tmp_path / "report.json").read_text())["artifact"] == "report"
    assert (tmp_path / "report.md").read_text().startswith("# ")
    done = run("report", tmp_path, "-o", tmp_path / "page.md")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)


def test_flags_behind_the_dashes_reach_both_servers(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fake(base: str, expanded: str, corpus: Any, **rest: Any) -> dict[str, Any]:
        seen.update(rest, base=base, expanded=expanded)
        return {"artifact": "bench"}

    monkeypatch.setattr("vocabext.serve.bench.stage.run_bench", fake)
    done = run("bench", "B", "E", "--corpus", corpus, "-o", tmp_path / "out.json", "--pairs", 7, "--json",
               "--", "--max-num-seqs", "4")
    assert done.exit_code == 0, done.output
    assert seen["config"].vllm_flags == ("--max-num-seqs", "4")
    assert (seen["config"].pairs, seen["base"], seen["expanded"]) == (7, "B", "E")
    assert seen["config"].concurrency == (1,)
    assert seen["output"] == tmp_path / "out.json"
    assert json.loads(done.stdout)["artifact"] == "bench"
    assert not list(tmp_path.glob("*.logs"))


def test_logs_are_kept_when_a_bench_fails(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vocabext.errors import ServerError

    def fail(*_: Any, log_folder: Path, **__: Any) -> None:
        (log_folder / "base.log").write_text("the reason")
        raise ServerError("the base server stopped")

    monkeypatch.setattr("vocabext.serve.bench.stage.run_bench", fail)
    done = run("bench", "B", "E", "--corpus", corpus, "-o", tmp_path / "out.json")
    assert done.exit_code == 1
    assert (tmp_path / "out.logs" / "base.log").read_text() == "the reason"
    assert not (tmp_path / "out.json").exists()


def test_a_rate_replaces_the_fixed_number_in_flight(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("vocabext.serve.bench.stage.run_bench",
                        lambda *_, config, **__: seen.append(config) or {"artifact": "bench"})
    for rest in (["--rate", 2], ["--rate", 2, "--concurrency", 4], ["--scenario", "mixed"]):
        assert run("bench", "B", "E", "--corpus", corpus, "-o", tmp_path / "out.json", "--json", *rest).exit_code == 0
    assert [(c.concurrency, c.rate) for c in seen] == [((), (2.0,)), ((4,), (2.0,)), ((1,), ())]
    assert seen[2].scenario == ("mixed",)


def test_a_partial_result_is_taken_up_without_force_and_a_whole_one_is_not(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vocabext.serve.bench.stage.run_bench", lambda *_, **__: {"artifact": "bench"})
    output = tmp_path / "out.json"
    output.write_text('{"artifact": "bench", "state": "partial"}')
    assert run("bench", "B", "E", "--corpus", corpus, "-o", output, "--json").exit_code == 0
    output.write_text('{"artifact": "bench", "state": "complete"}')
    assert run("bench", "B", "E", "--corpus", corpus, "-o", output, "--json").exit_code == 2


def test_an_interruption_says_where_the_results_are(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, output: Path, **__: Any) -> None:
        output.write_text('{"artifact": "bench", "state": "partial"}')
        raise KeyboardInterrupt

    monkeypatch.setattr("vocabext.serve.bench.stage.run_bench", interrupted)
    done = run("bench", "B", "E", "--corpus", corpus, "-o", tmp_path / "out.json")
    assert done.exit_code == 130
    assert "out.json; the same command goes on from there" in done.stderr


def test_a_corpus_of_empty_lines_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.serve.bench.stage.require_vllm", lambda: None)
    base = tiny_folder(tmp_path / "base")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n{"text": " "}\n')
    for verb in ("bench", "lengths"):
        done = run(verb, base, base, "--corpus", empty, "-o", tmp_path / "out.json")
        assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "text" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_prompt_longer_than_the_context_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.serve.bench.stage.require_vllm", lambda: None)
    base = tiny_folder(tmp_path / "base")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "the heart of the muscle " * 200}) + "\n")
    done = run("bench", base, base, "--corpus", corpus, "-o", tmp_path / "out.json", "--prompt-tokens", 5000)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "--prompt-tokens 5000 does not fit into the context of 128 tokens; use at most 112" in done.stderr


# -- predict ------------------------------------------------------------------------------------------------------

def test_a_prediction_without_lengths_or_device_is_wrong_usage(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    done = run("predict", base, "--device", "h100", "--new-tokens", 10)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "pass --lengths (from `serve lengths`) or --saved-share" in done.stderr
    done = run("predict", base, "--new-tokens", 10, "--saved-share", 0.2)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "no device was named; choose from h200" in done.stderr


def test_a_prediction_is_shown_and_written(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    output = tmp_path / "predict.json"
    done = run("predict", base, "--device", "h100", "--new-tokens", 10, "--saved-share", 0.2, "-o", output)
    assert done.exit_code == 0, done.stderr
    assert "text is 1.250 times shorter" in done.stdout
    assert json.loads(output.read_text())["model"]["new_rows"] == 10
    assert run("predict", base, "--device", "h100", "--new-tokens", 1, "--saved-share", 0, "-o", output).exit_code


# -- start --------------------------------------------------------------------------------------------------------

@pytest.fixture
def expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expanded folder that nobody verified, and a vLLM that is a planted server."""
    _, folder = expanded_pair(tmp_path)
    (folder / "verify.json").unlink(missing_ok=True)
    port = free_port()
    server = Server([sys.executable, str(FAKE), str(port), "dies-later", "1"], f"http://127.0.0.1:{port}",
                    tmp_path / "server.log", name="the vLLM server")
    monkeypatch.setattr("vocabext.serve.engine.require_vllm", lambda: None)
    monkeypatch.setattr("vocabext.serve.engine.vllm_server", lambda *_, **__: server)
    return folder


def test_a_folder_that_was_not_verified_is_refused(expanded: Path) -> None:
    done = run("start", expanded)
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "is an expanded model that was not verified (no verify.json); run: vocabext verify" in done.stderr
    assert "or pass --unverified" in done.stderr


def test_a_folder_that_failed_verification_is_refused_with_the_check(expanded: Path) -> None:
    (expanded / "verify.json").write_text(json.dumps({"artifact": "verify", "passed": False, "checks": [
        {"name": "old rows", "verdict": "fail"}, {"name": "config", "verdict": "pass"}]}))
    done = run("start", expanded)
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "failed verification (old rows); run: vocabext verify" in done.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"passed": true}'])
def test_a_damaged_verdict_is_no_verdict(expanded: Path, content: str) -> None:
    (expanded / "verify.json").write_text(content)
    assert "was not verified" in run("start", expanded).stderr


def test_a_verified_folder_and_an_unverified_one_on_demand_are_served(expanded: Path) -> None:
    done = run("start", expanded, "--unverified")
    assert "http://127.0.0.1:" in done.stdout
    assert "new tokens" in done.stdout
    assert done.exit_code == 1  # the planted server stops after a second, which is said
    assert "the vLLM server stopped with exit code 7" in done.stderr


def test_a_passed_verification_opens_the_door(expanded: Path) -> None:
    mark_verified(expanded)
    assert "http://127.0.0.1:" in run("start", expanded, "--check-digests").stdout


def test_weights_overwritten_after_verify_are_refused_with_check_digests(expanded: Path) -> None:
    mark_verified(expanded)
    overwrite_last_byte(expanded / "model.safetensors")
    done = run("start", expanded, "--check-digests")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert f"{expanded} is not as it was verified: model.safetensors has the digest" in done.stderr
    assert "http://127.0.0.1:" in run("start", expanded, "--check-digests", "--unverified").stdout


def test_a_bench_of_an_expanded_folder_that_was_changed_is_refused(expanded: Path, corpus: Path) -> None:
    def bench(*flags: str) -> str:
        output = corpus.with_name("out.json")
        return run("bench", expanded, expanded, "--corpus", corpus, "-o", output, *flags).stderr

    assert "was not verified" in bench()
    mark_verified(expanded)
    (expanded / "tokenizer.json").write_text("{}")
    assert "not as it was verified: tokenizer.json has 2 bytes; " in bench()
    assert "verified" not in bench("--unverified")


@pytest.mark.parametrize(("arguments", "missing"), [("gateway a b", "aiohttp"), ("swap --rollback", "starlette")])
def test_without_the_extra_a_gateway_says_in_one_line_what_to_install(
    tmp_path: Path, arguments: str, missing: str
) -> None:
    code = (f"import sys\nsys.modules[{missing!r}] = None\nfrom vocabext.cli.main import cli\n"
            f"cli.main(['serve', *{arguments!r}.split()])")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
                          env=environment)
    assert (done.returncode, done.stderr.splitlines()) == (
        1, [f"error: {missing} is not installed; run: pip install 'vocabext[serve]'"])
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_served_beside_its_folder_and_a_folder_without_one_is_refused(
    expanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("start", expanded, "--unverified", "--adapter")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "has no adapter; make a folder that has one with: vocabext heal" in done.stderr
    manifest = json.loads((expanded / "vocabext.json").read_text())
    (expanded / "adapter").mkdir()
    (expanded / "adapter" / "adapter_config.json").write_text('{"r": 24}')
    (expanded / "vocabext.json").write_text(json.dumps({**manifest, "adapter": {"folder": "adapter", "merged": False}}))
    seen: list[str] = []
    from vocabext.serve import engine

    planted = engine.vllm_server

    def listening(*arguments: object, **options: Any) -> Server:
        seen.extend(options["flags"])
        return planted(*arguments, **options)

    monkeypatch.setattr("vocabext.serve.engine.vllm_server", listening)
    done = run("start", expanded, "--unverified", "--adapter", "--", "--max-model-len", "64")
    assert "healed" in done.stdout
    assert "adapter/, served by `serve start --adapter` only" in run("start", expanded, "--unverified").stdout
    assert seen == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"healed={expanded / 'adapter'}",
                    "--max-model-len", "64"]
    (expanded / "vocabext.json").write_text(json.dumps({**manifest, "adapter": {"folder": None, "merged": True}}))
    assert "holds its adapter in its weights" in run("start", expanded, "--unverified", "--adapter").stderr
