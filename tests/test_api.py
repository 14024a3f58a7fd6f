"""The Python API: every call on tiny models, and the same files as the command line."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import edit_json, tiny_folder
from tiny_expanded import DOCUMENTS

import vocabext
from vocabext.api.results import Evaluation
from vocabext.api.voice import python_names
from vocabext.checkpoint.verdicts import Check, Verification
from vocabext.cli.main import cli
from vocabext.errors import (
    BadCheckpointError,
    CheckpointError,
    CorpusError,
    MissingExtraError,
    OutputExistsError,
    UsageError,
)
from vocabext.files.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]
HELD_OUT = f"so the rest. {DOCUMENTS[1].text}"
MINING: dict[str, Any] = {"budget": 5, "min_count": 4, "dedup": False}
COLLECTING: dict[str, Any] = {"snippets": 6, "window": 24, "min_snippets": 2}
DISTILLING: dict[str, Any] = {"epochs": 2, "dtype": "float32", "device": "cpu"}
MEASURING: dict[str, Any] = {"prompts": 1, "dtype": "float32", "device": "cpu"}


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 300)


class Folders:
    """A base model and text, and the files of all stages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, tiny_folder(folder / "base")
        self.corpus, self.heldout = folder / "corpus.jsonl", folder / "heldout.jsonl"
        for path, texts in ((self.corpus, [d.text for d in DOCUMENTS]), (self.heldout, [HELD_OUT])):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.base = vocabext.load(self.model)
        self.tokens = self.base.mine(self.corpus, **MINING)
        self.snippets = self.base.collect(self.tokens, self.corpus, **COLLECTING)
        self.rows = self.base.distill(self.snippets, **DISTILLING)
        self.new = self.base.patch(self.rows, folder / "new")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Everything, made in memory once; tests do not change it."""
    return Folders(tmp_path_factory.mktemp("api"))


def shell(*words: object, code: int = 0) -> str:
    """Run a command line; returns what it wrote."""
    options = (f"--{word[:-1].replace('_', '-')}" if isinstance(word, str) and word.endswith("=") else str(word)
               for word in words)
    outcome = CliRunner().invoke(cli, list(options), prog_name="vocabext")
    assert outcome.exit_code == code, outcome.output
    return outcome.output


def flags(options: Mapping[str, object]) -> list[object]:
    return [word for name, value in options.items()
            for word in ((f"no_{name}=",) if value is False else (f"{name}=", value))]


def untimed(value: Any) -> Any:
    """Take times out of a document."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items()
                if k not in ("created", "vocabext.json") and not k.endswith("seconds")}  # its digest has a time in it
    return [untimed(item) for item in value] if isinstance(value, list) else value


