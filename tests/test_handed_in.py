"""What users hand in by hand, and states of their machine: one clear line, never a traceback."""

import errno
import gc
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_checkpoints import edit_header, edit_json, tiny_folder
from tiny_expanded import DOCUMENTS, expanded_pair, new_tokens
from tiny_run import tiny_run
from tiny_tokenizers import tiny_base

from vocabext.checkpoint.folder import INDEX_NAME, WEIGHTS_NAME, open_checkpoint, resolve_model
from vocabext.checkpoint.verdicts import SKIPPED, verified_sha256
from vocabext.cli.main import cli
from vocabext.corpus import Document
from vocabext.errors import CheckpointError, TokenizerError, UsageError
from vocabext.files.atomic import atomic_file, read_object
from vocabext.mine.stage import mine, read_candidates
from vocabext.options import DistillConfig, EvalConfig, MineConfig
from vocabext.patch.stage import patch
from vocabext.run import RunConfig, run
from vocabext.serve.bench.journal import Journal
from vocabext.serve.model import require_verified
from vocabext.tokenizer import extend
from vocabext.tokens import NewToken
from vocabext.verify.stage import verify


def command(*arguments: object) -> tuple[int, str]:
    """Pass the command line in this process; returns its exit code and what it wrote to stderr."""
    outcome = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="vocabext")
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stderr


# ---- lists of one's own words --------------------------------------------------------------------


@pytest.mark.parametrize(("line", "words"), [
    ('{"token": " cardiomyopathy"}', "at token 1: 'key' is missing"),
    ('{"token": " x", "key": "Ġx"}', "at token 1: 'run' is missing"),
    ('{"token": 5, "key": "Ġx", "run": [1, 2]}', "at token 1: 'token' is 5, not text"),
    ('{"token": " x", "key": "Ġx", "run": "12"}', "at token 1: 'run' is '12', not a list of at least two token ids"),
    ('{"token": " x", "key": "Ġx", "run": [1]}', r"at token 1: 'run' is \[1\], not a list of at least two token ids"),
    ('" cardiomyopathy"', "at token 1: ' cardiomyopathy' is no JSON object"),
    ("cardiomyopathy", "is not a JSON Lines file of vocabext"),
])
def test_a_line_by_hand_that_is_not_enough_is_told_what_a_line_is(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"artifact": "candidates", "version": 1, "base": {"model": "m"}}\n' + line + "\n", "utf-8")
    with pytest.raises(UsageError, match=words) as caught:
        read_candidates(path)
    for part in ('{"token": " word", "key": "Ġword", "run": [12, 345]}', 'new_token(" word").to_json()'):
        assert part in str(caught.value)


def test_a_list_without_a_first_line_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"token": " cardiomyopathy"}\n')
    with pytest.raises(UsageError, match=r'its first line is \{"artifact": "candidates", "version": 1, "base"'):
        read_candidates(tmp_path / "mine.jsonl")


