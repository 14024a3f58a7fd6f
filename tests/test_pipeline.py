"""`run`: all stages on a tiny model; what is up to date is skipped; outputs are not overwritten."""

import contextvars
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import default_dtype, tiny_folder, tiny_model
from tiny_expanded import DOCUMENTS
from tiny_families import tiny_family
from tiny_run import tiny_run, write_corpus

from vocabext import run as pipeline
from vocabext.checkpoint.folder import load_rows
from vocabext.cli.run import run as command
from vocabext.corpus import Document
from vocabext.errors import (
    BadCheckpointError,
    CheckpointError,
    CorpusError,
    OutputExistsError,
    TokenizerError,
    UsageError,
)
from vocabext.files.atomic import temporary_path
from vocabext.files.folders import locked
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.options import CollectConfig, DistillConfig, EvalConfig, MineConfig
from vocabext.run import HELD_OUT_EVERY, RunConfig, StageOutcome, is_held_out, run

STAGES = ["mine", "collect", "distill", "patch", "verify", "eval"]


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 300)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path)


def states(outcomes: list[StageOutcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


@pytest.mark.slow
def test_all_stages_run_once_and_then_are_up_to_date(config: RunConfig) -> None:
    assert states(run(config)) == dict.fromkeys(STAGES, "made")
    assert json.loads((config.output / "verify.json").read_text())["passed"] is True
    assert [row["name"] for row in json.loads((config.output / "eval.json").read_text())["rows"]] == [
        "base", "mean", "distilled"]
    before = (config.output / "model.safetensors").stat().st_mtime_ns
    assert states(run(config)) == dict.fromkeys(STAGES, "up to date")
    assert (config.output / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_what_is_not_read_of_a_corpus_is_said_once_and_recorded_by_every_stage(
    config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    more = [Document(str(i), f"{DOCUMENTS[i % len(DOCUMENTS)].text} {i}") for i in range(60)]
    write_corpus(folder / "a.jsonl", [*DOCUMENTS, *more, Document("empty", " ")])
    (folder / "b.pdf").write_text("no text")
    said: list[str] = []
    run(replace(config, corpus=(str(folder),), heldout=()), say=said.append)
    unread, empty = f"unknown format .pdf: 1 (such as {folder}/b.pdf)", f"empty record: 1 (such as {folder}/a.jsonl:"
    assert sum(unread in line for line in said) == sum(empty in line for line in said) == 1
    work = tmp_path / "new-work"
    headers = [json.loads((work / name).read_text().splitlines()[0]) for name in ("candidates.jsonl", "snippets.jsonl")]
    for recorded in (*headers, json.loads((config.output / "eval.json").read_text())):
        assert recorded["left_out"]["unknown format .pdf"] == {"count": 1, "names": [f"{folder}/b.pdf"]}
        assert recorded["left_out"]["empty record"]["count"] == 1
    verified = json.loads((config.output / "verify.json").read_text())["checks"]
    (detail,) = [check["detail"] for check in verified if check["name"] == "invariant on the corpus"]
    assert "; not read: " in detail
    assert unread in detail


@pytest.mark.slow
def test_a_changed_option_reruns_its_stage_and_those_behind_it(config: RunConfig) -> None:
    run(config)
    changed = replace(config, evaluate=replace(config.evaluate, prompts=0))
    assert states(run(changed)) == {**dict.fromkeys(STAGES, "up to date"), "eval": "made"}
    changed = replace(config, distill=replace(config.distill, epochs=1), force=True)
    assert states(run(changed)) == {**dict.fromkeys(STAGES, "made"), "mine": "up to date", "collect": "up to date"}


@pytest.mark.slow
def test_a_changed_corpus_reruns_everything(config: RunConfig) -> None:
    run(config)
    corpus = Path(config.corpus[0])
    corpus.write_text(corpus.read_text() * 2)
    assert states(run(replace(config, force=True))) == dict.fromkeys(STAGES, "made")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vocabext.distill.stage.fit_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    work = config.output.with_name("new-work")
    assert sorted(p.name for p in work.iterdir()) == ["candidates.jsonl", "run.json", "snippets.jsonl"]
    assert not config.output.exists()
    assert states(run(config)) == {**dict.fromkeys(STAGES, "made"), "mine": "up to date", "collect": "up to date"}


@pytest.mark.slow
def test_a_run_that_died_before_it_wrote_down_that_it_had_patched_goes_on(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(work: pipeline._Pipeline, stage: pipeline._Stage) -> None:
        if stage.name == "patch":
            raise KeyboardInterrupt
        record(work, stage)

    record = pipeline._Pipeline.record
    with monkeypatch.context() as patched:
        patched.setattr(pipeline._Pipeline, "record", die)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert (config.output / "vocabext.json").exists()
    with pytest.raises(OutputExistsError):  # another run would not have made it
        run(replace(config, mine=replace(config.mine, budget=3)))
    temporary_path(config.output.with_name("new-work") / "rows.safetensors").write_text("half")
    temporary_path(config.output / "verify.json").write_text("half")
    assert states(run(config)) == {**dict.fromkeys(STAGES, "made"), **dict.fromkeys(STAGES[:3], "up to date")}
    assert not list(config.output.parent.rglob(".*.tmp"))


def test_a_second_run_into_one_output_or_working_folder_is_told_and_touches_nothing(config: RunConfig) -> None:
    work = config.output.with_name("new-work")
    work.mkdir()
    live = temporary_path(work / "rows.safetensors")
    live.write_text("half")
    for path in (config.output, work):
        ours = contextvars.Context()  # as another process, this thread holds no lock there
        with locked(path), pytest.raises(UsageError, match=r"another process \(\d+ on \S+\) is writing .*new"):
            ours.run(run, config)
        assert live.read_text() == "half"
    assert sorted(path.name for path in config.output.parent.glob(".*")) == []


def test_an_output_made_by_something_else_is_refused_before_any_work(config: RunConfig) -> None:
    config.output.mkdir()
    with pytest.raises(OutputExistsError, match="--force"):
        run(config)
    assert not config.output.with_name("new-work").exists()


@pytest.mark.slow
def test_an_output_made_with_other_options_is_refused(config: RunConfig) -> None:
    run(config)
    with pytest.raises(OutputExistsError, match="--force"):
        run(replace(config, mine=replace(config.mine, budget=3)))


@pytest.mark.slow
def test_the_mean_needs_no_snippets(config: RunConfig) -> None:
    outcomes = run(replace(config, distill=replace(config.distill, method="mean")))
    assert list(states(outcomes)) == ["mine", "distill", "patch", "verify", "eval"]
    assert json.loads((config.output / "vocabext.json").read_text())["method"] == "mean"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_16_bit_model_does_not_depend_on_the_default_dtype(
        config: RunConfig, tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_folder(tmp_path / "half", tied=False, dtype=dtype)
    config = replace(config, model=str(base), distill=replace(config.distill, method="mean"),
                     evaluate=replace(config.evaluate, prompts=0))
    run(config)
    expected = (config.output / "model.safetensors").read_bytes()
    with default_dtype(dtype):  # as transformers sets it while it builds a model
        run(replace(config, output=tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_without_held_out_text_some_documents_are_kept_from_mining(config: RunConfig, tmp_path: Path) -> None:
    documents = [Document(str(i), f"{DOCUMENTS[i % 3].text} number {i}") for i in range(60)]
    kept = [d for d in documents if is_held_out(d)]
    assert 0 < len(kept) < len(documents) * 3 / HELD_OUT_EVERY
    write_corpus(tmp_path / "corpus.jsonl", documents)
    run(replace(config, heldout=()))
    assert json.loads((config.output / "eval.json").read_text())["documents"] == len(kept)
    header = json.loads((tmp_path / "new-work" / "candidates.jsonl").read_text().splitlines()[0])
    assert header["documents"] == len(documents) - len(kept)


@pytest.mark.slow
def test_a_corpus_too_small_to_hold_out_from_is_not_evaluated(config: RunConfig, tmp_path: Path) -> None:
    documents = [d for i in range(40) if not is_held_out(d := Document(str(i), f"{DOCUMENTS[0].text} {i}"))][:2]
    write_corpus(tmp_path / "corpus.jsonl", documents)
    outcomes = run(replace(config, heldout=()))
    assert states(outcomes)["eval"].startswith("not made: the corpus is too small")
    assert states(outcomes)["verify"] == "made"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("none", False), ("fit", True)])
def test_verify_passes_where_the_least_likely_base_rows_are_zero(config: RunConfig, kind: str, tied: bool) -> None:
    """As reserved rows are; none of these, nor of those that nobody trained, is what silent tokens are made of."""
    model, zero = tiny_model(tied=tied), [200, 201, 202]
    with torch.no_grad():
        model.lm_head.weight[zero] = 0.0
        model.lm_head.weight[[210, 211]] = model.lm_head.weight[210] * 1e-6
    model.save_pretrained(config.model)
    run(replace(config, distill=replace(config.distill, output_rows=kind, false_use=1e-9)))
    assert json.loads((config.output / "verify.json").read_text())["passed"] is True
    writing = load_rows(config.output.with_name("new-work") / "rows.safetensors")[2]["writing"]
    assert len(writing["silent_ids"]) == 2
    assert not {0, 1, *zero, 210, 211} & set(writing["silent_ids"])


@pytest.mark.slow
def test_documents_that_are_held_out_are_not_mined(config: RunConfig, tmp_path: Path) -> None:
    heard: list[str] = []
    write_corpus(tmp_path / "corpus.jsonl", [*DOCUMENTS, DOCUMENTS[2]])
    run(replace(config, distill=replace(config.distill, method="mean")), say=heard.append)
    assert "2 documents of the corpus are in --heldout, too; they are not mined" in heard
    header = json.loads((tmp_path / "new-work" / "candidates.jsonl").read_text().splitlines()[0])
    assert header["documents"] == 2


@pytest.mark.slow
def test_a_bad_checkpoint_fails_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.stage.MAX_NORM_RATIO", 1e-6)
    with pytest.raises(BadCheckpointError, match="new rows plausible"):
        run(config)
    assert json.loads((config.output / "verify.json").read_text())["passed"] is False


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"corpus": ("missing.jsonl",)}, UsageError, "missing.jsonl"),
    ({"text_field": "body"}, CorpusError, "body"),
    ({"model": "./nowhere"}, UsageError, "nowhere"),
    ({"output": Path("no/such/folder")}, UsageError, "no/such"),
    ({"mine": MineConfig(dedup=False, budget=100_000, min_count=4)}, UsageError, "100000"),
    ({"output": Path()}, UsageError, "is there already"),
    ({"work": Path("no/such/work")}, UsageError, "no/such"),
    ({"work": Path(__file__)}, UsageError, "is a file; choose another with --work"),
    ({"distill": DistillConfig(device="cuda:99")}, UsageError, "cuda:99"),
    ({"distill": DistillConfig(target_layer="99")}, UsageError, "a number from 1 to 1"),
])
def test_bad_input_leaves_nothing_behind(config: RunConfig, change: dict[str, object], error: type[Exception],
                                         words: str) -> None:
    with pytest.raises(error, match=words):
        run(replace(config, **change))  # type: ignore[arg-type]
    assert not config.output.exists()
    work = config.output.with_name("new-work")
    assert not work.exists()


@pytest.mark.parametrize(("name", "content", "error", "words"), [
    ("heldout.jsonl", '{"body": "no text"}', CorpusError, "no field 'text'"),
    ("heldout.jsonl", "", CorpusError, "holds no text"),
    ("base/model.safetensors", "damaged", CheckpointError, "fewer than a safetensors file can have"),
    ("base/tokenizer.json", "{", TokenizerError, "no tokenizer that transformers can load"),
])
def test_what_a_later_stage_would_refuse_is_refused_before_any_work(
    config: RunConfig, tmp_path: Path, name: str, content: str, error: type[Exception], words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=words):
        run(config)
    assert not config.output.exists()
    assert not config.output.with_name("new-work").exists()


def test_the_base_itself_is_never_the_output(config: RunConfig) -> None:
    with pytest.raises(UsageError, match="is the base model itself"):
        run(replace(config, output=Path(config.model), force=True))
    assert not Path(config.model + "-work").exists()


@pytest.mark.slow
def test_a_limit_of_memory_holds_for_every_stage_or_is_said_not_to(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[object] = []

    def load(*inputs: object, **options: object) -> FrozenModel:
        limits.append(options.get("max_memory"))
        return load_model(*inputs, **options)  # type: ignore[arg-type]

    for place in ("vocabext.model.frozen", "vocabext.evaluate.stage", "vocabext.distill.stage"):
        monkeypatch.setattr(f"{place}.load_model", load)
    said: list[str] = []
    run(replace(config, collect=replace(config.collect, generate_missing=True, snippets=40, min_snippets=40),
                distill=replace(config.distill, max_memory="cpu=1GiB"),
                evaluate=replace(config.evaluate, max_memory="cpu=1GiB")), say=said.append)
    # Before mining, for missing text, to distill; the two models that `verify` compares; to measure.
    assert limits == [*["cpu=1GiB"] * 3, None, None, "cpu=1GiB"]
    assert [line for line in said if "--max-memory" in line] == [
        "--max-memory is cpu=1GiB, but verify loads each model whole; where that does not fit, it says that logits "
        "were not compared"]


@pytest.mark.parametrize(("family", "change", "words"), [
    ("gemma2", DistillConfig(output_rows="none"), "--output-rows is 'none', but vLLM ties"),
    ("gemma3n", DistillConfig(), "hidden_size_per_layer_input 16"),
    ("gemma2", DistillConfig(max_memory="much"), "--max-memory is 'much'"),
])
def test_what_distill_would_refuse_is_refused_before_mining(
    config: RunConfig, tmp_path: Path, family: str, change: DistillConfig, words: str
) -> None:
    base = tiny_family(tmp_path / family, family)
    with pytest.raises(UsageError, match=words):
        run(replace(config, model=str(base), distill=change))
    assert not config.output.with_name("new-work").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_measured_is_made_all_the_same(config: RunConfig, tmp_path: Path) -> None:
    base = tiny_family(tmp_path / "gemma3n", "gemma3n")
    outcomes = run(replace(config, model=str(base), distill=replace(config.distill, method="mean")))
    assert states(outcomes)["verify"] == "made"
    assert states(outcomes)["eval"].startswith("not made: Gemma3nForCausalLM has hidden_size_per_layer_input 16")


@pytest.mark.slow
def test_the_command_takes_every_stages_options(config: RunConfig) -> None:
    arguments = [*config.corpus, "--heldout", config.heldout[0], "--model", config.model, "-o", str(config.output),
                 "--budget", "4", "--min-count", "4",
                 "--no-dedup", "--snippets", "4", "--min-snippets", "2", "--epochs", "1",
                 "--dtype", "float32", "--device", "cpu", "--prompts", "0", "--json"]
    result = CliRunner().invoke(command, arguments, env={**os.environ})
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [stage["name"] for stage in document["stages"]] == STAGES
    assert len(json.loads((config.output / "vocabext.json").read_text())["tokens"]) == 4


def test_no_two_stages_share_an_option_by_accident() -> None:
    """`run` takes all options of all stages: a shared name means a shared value."""
    names = [f.name for config in (MineConfig, CollectConfig, DistillConfig, EvalConfig) for f in fields(config)]
    assert {name for name in names if names.count(name) > 1} == {"seed", "device", "dtype", "max_memory"}