def files_of(folder: Path) -> dict[str, object]:
    """Return what a model folder holds, without times."""
    return {str(path.relative_to(folder)): untimed(json.loads(path.read_text()))
            if path.name in ("vocabext.json", "verify.json", "eval.json") else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def same_rows(one: vocabext.NewRows, other: vocabext.NewRows) -> None:
    """Compare rows; bytes of the files differ, because safetensors orders its metadata at random."""
    assert one.tokens == other.tokens
    assert torch.equal(one.input_ND, other.input_ND)
    if one.output_ND is None or other.output_ND is None:
        assert one.output_ND is other.output_ND
    else:
        assert torch.equal(one.output_ND, other.output_ND)
    assert untimed(json.loads(json.dumps(one.header))) == untimed(json.loads(json.dumps(other.header)))


# ---- the same as the command line ----------------------------------------------------------------


def test_mine_and_collect_make_the_very_files_of_the_command_line(made: Folders, tmp_path: Path) -> None:
    made.tokens.save(tmp_path / "c.jsonl")
    made.snippets.save(str(tmp_path / "s.jsonl"))
    shell("mine", made.corpus, "--model", made.model, "-o", tmp_path / "c2.jsonl", *flags(MINING))
    shell("collect", tmp_path / "c2.jsonl", "--corpus", made.corpus, "-o", tmp_path / "s2.jsonl", *flags(COLLECTING))
    for name in ("c", "s"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}2.jsonl").read_bytes()


@pytest.mark.parametrize("options", [DISTILLING, {"method": "mean"}], ids=["distill", "mean"])
def test_distill_makes_the_rows_of_the_command_line(made: Folders, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = made.base.distill(made.snippets, **options)
    made.snippets.save(tmp_path / "s.jsonl")
    shell("distill", tmp_path / "s.jsonl", "--model", made.model, "-o", tmp_path / "r.safetensors", *flags(options))
    theirs = vocabext.NewRows.load(tmp_path / "r.safetensors")
    same_rows(rows, theirs)
    assert (rows.output_ND is None) == (options == {"method": "mean"})


@pytest.mark.slow
def test_patch_verify_and_evaluate_make_the_folder_of_the_command_line(made: Folders, tmp_path: Path) -> None:
    made.rows.save(tmp_path / "r.safetensors")
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    ours = made.base.patch(made.rows, tmp_path / "ours" / "new")
    found, measured = ours.verify(made.corpus), ours.evaluate(made.heldout, **MEASURING)
    theirs = tmp_path / "theirs" / "new"
    shell("patch", tmp_path / "r.safetensors", "--model", made.model, "-o", theirs)
    shell("verify", theirs, "--against", made.model, "--corpus", made.corpus)
    shell("eval", theirs, "--against", made.model, "--corpus", made.heldout, *flags(MEASURING))
    mine, other = files_of(ours.folder), files_of(theirs)
    for name in ("verify.json", "eval.json"):
        for document in (mine[name], other[name]):
            assert isinstance(document, dict)
            assert document.pop("model") in (str(ours.folder), str(theirs))
    assert mine == other
    assert found.passed
    assert measured.to_json() == json.loads((ours.folder / "eval.json").read_text())


@pytest.mark.slow
def test_expand_makes_the_folder_of_run(made: Folders, tmp_path: Path) -> None:
    options = {**MINING, **COLLECTING, "method": "mean", **MEASURING}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    new = vocabext.expand(made.model, made.corpus, output=tmp_path / "a" / "new", heldout=[made.heldout], **options)
    shell("run", made.corpus, "--model", made.model, "-o", tmp_path / "b" / "new", "--heldout", made.heldout,
          *flags(options))
    ours, theirs = (json.loads(json.dumps(files_of(tmp_path / name / "new"), default=bytes.hex).replace(
        str(tmp_path / name), "")) for name in ("a", "b"))
    assert ours == theirs
    work = [(tmp_path / name / "new-work" / "candidates.jsonl").read_bytes() for name in ("a", "b")]
    assert work[0] == work[1]
    assert {token.token for token in new.tokens} == {token.token for token in made.tokens}
    assert new.base.name == str(made.model)
    assert (new.folder / "verify.json").is_file()


@pytest.mark.slow
def test_expand_skips_what_is_up_to_date_and_tells_a_logger(
    made: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**MINING, "method": "mean", **MEASURING}
    with caplog.at_level(logging.INFO, "vocabext"):
        for _ in range(2):
            vocabext.expand(str(made.model), [str(made.corpus)], output=str(tmp_path / "new"), heldout=made.heldout,
                            work=str(tmp_path / "work"), **options)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [line.split(" in ")[0] for line in told] == [
        *(f"{stage}: made" for stage in ("mine", "distill", "patch", "verify", "eval")),
        *(f"{stage}: up to date" for stage in ("mine", "distill", "patch", "verify", "eval"))]


def test_expand_raises_where_verify_finds_a_fault(
    made: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Verification("new", "base", (Check("old rows", "fail", "row 3 differs; see --corpus"),), 0.0)
    monkeypatch.setattr("vocabext.verify.stage.verify", lambda *_, **__: bad)
    with pytest.raises(BadCheckpointError, match=r"failed verification: old rows \(row 3 differs; see corpus\)"):
        vocabext.expand(made.model, made.corpus, output=tmp_path / "new", heldout=made.heldout, method="mean", **MINING)


# ---- what goes in --------------------------------------------------------------------------------


def test_stages_take_what_the_one_before_returned_or_its_file(made: Folders, tmp_path: Path) -> None:
    made.tokens.save(tmp_path / "c.jsonl")
    made.snippets.save(tmp_path / "s.jsonl")
    made.rows.save(tmp_path / "r.safetensors")
    for kind in (str, Path):
        snippets = made.base.collect(kind(tmp_path / "c.jsonl"), kind(made.corpus), **COLLECTING)
        assert list(snippets) == list(made.snippets)
        rows = made.base.distill(kind(tmp_path / "s.jsonl"), method="mean")
        assert rows.tokens == made.rows.tokens
        new = made.base.patch(kind(tmp_path / "r.safetensors"), kind(tmp_path / f"new-{kind.__name__}"))
        assert [token.token for token in new.tokens] == [token.token for token in made.tokens]


def test_nothing_is_left_beside_what_was_asked_for(made: Folders, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in made.model.iterdir() if path.is_file()}
    tokens = made.base.mine(made.corpus, **MINING)
    rows = made.base.distill(made.base.collect(tokens, made.corpus, **COLLECTING), **DISTILLING)
    made.base.patch(rows, "new")
    made.base.distill(made.snippets, output="r.safetensors", **DISTILLING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "r.safetensors", "temporary"]
    assert not list((tmp_path / "temporary").iterdir())
    assert before == {path.name: path.read_bytes() for path in made.model.iterdir() if path.is_file()}


@pytest.mark.parametrize("wrap", [
    lambda documents: documents,
    lambda documents: (document.text for document in documents),
    lambda documents: ({"text": document.text, "id": 1} for document in documents),
    lambda documents: pytest.importorskip("pandas").Series([document.text for document in documents]),
], ids=["documents", "generator", "records", "series"])
def test_a_corpus_may_be_in_memory(made: Folders, wrap: Any) -> None:
    tokens = made.base.mine(wrap(DOCUMENTS), **MINING)
    assert list(tokens) == list(made.tokens)
    assert tokens.header["corpus"] == ["(in memory)"]
    snippets = made.base.collect(tokens, wrap(DOCUMENTS), **COLLECTING)
    assert [record.snippets for record in snippets] == [record.snippets for record in made.snippets]


def test_records_in_memory_have_a_field_of_text(made: Folders) -> None:
    records = [{"note": document.text} for document in DOCUMENTS]
    assert list(made.base.mine(records, text_field="note", **MINING)) == list(made.tokens)
    with pytest.raises(CorpusError, match=r"\(in memory\):1 has no field 'text', only 'note'; choose one with text_f"):
        made.base.mine(records, **MINING)


def test_what_is_passed_over_of_a_corpus_in_memory_is_counted_and_said(
    made: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = made.base.mine([*DOCUMENTS, vocabext.Document("blank", " ")], **MINING)
    assert tokens.header["left_out"] == {"empty record": {"count": 1, "names": ["blank"]}}
    assert "passed over in the corpus of 3 documents: empty record: 1 (such as blank)" in caplog.messages


@pytest.mark.parametrize(("corpus", "error", "message"), [
    (["the heart of the muscle"], UsageError, r"does not exist .*a text in memory vocabext\.Document\(NAME, TEXT\)\)"),
    (["the heart of the muscle " * 100], UsageError, r"'the heart.{,100} does not exist .*vocabext\.Document"),
    (iter(()), CorpusError, r"the corpus \(in memory\) holds no text: there is no record in it"),
    ([], UsageError, "no corpus was given"),
    ({"train": ["a"]}, TypeError, "the corpus is of type dict; it must be a path, a list of paths, or an iterable"),
    (7, TypeError, "the corpus is of type int"),
    ({"a", "b"}, TypeError, "the corpus is of type set; it must be .* in order"),
    (["a.jsonl", DOCUMENTS[0]], TypeError, "a list with 1 paths and 1 texts or records; pass one kind"),
    (iter([Path("a.jsonl")]), CorpusError, r"\(in memory\):1 is the path a\.jsonl, but a text is needed; pass paths"),
    (iter([7]), CorpusError, r"\(in memory\):1: the field 'text' is of type int, but text is needed"),
], ids=["texts", "long", "empty", "none", "dict", "int", "set", "mixed", "paths", "numbers"])
def test_a_corpus_that_is_none_is_refused_in_one_line(
    made: Folders, corpus: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        made.base.mine(corpus, **MINING)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_expand_refuses_a_corpus_in_memory(made: Folders, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"this one is in memory; write it to a \.jsonl file, or call the stages one"):
        vocabext.expand(made.model, DOCUMENTS, output=tmp_path / "new")


def test_tokens_alone_make_mean_rows_and_nothing_else(made: Folders) -> None:
    rows = made.base.distill(made.tokens, method="mean")
    assert torch.equal(rows.input_ND, made.base.distill(made.snippets, method="mean").input_ND)
    with pytest.raises(UsageError, match=r"method is 'distill', which needs snippets.*or pass method='mean'"):
        made.base.distill(made.tokens)
    with pytest.raises(TypeError, match="the snippets are of type list; pass what collect returned, or its file"):
        made.base.distill([1])  # type: ignore[arg-type]


def test_tokens_of_another_model_are_refused(made: Folders, tmp_path: Path) -> None:
    other = vocabext.load(tiny_folder(tmp_path / "other", num_ids=280))
    with pytest.raises(UsageError, match=r"the table was made for .*base with 290 token ids, but this model has 280"):
        other.collect(made.tokens, made.corpus)
    with pytest.raises(UsageError, match=r"the table was made for .* 290 token ids"):
        other.distill(made.snippets, method="mean")
    with pytest.raises(CheckpointError, match=r"the rows were made for .* with num_used_ids 290"):
        other.patch(made.rows, tmp_path / "new")


# ---- options -------------------------------------------------------------------------------------


def test_signatures_show_the_options_of_each_stage() -> None:
    known = inspect.signature(vocabext.Model.mine).parameters
    assert (known["budget"].default, known["min_count"].kind) == (1000, inspect.Parameter.KEYWORD_ONLY)
    assert "options" not in known
    assert inspect.signature(vocabext.Model.distill).parameters["method"].default == "distill"
    assert {"budget", "window", "epochs", "prompts", "output"} <= {*inspect.signature(vocabext.expand).parameters}


def test_an_unknown_or_mistyped_option_is_named(made: Folders, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="there is no option 'budgett'; did you mean 'budget'"):
        made.base.mine(made.corpus, budgett=5)
    with pytest.raises(TypeError, match="there is no option 'epochs'; choose from budget, min_count"):
        made.base.mine(made.corpus, epochs=5)
    with pytest.raises(TypeError, match="budget is '5', of type str; it must be int or None"):
        made.base.mine(made.corpus, budget="5")
    with pytest.raises(TypeError, match="epochs is True, of type bool; it must be int"):
        made.base.distill(made.snippets, epochs=True)
    with pytest.raises(TypeError, match="there is no option 'promts'; did you mean 'prompts'"):
        vocabext.expand(made.model, made.corpus, output=tmp_path / "new", promts=5)


def test_the_words_of_the_command_line_for_none_are_understood(made: Folders) -> None:
    tokens = made.base.mine(made.corpus, budget="auto", min_count=4, dedup=False)
    assert list(tokens) == list(made.base.mine(made.corpus, budget=None, min_count=4, dedup=False))
    rows = made.base.distill(made.snippets, reach="all", **DISTILLING)
    assert rows.header["options"]["reach"] is None


def calls(made: Folders, out: Path) -> dict[str, tuple[Any, list[object]]]:
    """Wrong calls, in Python and as a command line, by what Python calls the option."""
    return {
        "min_count is 1; it must be at least 2": (
            lambda: made.base.mine(made.corpus, min_count=1),
            ["mine", made.corpus, "--model", made.model, "-o", out, "--min-count", 1]),
        "budget is 5000, but only": (
            lambda: made.base.mine(made.corpus, budget=5000, min_count=4, dedup=False),
            ["mine", made.corpus, "--model", made.model, "-o", out, "--budget", 5000, "--min-count", 4, "--no-dedup"]),
        "min_snippets is 9; it must lie between 1 and snippets (6)": (
            lambda: made.base.collect(made.folder / "c.jsonl", made.corpus, snippets=6, min_snippets=9),
            ["collect", made.folder / "c.jsonl", "--corpus", made.corpus, "-o", out, "--snippets", 6,
             "--min-snippets", 9]),
        "choose one with text_field": (
            lambda: made.base.mine(made.corpus, text_field="txt"),
            ["mine", made.corpus, "--model", made.model, "-o", out, "--text-field", "txt"]),
        "device is 'cuda', but torch sees no GPU here; use device='cpu'": (
            lambda: made.base.distill(made.folder / "s.jsonl", device="cuda"),
            ["distill", made.folder / "s.jsonl", "--model", made.model, "-o", out, "--device", "cuda"]),
        "output_rows is 'zero', but method is 'mean'": (
            lambda: made.base.distill(made.folder / "s.jsonl", method="mean", output_rows="zero"),
            ["distill", made.folder / "s.jsonl", "--model", made.model, "-o", out, "--method", "mean",
             "--output-rows", "zero"]),
        "exists already; choose another output, or pass force=True to replace it": (
            lambda: made.base.patch(made.folder / "r.safetensors", made.new.folder),
            ["patch", made.folder / "r.safetensors", "--model", made.model, "-o", made.new.folder]),
        "prompts is -1; it must not be negative": (
            lambda: made.new.evaluate(made.heldout, prompts=-1),
            ["eval", made.new.folder, "--against", made.model, "--corpus", made.heldout, "--prompts", -1]),
    }


@pytest.mark.parametrize("said", calls(types.SimpleNamespace(  # type: ignore[arg-type]
    base=None, corpus=None, model=None, folder=Path(), new=types.SimpleNamespace(folder=None), heldout=None), Path()))
def test_errors_name_parameters_in_python_and_options_in_a_shell(
    made: Folders, tmp_path: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, part in (("c.jsonl", made.tokens), ("s.jsonl", made.snippets), ("r.safetensors", made.rows)):
        part.save(made.folder / name, force=True)  # type: ignore[attr-defined]
    call, words = calls(made, tmp_path / "out")[said]
    with pytest.raises(vocabext.VocabextError, match=re.escape(said)) as caught:
        call()
    assert "--" not in str(caught.value)
    typed = shell(*words, code=caught.value.exit_code)
    (line,) = [line for line in typed.splitlines() if line.startswith("error: ")]
    assert "--" in line
    assert python_names(line.removeprefix("error: ")) == str(caught.value).replace("\n", " ")


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module that are no docstrings, f-strings as a whole."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_no_message_of_the_library_keeps_an_option_in_python() -> None:
    found = {(path.name, text) for path in (ROOT / "vocabext").rglob("*.py") if "cli" not in path.parts
             for text in texts_of(ast.parse(path.read_text(encoding="utf-8"))) if re.search(r"(^|[^-\w])--[a-z]", text)}
    assert len(found) > 40
    # What names a shell command for a shell, or another program's option, or is made of a field's name.
    assert not [f"{name}: {text}" for name, text in sorted(found)
                if re.search(r"--[a-z]", python_names(text)) and name not in ("voice.py", "main.py")]


@pytest.mark.parametrize(("typed", "read"), [
    ("--min-count is 1", "min_count is 1"),
    ("pass --generate-missing", "pass generate_missing=True"),
    ("pass --method distill", "pass method='distill'"),
    ("pass it as --against", "pass it as base"),
    ("--force replaces model folders only", "force=True replaces model folders only"),
    ("vllm serve --enforce-eager", "vllm serve --enforce-eager"),
    ("a -- b --- c", "a -- b --- c"),
])
def test_an_option_becomes_its_parameter(typed: str, read: str) -> None:
    assert python_names(typed) == read


# ---- tables --------------------------------------------------------------------------------------


def test_a_token_table_is_a_sequence_of_new_tokens(made: Folders) -> None:
    tokens = made.tokens
    assert len(tokens) == 5
    first = tokens[0]
    assert isinstance(first, vocabext.NewToken)
    assert first in tokens
    assert (first.token, len(first.run) > 1, first.count > 3, first.saved > 0) == (tokens[0].token, True, True, True)
    assert made.base.tokenizer.decode(first.run) == first.token
    assert tokens.result is not None
    assert tokens.result.shorter_share > 0


def test_a_part_of_a_token_table_can_be_collected(made: Folders) -> None:
    part = made.tokens[1:3]
    assert isinstance(part, vocabext.TokenTable)
    assert [record.new_token.token for record in made.base.collect(part, made.corpus, **COLLECTING)] == [
        token.token for token in made.tokens][1:3]
    assert "expanded_tokens" not in part.header  # that was measured with all of them
    assert repr(part).startswith(f"2 new tokens for {made.model}\n")


def test_tables_come_back_from_their_files(made: Folders, tmp_path: Path) -> None:
    for part, name in ((made.tokens, "c.jsonl"), (made.snippets, "s.jsonl"), (made.rows, "r.safetensors")):
        path = tmp_path / name
        part.save(path)  # type: ignore[attr-defined]
        again = type(part).load(path)  # type: ignore[attr-defined]
        assert again.header == json.loads(json.dumps(part.header))
        assert repr(again) == repr(part)
        if isinstance(part, vocabext.NewRows):
            same_rows(part, again)
        else:
            again.save(tmp_path / f"again-{name}")
            assert (tmp_path / f"again-{name}").read_bytes() == path.read_bytes()
        with pytest.raises(OutputExistsError, match=r"exists already; choose another output, or pass force=True"):
            part.save(path)  # type: ignore[attr-defined]
        part.save(path, force=True)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"r\.safetensors is not a JSON Lines file|holds nothing"):
        vocabext.Snippets.load(tmp_path / "r.safetensors")
    assert read_jsonl(tmp_path / "c.jsonl", ("candidates",))[0]["corpus"] == [str(made.corpus)]


def test_tables_become_data_frames(made: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame = made.tokens.to_pandas()
    assert list(frame.columns) == ["token", "run", "count", "sections", "saved"]
    assert list(frame["token"]) == [token.token for token in made.tokens]
    assert list(made.rows.to_pandas()["token"]) == [token.token for token in made.rows.tokens]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pandas is not installed; run: pip install 'vocabext\[pandas\]'"):
        made.tokens.to_pandas()


def test_rows_say_their_shape_and_what_became_of_each_token(made: Folders) -> None:
    rows = made.rows
    assert rows.input_ND.shape == (len(rows), 64)
    assert rows.input_ND.dtype == torch.float32
    assert rows.output_ND is not None
    assert rows.output_ND.shape == (len(rows), 64)
    assert [report["token"] for report in rows.reports] == [token.token for token in rows.tokens]
    assert rows.left_out == []


def test_results_show_themselves_as_tables(made: Folders) -> None:
    shown = [made.tokens, made.snippets, made.rows, made.new.verify(skip_weights=True),
             made.new.evaluate(made.heldout, **MEASURING)]
    titles = ["5 new tokens for ", "18 snippets for 5 tokens", "5 rows of width 64 by distill",
              f"{made.new.folder} passed", "1 document, "]
    for result, title in zip(shown, titles, strict=True):
        assert repr(result).startswith(title)
        page = result._repr_html_()  # type: ignore[attr-defined]
        assert page.startswith(f"<div><p>{title}")
        assert page.count("<tr>") == len(repr(result).splitlines()) - 2
    assert repr(made.base) == f"<vocabext.Model {str(made.model)!r}>"
    assert repr(made.new) == f"<vocabext.Expanded {str(made.new.folder)!r}, made from {str(made.model)!r}>"


def test_html_is_escaped_and_long_tables_are_cut(made: Folders) -> None:
    hostile = vocabext.NewToken("<script>", "<script>", (1, 2))
    page = vocabext.TokenTable([hostile] * 25, {"base": {"model": "<b>"}})._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;" in page
    assert page.count("<tr>") == 21
    assert "and 5 more" in page


# ---- the new model -------------------------------------------------------------------------------


def test_the_new_tokenizer_and_its_arithmetic(made: Folders) -> None:
    text = HELD_OUT
    ids = made.new.tokenizer.encode(text)
    assert made.new.expansion.is_new(ids).any()
    assert made.new.expansion.unmerge(ids).tolist() == made.base.tokenizer.encode(text)
    assert made.new.base is made.base
    assert made.new.patched is not None
    assert made.new.patched.num_new == 5


@pytest.mark.slow
def test_verify_returns_its_verdicts_and_does_not_raise(made: Folders, tmp_path: Path) -> None:
    new = made.base.patch(made.rows, tmp_path / "new")
    found = new.verify(DOCUMENTS, skip_weights=True)
    assert isinstance(found, vocabext.Verification)
    assert found.passed
    assert found.to_json()["passed"] is True
    assert {check.name: check.detail for check in found.checks}["loads in vLLM, same greedy output"] == (
        "not asked for; pass vllm=True")
    written = json.loads((tmp_path / "new" / "verify.json").read_text())["checks"]
    assert written[-1]["detail"] == "not asked for; pass --vllm"  # a file is for everybody
    edit_json(tmp_path / "new" / "config.json", hidden_act="gelu")
    again = new.verify(skip_weights=True)
    assert not again.passed
    assert repr(again).startswith(f"{tmp_path / 'new'} failed 1 of ")
    assert "<td>fail</td>" in again._repr_html_()


def test_evaluate_says_how_much_shorter_and_how_much_better(made: Folders) -> None:
    found = made.new.evaluate(str(made.heldout), **MEASURING)
    assert [row["name"] for row in found.to_json()["rows"]] == ["base", "mean", "distilled"]
    assert 0 < found.shorter_share < 1
    assert json.loads((made.new.folder / "eval.json").read_text()) == found.to_json()


@pytest.mark.parametrize(("interval", "passed"), [([0.1, 0.3], True), ([-0.1, 0.3], False), (None, None)])
def test_an_evaluation_passes_if_rows_read_better_than_their_mean(interval: Any, passed: bool | None) -> None:
    assert Evaluation({"gap_recovered_interval": interval}).passed is passed


def test_a_folder_that_was_made_earlier_is_opened(made: Folders, tmp_path: Path) -> None:
    new = vocabext.Expanded.load(str(made.new.folder))
    assert (new.base.name, new.tokens, new.patched) == (str(made.model), made.new.tokens, None)
    assert new.verify(skip_weights=True).passed
    assert vocabext.Expanded.load(made.new.folder, made.base).base is made.base
    assert vocabext.Expanded.load(made.new.folder, made.model).base.name == str(made.model)
    with pytest.raises(CheckpointError, match=r"has no vocabext\.json; it is no expanded checkpoint"):
        vocabext.Expanded.load(made.model)
    with pytest.raises(UsageError, match=r"a model cannot be expanded twice yet"):
        _ = vocabext.load(made.new.folder).tokenizer


def test_a_base_that_is_gone_is_named(made: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = vocabext.load(tiny_folder(tmp_path / "base"))
    new = base.patch(base.distill(made.tokens, method="mean"), tmp_path / "new")
    base.folder.rename(tmp_path / "moved")
    caplog.clear()
    assert vocabext.Expanded.load(new.folder).tokens == new.tokens
    assert caplog.messages == [f"{new.folder} was made from {base.name}, which is not there; to verify or evaluate it, "
                               "pass the base"]
    caplog.clear()
    assert vocabext.Expanded.load(new.folder, tmp_path / "moved").verify(skip_weights=True).passed
    assert not caplog.messages


def test_diff_inspect_and_revert(made: Folders, tmp_path: Path) -> None:
    assert made.new.diff(["the heart"]).rows.num_new == 5
    assert made.base.inspect().num_used_ids == 290
    made.new.revert(str(tmp_path / "again"))
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (made.model / "tokenizer.json").read_bytes()
    with pytest.raises(OutputExistsError, match="pass force=True"):
        made.new.revert(tmp_path / "again")


def test_a_model_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the model folder .*missing does not exist"):
        vocabext.load(tmp_path / "missing")


# ---- how a call reports --------------------------------------------------------------------------


def test_remarks_go_to_the_logger_and_nothing_else_is_written(
    made: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = vocabext.load(made.model)
    base.mine(made.corpus, **MINING)
    base.patch(made.rows, tmp_path / "new")
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records] == ["vocabext"]
    assert caplog.messages[0].startswith("the head gets a matrix of its own")


def test_bars_are_shown_where_they_are_asked_for_and_in_notebooks(
    made: Folders, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabext.load(made.model, verbose=True).collect(made.tokens, made.corpus, **COLLECTING)
    assert "collecting snippets: 3 documents" in capfd.readouterr().err
    kernel = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    vocabext.load(made.model).collect(made.tokens, made.corpus, **COLLECTING)
    assert "collecting snippets: 3 documents" in capfd.readouterr().err
    vocabext.load(made.model, verbose=False).collect(made.tokens, made.corpus, **COLLECTING)
    assert capfd.readouterr().err == ""


# ---- importing -----------------------------------------------------------------------------------

LAZY = """
import sys, vocabext
heavy = {"torch", "transformers", "tokenizers", "datasets", "numpy", "pandas", "tqdm", "rich"}
assert not heavy & {*sys.modules}, heavy & {*sys.modules}
assert {*vocabext.__all__} <= {*dir(vocabext)}
vocabext.load(sys.argv[1])
assert not {"torch", "transformers", "tokenizers"} & {*sys.modules}
for name in vocabext.__all__:
    assert getattr(vocabext, name).__name__ == name
try:
    vocabext.lod
except AttributeError as error:
    assert str(error) == "module 'vocabext' has no attribute 'lod'"
"""


def test_importing_and_loading_read_nothing_heavy(made: Folders) -> None:
    done = subprocess.run([sys.executable, "-c", LAZY, str(made.model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_public_is_documented() -> None:
    for name in vocabext.__all__:
        found = getattr(vocabext, name)
        assert inspect.getdoc(found), name
        for attribute, member in vars(found).items() if inspect.isclass(found) else ():
            if not attribute.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{attribute}"
