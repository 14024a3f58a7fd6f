"""Tests of writing an expanded checkpoint."""

import contextlib
import errno
import gc
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from base_logits import same_over_base_rows
from click.testing import CliRunner
from patch_case import EMBEDDING, HEAD, Case, make_case, make_rows, rewrite, stored
from tiny_checkpoints import asset_model, default_dtype, edit_json, hub_cache, tiny_folder
from tiny_tokenizers import KINDS, as_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

from vocabext.checkpoint.folder import INDEX_NAME, Rows, load_rows, open_checkpoint, save_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.shards import read_shard
from vocabext.cli.patch import patch as command
from vocabext.errors import CheckpointError, OutputExistsError, TokenizerError, UsageError
from vocabext.files import links
from vocabext.files.links import Copier
from vocabext.files.ranges import file_sha256
from vocabext.patch import stage as module
from vocabext.patch import weights as patch_weights
from vocabext.patch.plan import grown_rows
from vocabext.patch.stage import patch
from vocabext.tokens import NewToken

DEADLINE_SECONDS = 20.0


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


@pytest.fixture
def many_shards(tmp_path: Path) -> Case:
    return make_case(tmp_path, tied=False, sharded=True, num_rows=291)


def digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file, without the time at which the folder was made."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found["vocabext.json"] = json.dumps({**json.loads(found["vocabext.json"]), "created": ""}).encode()
    return found


@torch.no_grad()
def check_expanded(base: Path, new: Path, text: str) -> None:
    """Check everything that a user of the new folder relies on."""
    before, after = open_checkpoint(base), open_checkpoint(new)
    manifest = read_manifest(new)
    used, count = manifest.base.num_used_ids, len(manifest.tokens)
    assert after.vocab_size == grown_rows(before.vocab_size, used + count)
    assert json.loads((new / "config.json").read_text())["vocab_size"] == after.vocab_size
    old, now = stored(base), stored(new)
    assert old.keys() == now.keys()
    for name, tensor in old.items():
        if name in before.vocab_tensors:
            assert torch.equal(now[name][:used], tensor[:used])
            assert torch.equal(now[name][used + count:len(tensor)], tensor[used + count:])
            assert not now[name][max(len(tensor), used + count):].any()
        else:
            assert torch.equal(now[name], tensor)
        assert now[name].dtype == tensor.dtype
    base_tokenizer, tokenizer = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(new)
    for token in manifest.tokens:
        # Not after every letter: some tokenizers merge across a space, and then the run does not occur.
        found = [tokenizer.encode(f"{left}{token.token}", add_special_tokens=False)[-1] for left in ("x", ".", "x ")]
        assert token.token_id in found, (token, found)
        assert tokenizer.decode([token.token_id]).strip() == token.token.strip()
    ids = base_tokenizer.encode(text)
    assert tokenizer.encode(text) == ids
    assert same_over_base_rows(base, new, ids, used)


@pytest.mark.parametrize(("texts", "searched"), [(("dm", "dmd"), 0), (("dmd", "dmdb", "mb"), 2)])
def test_tokens_whose_parts_are_no_tokens_are_counted(tmp_path: Path, texts: tuple[str, ...], searched: int) -> None:
    base = tiny_folder(tmp_path / "base", num_rows=448)
    as_hf(KINDS["metaspace"]()).save_pretrained(base)
    make_rows(base, tmp_path / "rows.safetensors", texts)
    result = patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    assert (result.num_new, result.num_searched) == (len(texts), searched)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_new_folder_is_the_base_plus_rows(tmp_path: Path, tied: bool, sharded: bool, dtype: torch.dtype) -> None:
    case = make_case(tmp_path, tied=tied, sharded=sharded, dtype=dtype, num_rows=291)
    before = digests(case.base)
    result = case.patch()
    assert (result.num_new, result.first_new_id, result.num_rows_before, result.num_rows) == (3, 290, 291, 293)
    check_expanded(case.base, case.output, "the muscle")
    assert digests(case.base) == before
    _, rows, _ = load_rows(case.rows)
    assert torch.equal(stored(case.output)[EMBEDDING][290:], rows.input_ND.to(dtype))