def test_words_of_ones_own_go_in_as_the_message_says(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    lines = [{"artifact": "candidates", "version": 1, "base": {"model": str(folder)}},
             *(token.to_json() for token in new_tokens(folder))]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    corpus = tmp_path / "c.txt"
    corpus.write_text(DOCUMENTS[0].text)
    assert command("collect", path, "--corpus", corpus, "-o", tmp_path / "s.jsonl")[0] == 0
    lines[0].pop("base")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = command("collect", path, "--corpus", corpus, "-o", tmp_path / "s2.jsonl")
    assert (code, said) == (2, f"error: {path} does not say which model it was made for; pass --model\n")


LOOK_ALIKES = ["[PAD]", " [PAD]", "</s>x", "[CLS]", "<|im_start|>", " <|endoftext|>", "<unk>", "<pad>", "<0x0A>",
               "[INST]", "<start_of_turn>", "<｜begin▁of▁sentence｜>", "<extra_id_17>", "<unused3>", "\uff1cs\uff1e",
               "<<SYS>>", "[gMASK]", "<PAD>", "[TOOL_CALLS]", "see <mask> here"]


@pytest.mark.parametrize("kind", ["gpt2", "metaspace"])
def test_look_alikes_of_special_tokens_are_refused(kind: str) -> None:
    base = tiny_base(kind)
    for text in LOOK_ALIKES:
        with pytest.raises(TokenizerError, match=r"looks like a special token|contains the added token"):
            base.new_token(text)


def test_tags_and_brackets_of_ordinary_text_are_no_look_alikes() -> None:
    base = tiny_base("gpt2")
    for text in ("</div>", "<h1>", "[INFO]", "[12]", "vector<int>", "<stdio.h>", "|>", "[a-z]", "<ref>"):
        try:
            base.new_token(text)
        except TokenizerError as error:
            assert "special" not in str(error)  # noqa: PT017  (some are several tokens in any context)


def test_a_list_is_refused_with_every_reason_and_their_number() -> None:
    base = tiny_base("gpt2")
    good = base.new_token(" cardiac")
    bad = [NewToken(text, text, (1, 2)) for text in ("[PAD]", "<|im_start|>", "a", "\ufffd")]
    with pytest.raises(TokenizerError) as caught:
        extend(base, [good, *bad])
    assert str(caught.value) == (
        "4 of 5 tokens cannot be added to this tokenizer: '[PAD]' holds '[PAD]', which looks like a special token; "
        "'<|im_start|>' holds '<|im_start|>', which looks like a special token; 'a' is in the vocabulary already; "
        "'\ufffd' contains the character that stands for broken text; leave them out")


def test_look_alikes_in_a_corpus_are_counted_under_one_reason() -> None:
    texts = ["the heart [PAD] rate of <|im_end|> muscle " * 20, "a [PAD] heart muscle <|im_end|> is rated " * 20] * 3
    result = mine([Document(str(i), text) for i, text in enumerate(texts)], tiny_base("gpt2"),
                  MineConfig(dedup=False, budget=None, min_count=5))
    assert not [token.token for token in result.tokens if "[PAD]" in token.token or "<|im_end|>" in token.token]
    assert result.rejected_by_reason()["it holds ..., which looks like a special token"] > 1


# ---- links to nowhere ----------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path)


def mean_only(config: RunConfig) -> RunConfig:
    return replace(config, distill=DistillConfig(method="mean", device="cpu", dtype="float32"),
                   evaluate=EvalConfig(prompts=0, context=48, dtype="float32", device="cpu"))


@pytest.mark.slow
def test_links_to_nowhere_in_the_model_folder_do_not_end_a_run(config: RunConfig) -> None:
    base = Path(config.model)
    for name in ("x.txt", "x.json", "x.safetensors", "x.model", "x.jinja", "extra/x.txt"):
        (base / name).symlink_to("nowhere")
    (base / "loop.json").symlink_to("loop.json")
    os.mkfifo(base / "pipe.json")
    outcomes = run(mean_only(config))
    assert {outcome.state for outcome in outcomes} == {"made"}
    assert "x.txt" in json.loads((config.output / "vocabext.json").read_text())["files"]["left_out"]


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_NAME, "tokenizer.json", "generation_config.json"])
def test_a_link_to_nowhere_in_place_of_a_part_of_the_model_is_named(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/lost")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to nowhere \(../blobs/lost\)"):
        resolve_model(str(folder))


# ---- limits of the machine -----------------------------------------------------------------------


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as `ulimit -f` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 1_000, 60_000])
def test_a_limit_for_file_sizes_is_one_line_while_patching(tmp_path: Path, limit: int) -> None:
    base, expanded = expanded_pair(tmp_path)
    shutil.rmtree(expanded)
    with file_limit(limit):
        code, said = command("patch", tmp_path / "rows.safetensors", "--model", base, "-o", expanded)
    assert code == 1
    assert said.splitlines()[-1].startswith(
        f"error: a file would become larger than it may be at {expanded}; raise the limit (see `ulimit -f`)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rows.safetensors"]


@pytest.mark.slow
def test_a_limit_for_file_sizes_is_one_line_from_every_verb(tmp_path: Path) -> None:
    base, expanded = expanded_pair(tmp_path)
    (tmp_path / "c.txt").write_text("\n\n".join(document.text for document in DOCUMENTS))
    corpus, out = tmp_path / "c.txt", tmp_path / "out"
    mining = ("mine", corpus, "--model", base, "--budget", 3, "--min-count", 3, "--no-dedup", "-o")
    collecting = ("collect", tmp_path / "cand.jsonl", "--corpus", corpus, "-o")
    assert command(*mining, tmp_path / "cand.jsonl")[0] == 0
    for verb in (
        (*mining, out), (*collecting, out), ("revert", expanded, "-o", out),
        ("distill", tmp_path / "cand.jsonl", "--model", base, "--method", "mean", "-o", out),
        ("run", *mining[1:], out, "--method", "mean"),
        ("serve", "lengths", base, expanded, "--corpus", corpus, "-o", out),
    ):
        with file_limit(16):
            code, said = command(*verb)
        assert code == 1, (verb[0], said)
        assert said.splitlines()[-1].startswith("error: a file would become larger than it may be at "), said
        assert str(out) in said.splitlines()[-1]
        assert not out.exists()


@pytest.mark.slow
def test_a_memory_that_is_too_small_says_nothing_about_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expanded = expanded_pair(tmp_path)

    def short(*_: object, **__: object) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise CheckpointError("transformers cannot load the model") from error

    monkeypatch.setattr("vocabext.model.frozen.load_model", short)
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 50)
    result = verify(expanded, str(base))
    (check,) = (check for check in result.checks if "same logits" in check.name)
    assert check.verdict == SKIPPED
    assert check.detail.startswith("the memory is too small for it")


# ---- an output is blamed for its own errors only -------------------------------------------------


