"""`revert` restores every byte of the base, or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from planted import EMBEDDING, HEAD, edit_tensor, edit_tensors, flip_last_bit, set_row, shard_of
from tiny_checkpoints import edit_json, hub_cache, tiny_folder
from tiny_expanded import expanded_pair, patched

from vocabext.checkpoint.manifest import ROWS_ORIGINAL
from vocabext.cli.revert import revert as command
from vocabext.errors import CheckpointError, OutputExistsError, UsageError
from vocabext.files.atomic import write_json
from vocabext.revert import RevertResult, revert
from vocabext.verify.stage import verify

UNTOUCHED = "model.layers.1.mlp.up_proj.weight"
# 292 rows have room for two of three new tokens, and grow to 296; 300 rows have room for all.
MADE: dict[str, dict[str, object]] = {
    "tied": {"tied": True}, "untied": {"tied": False}, "untied by us": {"tied": True, "untie": True},
    "several shards": {"tied": False, "sharded": True}, "several shards, hard links": {"sharded": True, "link": "hard"},
    "several shards, copies": {"sharded": True, "link": "copy", "dtype": torch.bfloat16},
    "several shards, untied by us": {"sharded": True, "untie": True},
    "grown": {"tied": False, "num_rows": 292}, "grown, untied by us": {"num_rows": 292, "untie": True},
    "grown by all": {"num_rows": 290, "dtype": torch.float16},
    "grown, several shards": {"num_rows": 291, "sharded": True},
    "another tokenizer": {"kind": "metaspace", "num_rows": 448},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("link", ["auto", "copy"])
def test_every_byte_of_the_base_comes_back(tmp_path: Path, made: str, link: str) -> None:
    base, folder = expanded_pair(tmp_path, **MADE[made])  # type: ignore[arg-type]
    wanted = contents(base)
    shutil.rmtree(base)
    result = revert(folder, tmp_path / "back", link=link)
    assert contents(tmp_path / "back") == wanted
    assert (result.num_files, result.num_bytes) == (len(wanted), sum(map(len, wanted.values())))
    assert result.lost == {}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return expanded_pair(tmp_path, tied=False, sharded=True, num_rows=292, link="copy")


def test_names_that_readers_would_load_and_old_tokenizer_files_come_back_too(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    for name in ("vocab.json", "special_tokens_map.json", "tokenizer.model"):
        (base / name).write_text("{}  ")
    wanted = contents(base)
    revert(patched(base, tmp_path), tmp_path / "back")
    assert contents(tmp_path / "back") == wanted


def test_links_of_a_hub_cache_come_back_as_files(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    linked = hub_cache(base, tmp_path / "models--a--b")
    revert(patched(linked, tmp_path), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert not any(path.is_symlink() for path in (tmp_path / "back").rglob("*"))


def test_what_was_not_kept_is_said(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    wanted = contents(base)
    (base / "pytorch_model.bin").write_bytes(b"weights once more")
    result = revert(patched(base, tmp_path), tmp_path / "back")
    assert contents(tmp_path / "back") == wanted
    assert list(result.lost) == ["pytorch_model.bin"]


# -- refusals -----------------------------------------------------------------------------------------------------

def in_tensor(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensor(folder, name, change)


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def change_last_byte(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    return plant


def in_manifest(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        document = json.loads((folder / "vocabext.json").read_text())
        change(document)
        (folder / "vocabext.json").write_text(json.dumps(document))

    return plant


def header_of(folder: Path) -> str:
    return next(path.relative_to(folder).as_posix() for path in folder.rglob("*.header.base"))


def cut_header(folder: Path) -> None:
    raw = (folder / header_of(folder)).read_bytes()
    (folder / header_of(folder)).write_bytes(raw[:-1])


def drop_a_tensor(folder: Path) -> None:
    edit_tensors(shard_of(folder, EMBEDDING), lambda found: found.pop(EMBEDDING))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop(EMBEDDING)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


IN_SHARDS = "a tensor in the new shards has changed since it was made: restored, model-.* has the digest"
REFUSED = {
    "an old row has changed": (in_tensor(EMBEDDING, flip_last_bit(3)), IN_SHARDS),
    "a row of the head has changed": (in_tensor(HEAD, flip_last_bit(3)), IN_SHARDS),
    "a tensor is lost": (drop_a_tensor, f"{EMBEDDING} of model-.* is missing or shorter than"),
    "a file has changed": (change_last_byte("README.md"), "README.md has changed since it was made"),
    "a file has grown": (lambda folder: (folder / "README.md").write_text("# tiny and more\n"),
                         "README.md of the base had 7 bytes, restored it has 16"),
    "a file is lost": (drop("extra/notes.txt"), "lacks extra/notes.txt, from which extra/notes.txt is restored; the"),
    "a kept file has changed": (change_last_byte("vocabext_base/config.json.base"), "config.json.base has changed"),
    "a kept file is lost": (drop("vocabext_base/tokenizer.json.base"), "from which tokenizer.json is restored"),
    "a kept header has changed": (cut_header, "has changed since it was made: it is no header of a shard"),
    "overwritten rows have changed": (change_last_byte(ROWS_ORIGINAL), "overwritten rows of .* have another digest"),
    "overwritten rows are lost": (drop(ROWS_ORIGINAL), "lacks vocabext_base/rows.bin.base, the rows that new ones"),
    "overwritten rows do not fit": (
        in_manifest(lambda document: document["originals"]["rows"][EMBEDDING].update(first_row=291)),
        f"the overwritten rows of {EMBEDDING} end at byte"),
    "an old manifest": (in_manifest(lambda document: document.update(version=1, originals=None)),
                        r"does not say how to restore the base, because vocabext \S+ kept nothing of it; the base is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_written_where_something_has_changed(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    plant, words = REFUSED[name]
    plant(pair[1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=words) as caught:
        revert(pair[1], tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_new_rows_may_have_changed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit_tensor(pair[1], EMBEDDING, set_row(290, 0.25))
    revert(pair[1], tmp_path / "back")
    assert contents(tmp_path / "back") == contents(pair[0])


@pytest.mark.slow
def test_a_shard_without_a_digest_is_said_unless_verify_has_seen_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    carried = shard_of(pair[1], UNTOUCHED)
    assert carried.name in revert(pair[1], tmp_path / "one").unproven
    result = verify(pair[1], str(pair[0]), load_weights=False)
    write_json(pair[1] / "verify.json", result.to_json())
    assert revert(pair[1], tmp_path / "two").unproven == ()
    edit_tensor(pair[1], UNTOUCHED, flip_last_bit(0))
    with pytest.raises(CheckpointError, match=f"{carried.name} has changed since it was made"):
        revert(pair[1], tmp_path / "three")


@pytest.mark.slow
def test_a_verify_that_fails_for_another_reason_keeps_the_digests(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for template in (True, False):
        if not template:
            (pair[1] / "generation_config.json").unlink()
        result = verify(pair[1], str(pair[0]), load_weights=False)
        write_json(pair[1] / "verify.json", result.to_json())
        assert result.passed == template
    shutil.copy(pair[0] / "generation_config.json", pair[1])
    assert revert(pair[1], tmp_path / "one").unproven == ()
    edit_tensor(pair[1], UNTOUCHED, flip_last_bit(0))
    write_json(pair[1] / "verify.json", verify(pair[1], str(pair[0]), load_weights=False).to_json())
    with pytest.raises(CheckpointError, match=f"{shard_of(pair[1], UNTOUCHED).name} has changed since it was made"):
        revert(pair[1], tmp_path / "two")


def test_places_where_nothing_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = pair
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for output, words in ((folder, "is the expanded checkpoint itself"), (folder / "in", "lie inside each other"),
                          (tmp_path, "lie inside each other"), (tmp_path / "other", "is no model folder"),
                          (tmp_path / "none" / "back", "does not exist")):
        with pytest.raises(UsageError, match=words):
            revert(folder, output, force=True)
    with pytest.raises(OutputExistsError):
        revert(folder, base)
    with pytest.raises(UsageError, match="does not exist"):
        revert(tmp_path / "missing", tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"no vocabext\.json"):
        revert(base, tmp_path / "back")


def test_a_full_disk_is_said_before_the_first_byte(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but .* has 1,000 bytes free"):
        revert(pair[1], tmp_path / "back")


def test_what_is_linked_takes_no_space(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = contents(pair[0])
    linked = sum(len(wanted[name]) for name in json.loads((pair[1] / "vocabext.json").read_text())
                 ["originals"]["carried_over"] if name.endswith(".safetensors"))
    assert linked
    monkeypatch.setattr("vocabext.revert.MARGIN_BYTES", 0)
    free = sum(map(len, wanted.values())) - linked
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    with pytest.raises(CheckpointError, match=f"needs {free + linked:,} bytes, but .* has {free:,} bytes free"):
        revert(pair[1], tmp_path / "back", link="copy")
    revert(pair[1], tmp_path / "back", link="hard")
    assert contents(tmp_path / "back") == wanted


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = pair
    arguments = [str(folder), "-o", str(tmp_path / "back")]
    run = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "files, " in run.stdout
    assert "without a recorded digest" in run.stdout
    assert isinstance(CliRunner().invoke(command, arguments).exception, OutputExistsError)
    edit_json(tmp_path / "back" / "config.json", vocab_size=1)
    run = CliRunner().invoke(command, [*arguments, "--force", "--link", "hard", "--json"], catch_exceptions=False)
    document = json.loads(run.stdout)
    assert document.keys() == RevertResult.__dataclass_fields__.keys()
    assert contents(tmp_path / "back") == contents(base)
    carried = shard_of(folder, UNTOUCHED).name
    assert (tmp_path / "back" / carried).samefile(folder / carried)