def test_free_rows_are_used_before_the_matrix_grows(case: Case) -> None:
    config = (case.base / "config.json").read_bytes()
    result = case.patch()
    assert (result.num_rows_before, result.num_rows) == (300, 300)
    assert (case.output / "config.json").read_bytes() == config
    check_expanded(case.base, case.output, "the muscle")


def test_every_other_file_is_carried_over(tmp_path: Path) -> None:
    case = make_case(tmp_path, sharded=True, num_rows=290)
    result = case.patch()
    before, after = digests(case.base), digests(case.output)
    assert {"README.md", "chat_template.jinja", "generation_config.json", "extra/notes.txt"} <= set(
        result.files.carried_over)
    assert all(after[name] == before[name] for name in result.files.carried_over)
    shards = [name for name in result.files.rewritten if name.endswith(".safetensors")]
    assert shards == [open_checkpoint(case.base).vocab_info.file]
    assert {name for name in after if not name.startswith("vocabext_base/")} == set(before) | {"vocabext.json"}
    assert set(result.files.carried_over) | set(result.files.rewritten) == set(before)
    assert read_manifest(case.output).files == result.files
    old_config, config = (json.loads((folder / "config.json").read_text()) for folder in (case.base, case.output))
    assert config == {**old_config, "vocab_size": 294}
    assert AutoTokenizer.from_pretrained(case.output).chat_template == (case.base / "chat_template.jinja").read_text()


def test_the_index_and_the_metadata_are_kept_up(tmp_path: Path) -> None:
    case = make_case(tmp_path, sharded=True, tied=False, num_rows=290)
    case.patch()
    old, new = (json.loads((folder / INDEX_NAME).read_text()) for folder in (case.base, case.output))
    assert new["weight_map"] == old["weight_map"]
    grown = 2 * 4 * 64  # embedding and head, three rows and a surplus one
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 4 * grown
    assert new["metadata"]["total_parameters"] == old["metadata"]["total_parameters"] + grown
    model = AutoModelForCausalLM.from_pretrained(case.output)
    assert model.num_parameters() == new["metadata"]["total_parameters"]
    for path in case.output.glob("*.safetensors"):
        assert read_shard(case.output, path.name).metadata == {"format": "pt"}


def test_what_would_mislead_a_reader_is_left_out(case: Case) -> None:
    for name in ("pytorch_model.bin", "merges.txt", "stray.safetensors", "model.gguf", "sub/optimizer.pt",
                 ".git/config", ".cache/x/y", ".gitattributes", "sub/adapter.safetensors"):
        (case.base / name).parent.mkdir(parents=True, exist_ok=True)
        (case.base / name).write_text("x")
    (case.base / "nowhere").symlink_to("missing")
    (case.base / "link").symlink_to(case.base / "extra")
    result = case.patch()
    assert set(result.files.left_out) == {
        "pytorch_model.bin", "merges.txt", "stray.safetensors", "model.gguf", "sub/optimizer.pt", ".git/", ".cache/",
        "nowhere", "link/"}
    assert all(result.files.left_out.values())
    assert not any((case.output / name).exists() for name in result.files.left_out)
    assert (case.output / "sub" / "adapter.safetensors").exists()
    assert (case.output / ".gitattributes").exists()


def test_an_untied_head_takes_the_mean_of_its_pieces_unless_rows_are_given(tmp_path: Path) -> None:
    case = make_case(tmp_path, tied=False)
    tokens, _, _ = load_rows(case.rows)
    assert "mean of the head rows" in case.patch().head_rows
    assert "mean of the head rows" in read_manifest(case.output).head_rows
    head_VD = stored(case.base)[HEAD]
    expected = torch.stack([head_VD[list(token.run)].mean(dim=0) for token in tokens])
    assert torch.equal(stored(case.output)[HEAD][290:293], expected)
    make_rows(case.base, case.rows, output=True)
    assert case.patch(force=True).head_rows == "from the rows file"
    _, rows, _ = load_rows(case.rows)
    assert rows.output_ND is not None
    assert torch.equal(stored(case.output)[HEAD][290:293], rows.output_ND)