def test_an_input_that_fails_while_an_output_is_written_keeps_its_name(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "Input/output error", "/mnt/corpus.txt"), OSError(errno.EIO, "Input/output error"),
                  FileNotFoundError(errno.ENOENT, "No such file", "/mnt/corpus.txt")):
        name = error.filename
        with pytest.raises(type(error)) as caught, atomic_file(tmp_path / "out.json"):
            raise error
        assert caught.value.filename == name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "out"
    with file_limit(10), pytest.raises(OSError, match="File too large") as caught, atomic_file(path, mode) as file:
        file.write(b"x" * 100_000 if "b" in mode else "x" * 100_000)
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="No such file") as caught, atomic_file(tmp_path / "no" / "out"):
        pass
    assert caught.value.filename == str(tmp_path / "no" / "out")
    assert not list(tmp_path.iterdir())


# ---- JSON of another kind ------------------------------------------------------------------------

OTHER_JSON = ["[]", '["mine"]', "null", "3", '"text"', "{", "[" * 100_000, "\udcff"]


@pytest.mark.parametrize("content", OTHER_JSON)
def test_a_file_that_is_no_object_reads_as_absent(tmp_path: Path, content: str) -> None:
    path = tmp_path / "verify.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_object(path) is None
    assert verified_sha256(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("content", ['["mine"]', '{"mine": [1], "verify": {"a": 1}, "patch, begun": 3}'])
def test_a_run_json_of_another_kind_starts_the_run_anew(config: RunConfig, content: str) -> None:
    work = config.output.with_name(config.output.name + "-work")
    work.mkdir()
    (work / "run.json").write_text(content)
    assert {outcome.state for outcome in run(mean_only(config))} == {"made"}


@pytest.mark.parametrize("document", [
    {"settings": [1]}, {"version": 2, "settings": {}}, {"version": 2, "settings": {}, "runs": [3], "failures": []},
    {"version": 2, "settings": {}, "runs": [], "failures": [], "dropped_runs": 0, "answers": [1], "notes": {}},
])
def test_a_partial_bench_that_is_damaged_is_one_line(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"artifact": "bench", "state": "partial", **document}))
    with pytest.raises(UsageError, match=r"is damaged|of other settings"):
        Journal.open(tmp_path / "bench.json", {})


@pytest.mark.parametrize("checks", [3, [3], {"a": 1}, None])
def test_a_verdict_with_checks_of_another_kind_is_one_line(tmp_path: Path, checks: object) -> None:
    _, expanded = expanded_pair(tmp_path)
    (expanded / "verify.json").write_text(json.dumps({"artifact": "verify", "passed": False, "checks": checks}))
    with pytest.raises(CheckpointError, match=r"failed verification \(see verify.json\)"):
        require_verified(expanded)


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [[1], "text", 3])
def test_an_index_with_metadata_of_another_kind_can_be_patched(tmp_path: Path, metadata: object) -> None:
    base, expanded = expanded_pair(tmp_path, sharded=True, num_rows=290)
    shutil.rmtree(expanded)
    edit_json(base / INDEX_NAME, metadata=metadata)
    patch(tmp_path / "rows.safetensors", str(base), expanded)
    assert json.loads((expanded / INDEX_NAME).read_text())["metadata"] == metadata


# ---- what else is said truly ---------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size", "words"), [
    ("F64", 8, "F64, numbers of double precision; rows can be added to F32, F16, BF16 only, convert it"),
    ("F8_E4M3", 1, "F8_E4M3, quantised numbers; .* use a checkpoint whose embedding and head are not quantised"),
    ("I8", 1, "I8, quantised numbers"),
    ("I32", 4, "I32, whole numbers; .* convert it"), ("BOOL", 1, "BOOL, truth values"),
])
def test_numbers_that_rows_cannot_be_added_to_are_called_what_they_are(
    tmp_path: Path, dtype: str, size: int, words: str
) -> None:
    folder = tiny_folder(tmp_path / "m")
    path = folder / WEIGHTS_NAME

    def change(header: dict[str, Any]) -> None:
        old = header["model.embed_tokens.weight"]["data_offsets"]
        moved = (size - 4) * 300 * 64
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                entry["data_offsets"] = [start + moved * (start > old[0]), end + moved * (end > old[0])]
        header["model.embed_tokens.weight"]["dtype"] = dtype

    edit_header(path, change)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) + (size - 4) * 300 * 64] + b"\0" * max(0, (size - 4) * 300 * 64))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


def test_code_that_comes_with_a_model_is_allowed_by_an_option(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    edit_json(folder / "config.json", model_type="own", architectures=["Own"],
              auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(CheckpointError, match="pass --trust-remote-code to run it") as caught:
        open_checkpoint(folder)
    assert "trust_remote_code" not in str(caught.value)


@pytest.mark.slow
def test_patch_leaves_the_garbage_collector_of_its_caller_alone(tmp_path: Path) -> None:
    base, expanded = expanded_pair(tmp_path)
    shutil.rmtree(expanded)
    seen: list[bool] = []

    @contextmanager
    def progress(*_: object) -> Iterator[Any]:
        seen.append(gc.isenabled())

        class Task:
            def advance(self, count: int = 1) -> None:
                seen.append(gc.isenabled())

            def note(self, text: str) -> None: ...

        yield Task()

    patch(tmp_path / "rows.safetensors", str(base), expanded, progress=progress)
    assert len(seen) > 2
    assert all(seen)