def test_a_tied_model_that_stores_its_head_only_stays_so(case: Case) -> None:
    rewrite(case.base, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    case.patch()
    assert EMBEDDING not in stored(case.output)
    check_expanded(case.base, case.output, "the muscle")


def test_a_tied_model_that_stores_both_gets_both(case: Case) -> None:
    rewrite(case.base, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    case.patch()
    new = stored(case.output)
    assert torch.equal(new[HEAD], new[EMBEDDING])
    check_expanded(case.base, case.output, "the muscle")


def test_the_manifest_says_what_was_made_from_what(case: Case) -> None:
    tokens = make_rows(case.base, case.rows, per_token=[{"loss": float(i)} for i in range(3)])
    case.patch()
    manifest = read_manifest(case.output)
    assert (manifest.method, manifest.options) == ("mean", {"seed": 0})
    assert [(record.token, record.run, record.token_id) for record in manifest.tokens] == [
        (token.token, token.run, 290 + i) for i, token in enumerate(tokens)]
    assert [record.distill for record in manifest.tokens] == [{"loss": 0.0}, {"loss": 1.0}, {"loss": 2.0}]
    assert manifest.base.num_rows == 300
    assert manifest.base.config_sha256 == file_sha256(case.base / "config.json")
    embedding = stored(case.base)[EMBEDDING].numpy().tobytes()
    assert manifest.base.tensors_sha256 == {EMBEDDING: hashlib.sha256(embedding).hexdigest()}


# -- refusals -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("key", "value"), [("num_used_ids", 289), ("hidden_size", 65), ("tokenizer_sha256", "0")])
def test_rows_of_another_model_are_refused(case: Case, key: str, value: Any) -> None:
    make_rows(case.base, case.rows, base={"model": "org/other", key: value})
    with pytest.raises(CheckpointError, match=f"were made for org/other with {key} {value}"):
        case.patch()
    assert not case.output.exists()


@pytest.mark.parametrize("base", [None, {}, "text"])
def test_rows_that_do_not_say_their_base_are_checked_by_their_runs(case: Case, base: Any) -> None:
    make_rows(case.base, case.rows, base=base)
    case.patch()
    tokens, rows, header = load_rows(case.rows)
    other = tuple(NewToken(token.token, token.key, token.run[::-1]) for token in tokens)
    save_rows(case.rows, other, rows, header)
    with pytest.raises(TokenizerError, match="made for another tokenizer"):
        case.patch(force=True)


def test_rows_that_hold_nothing_or_no_numbers_are_refused(case: Case) -> None:
    tokens, rows, header = load_rows(case.rows)
    save_rows(case.rows, (), Rows(torch.zeros(0, 64)), header)
    with pytest.raises(CheckpointError, match="nothing to add"):
        case.patch()
    rows.input_ND[1, 5] = float("nan")
    save_rows(case.rows, tokens, rows, header)
    with pytest.raises(CheckpointError, match="1 new rows are not finite"):
        case.patch()


def test_an_existing_output_needs_force_and_is_replaced_whole(case: Case) -> None:
    case.patch()
    (case.output / "old.txt").write_text("old")
    with pytest.raises(OutputExistsError, match="--force"):
        case.patch()
    case.patch(force=True)
    assert not (case.output / "old.txt").exists()
    assert sorted(path.name for path in case.output.parent.iterdir()) == ["base", "new", "rows.safetensors"]


def test_force_replaces_model_folders_only(case: Case) -> None:
    case.output.mkdir()
    (case.output / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no model folder, and --force replaces model folders only"):
        case.patch(force=True)
    assert (case.output / "thesis.tex").exists()
    shutil.rmtree(case.output)
    case.output.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        case.patch(force=True)


@pytest.mark.parametrize(("output", "error"), [
    ("base", "is the base model itself"), ("base/new", "lies inside the base model"), (".", "lies inside the output")])
@pytest.mark.parametrize("force", [True, False])
def test_the_base_is_never_written_to(tmp_path: Path, output: str, error: str, force: bool) -> None:
    (tmp_path / "room").mkdir()
    case = make_case(tmp_path / "room")
    before = digests(case.base)
    with pytest.raises(UsageError, match=error if force or output != "." else "exists already"):
        patch(case.rows, str(case.base), tmp_path / "room" / output, force=force)
    assert digests(case.base) == before


def test_rows_inside_the_replaced_folder_are_refused(case: Case) -> None:
    case.patch()
    inside = case.output / "rows.safetensors"
    shutil.copy(case.rows, inside)
    with pytest.raises(UsageError, match="lie inside the output"):
        patch(inside, str(case.base), case.output, force=True)


def test_a_full_disk_is_found_before_the_first_byte(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but .* has 5 bytes free"):
        case.patch()
    assert sorted(path.name for path in case.output.parent.iterdir()) == ["base", "rows.safetensors"]


@pytest.mark.parametrize("link", ["auto", "copy"])
def test_the_space_that_is_asked_for_is_enough_and_not_wasteful(
        many_shards: Case, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "check_space", lambda _, needed, __: asked.append(needed))
    written = many_shards.patch(link=link).bytes_written
    assert written <= asked[0] <= written + 2 * module.MARGIN_BYTES


@pytest.mark.parametrize("step", [(patch_weights, "write_shard"), (module, "write_manifest"), (module, "write_json")])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [True, False])
def test_an_interruption_leaves_nothing_or_the_old_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], stop: type[BaseException],
        there: bool) -> None:
    case = make_case(tmp_path, num_rows=290)
    if there:
        case.patch()
    before = digests(tmp_path)

    def interrupt(*_: Any, **__: Any) -> None:
        raise stop("stop")

    monkeypatch.setattr(*step, interrupt)
    with pytest.raises(stop):
        case.patch(force=True)
    assert digests(tmp_path) == before
    assert case.output.exists() == there


def test_an_interruption_between_the_renames_brings_the_old_folder_back(
        case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.patch()
    before = digests(case.output.parent)
    rename = Path.rename

    def interrupt(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.patch(force=True)
    assert digests(case.output.parent) == before


def test_a_base_without_a_tokenizer_is_refused(case: Case) -> None:
    (case.base / "tokenizer.json").unlink()
    edit_json(case.base / "tokenizer_config.json", tokenizer_class=None)
    with pytest.raises((TokenizerError, CheckpointError)) as caught:
        case.patch()
    assert "\n" not in str(caught.value)


def test_a_read_only_base_gives_a_writable_folder(case: Case) -> None:
    for path in case.base.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    case.patch()
    for path in case.base.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert all(path.stat().st_mode & 0o200 for path in case.output.rglob("*"))


def test_links_of_a_hub_cache_are_followed(case: Case, tmp_path: Path) -> None:
    cache = hub_cache(case.base, tmp_path / "models--a--b")
    patch(case.rows, str(cache), case.output)
    assert not any(path.is_symlink() for path in case.output.rglob("*"))
    check_expanded(case.base, case.output, "the muscle")


def test_a_link_to_a_file_outside_is_left_out_and_said_and_refused_where_the_model_needs_it(
        case: Case, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x")
    (case.base / "notes.txt").symlink_to(secret)
    (case.base / "inside.txt").symlink_to("config.json")
    result = case.patch()
    assert result.files.left_out["notes.txt"] == "a link to a file outside the model folder"
    assert not any(path.read_bytes() == b"root:x" for path in case.output.rglob("*") if path.is_file())
    assert (case.output / "inside.txt").read_bytes() == (case.base / "config.json").read_bytes()
    (case.base / "chat_template.jinja").unlink(missing_ok=True)
    (case.base / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a link to .*secret, outside the model folder"):
        case.patch(force=True)


def test_a_private_base_gives_a_private_copy(case: Case) -> None:
    (case.base / "shared.txt").write_text("x")
    for path in case.base.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    (case.base / "shared.txt").chmod(0o640)
    case.base.chmod(0o700)
    case.patch(link="copy")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (case.output, *case.output.rglob("*"))
             if path.is_file() or path == case.output}
    assert modes.pop("shared.txt") == 0o640
    assert modes.pop(case.output.name) == 0o700
    assert set(modes.values()) == {0o600}


# -- the command line, and real models ----------------------------------------------------------------------------

def test_the_command_shows_what_was_made(case: Case) -> None:
    arguments = [str(case.rows), "--model", str(case.base), "-o", str(case.output)]
    run = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    assert "3 (ids 290 to 292)" in run.stdout
    assert "300 before, 300 now" in run.stdout
    run = CliRunner().invoke(command, [*arguments, "--force", "--json"], catch_exceptions=False)
    document = json.loads(run.stdout)
    assert (document["num_new"], document["first_new_id"], document["folder"]) == (3, 290, str(case.output))


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize(("name", "texts"), [
    ("tinystories-656k-hd32", ("caterpillar", "peanut butter", "rainbow")),
    ("tinystories-656k", ("caterpillar", "rainbow")),
    ("stories260K-hd32", (" caterpillar", " elephant")),
    ("biomed-13m", (" cardiomyopathy", " signs and symptoms"))])
def test_real_models_are_expanded(tmp_path: Path, name: str, texts: tuple[str, ...]) -> None:
    base = asset_model(name)
    make_rows(base, tmp_path / "rows.safetensors", texts)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    check_expanded(base, tmp_path / "new", "Once upon a time there was a little girl.")


def test_progress_counts_every_byte(case: Case) -> None:
    seen: list[int] = []

    class Task:
        def advance(self, amount: int = 1, /) -> None:
            seen.append(amount)

        def note(self, text: str, /) -> None: ...

    def progress(description: str, /, total: int | None = None, unit: str = "") -> Any:
        assert unit == "bytes"
        seen.append(-(total or 0))
        return contextlib.nullcontext(Task())

    case.patch(progress=progress)
    assert sum(seen) == 0
    assert len(seen) > 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_of_the_process_changes_no_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    case = make_case(tmp_path, tied=False, dtype=dtype, num_rows=291)
    case.patch()
    expected = contents(case.output)
    with default_dtype(dtype):
        case.patch(force=True)
    assert contents(case.output) == expected


@pytest.mark.parametrize("record", [None, "LlamaForCausalLM", {"transformers": "5.0.0", "config_sha256": "0", "names": {
    "architecture": "Other", "embedding": "e", "tied": True}}])
def test_what_older_rows_files_say_about_the_class_is_ignored(case: Case, record: Any) -> None:
    case.patch()
    expected = contents(case.output)
    tokens, rows, header = load_rows(case.rows)
    save_rows(case.rows, tokens, rows, {**header, "base": {**header["base"], "class": record}})
    case.patch(force=True)
    assert contents(case.output) == expected


def test_rows_that_were_made_with_options_of_older_versions_are_read(case: Case) -> None:
    tokens, rows, header = load_rows(case.rows)
    gone = {"second_pass": True, "batch_snippets": 2, "next_token_weight": 0.02}
    save_rows(case.rows, tokens, rows, {**header, "options": {**header["options"], **gone}})
    case.patch()
    assert read_manifest(case.output).options.items() >= gone.items()


def test_the_size_of_a_chunk_changes_no_byte(many_shards: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    many_shards.patch()
    large = contents(many_shards.output)
    monkeypatch.setattr("vocabext.checkpoint.shards.REWRITE_BYTES", 1_000)
    many_shards.patch(force=True)
    assert contents(many_shards.output) == large


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_of_the_caller_stays_as_it_is(
        case: Case, monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(module, "check_paths", lambda *_: seen.append(gc.isenabled()))
    try:
        (gc.enable if enabled else gc.disable)()
        case.patch()
        assert [*seen, gc.isenabled()] == [enabled, enabled]
    finally:
        gc.enable()


# -- errors of the work or of a copy beside it --------------------------------------------------------------------

def names_left(case: Case) -> list[str]:
    return sorted(path.name for path in case.output.parent.iterdir())


def test_a_shard_that_is_cut_off_meanwhile_is_noticed(many_shards: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = many_shards.base / open_checkpoint(many_shards.base).vocab_info.file

    def cut(*_: object) -> None:
        shard.write_bytes(shard.read_bytes()[:-5])

    monkeypatch.setattr(module, "check_space", cut)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        many_shards.patch(link="copy")
    assert names_left(many_shards) == ["base", "rows.safetensors"]


@pytest.mark.parametrize("place", [(patch_weights, "write_shard"), (links, "copy_file")])
def test_a_disk_that_fills_up_ends_the_work(
        many_shards: Case, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*place, full)
    with pytest.raises(OSError, match="No space left"):
        many_shards.patch(link="copy")
    assert names_left(many_shards) == ["base", "rows.safetensors"]


def test_a_copy_that_fails_stops_what_is_written_beside_it(many_shards: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(*_: Any) -> None:
        failed.set()
        raise OSError("first")

    def write_for_ever(*arguments: Any) -> None:
        assert failed.wait(DEADLINE_SECONDS)
        advance_until_stopped(arguments[-1])

    monkeypatch.setattr(links, "copy_file", fail)
    monkeypatch.setattr(patch_weights, "write_shard", write_for_ever)
    with pytest.raises(OSError, match="first"):
        many_shards.patch(link="copy")
    assert names_left(many_shards) == ["base", "rows.safetensors"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, CheckpointError, TokenizerError])
def test_an_error_beside_the_copies_stops_them(
        many_shards: Case, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def copy_for_ever(_: Path, __: Path, advance: Callable[[int], object]) -> None:
        begun.set()
        try:
            advance_until_stopped(advance)
        finally:
            stopped.set()

    def fail(*_: Any) -> None:
        assert begun.wait(DEADLINE_SECONDS)
        raise stop("stop")

    monkeypatch.setattr(links, "copy_file", copy_for_ever)
    monkeypatch.setattr(patch_weights, "write_shard", fail)
    with pytest.raises(stop):
        many_shards.patch(link="copy")
    assert stopped.is_set()
    assert names_left(many_shards) == ["base", "rows.safetensors"]


def advance_until_stopped(advance: Callable[[int], object]) -> None:
    """Go on until the copier says that other work has failed."""
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE_SECONDS:
        time.sleep(0.001)
        advance(0)
    raise AssertionError("nothing stopped it")


def end_with(error: BaseException, *, wait: bool) -> None:
    """Let a thread copy something, and raise beside it: at once, or when it has failed."""
    with Copier(lambda _: None) as copier:
        copier.add(Path("source"), Path("target"))
        while wait and copier._error is None:
            time.sleep(0.001)
        raise error


@pytest.mark.parametrize(("later", "seen"), [(ValueError("later"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_the_first_error_is_the_one_that_is_seen(
        monkeypatch: pytest.MonkeyPatch, later: BaseException, seen: type[BaseException]) -> None:
    def fail(*_: Any) -> None:
        raise OSError("first")

    monkeypatch.setattr(links, "copy_file", fail)
    with pytest.raises(seen):
        end_with(later, wait=True)


def test_an_error_that_follows_from_the_end_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(_: Path, __: Path, advance: Callable[[int], object]) -> None:
        try:
            advance_until_stopped(advance)
        finally:
            raise OSError("its folder is gone")

    monkeypatch.setattr(links, "copy_file", copy)
    with pytest.raises(ValueError, match="first"):
        end_with(ValueError("first"), wait=False)
