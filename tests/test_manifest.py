"""Tests of vocabext.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from vocabext import __version__
from vocabext.checkpoint.manifest import (
    MANIFEST_NAME,
    BaseRecord,
    FileRecord,
    Manifest,
    Original,
    Originals,
    OverwrittenRows,
    TensorRecord,
    has_manifest,
    library_versions,
    read_manifest,
    token_records,
    write_manifest,
)
from vocabext.errors import CheckpointError, UsageError
from vocabext.files.ranges import file_sha256
from vocabext.tokens import NewToken

TOKENS = (NewToken(" heart", "Ġheart", (5, 6), 3, 3), NewToken(" é", "ĠÃ©", (5, 7, 8)))


def manifest() -> Manifest:
    return Manifest(
        base=BaseRecord("org/base", 300, 290, "c0", None, {"model.embed_tokens.weight": "e0"}),
        tokens=token_records(TOKENS, 290, [{"loss": 0.5}, {"loss": 0.25}]), method="mean", options={"seed": 0},
        head_rows="tied", files=FileRecord(("README.md",), ("config.json",), {"a.bin": "pickled"}), untied=True,
        tensors={"model.embed_tokens.weight": TensorRecord("embedding", "given", 300, 320, "model.safetensors",
                                                           (3, 5), "d4")},
        originals=Originals(
            carried_over={"README.md": Original(5, "d0", "README.md")},
            files={"config.json": Original(7, "d1", "vocabext_base/config.json.base")},
            shards={"model.safetensors": Original(900, "d2", "vocabext_base/model.safetensors.header.base")},
            rows={"model.embed_tokens.weight": OverwrittenRows(290, 2, 0, 64, "d3")}, lost={"a.bin": "pickled"}))


def edit(folder: Path, change: Any) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    change(document)
    (folder / MANIFEST_NAME).write_text(json.dumps(document))


def test_a_manifest_survives_the_file(tmp_path: Path) -> None:
    assert not has_manifest(tmp_path)
    write_manifest(tmp_path, manifest())
    found = read_manifest(tmp_path)
    assert has_manifest(tmp_path)
    assert (found.base, found.tokens, found.files) == (manifest().base, manifest().tokens, manifest().files)
    assert (found.untied, found.tensors, found.originals) == (True, manifest().tensors, manifest().originals)
    assert found.vocabext_version == __version__
    assert found.created.endswith("+00:00")
    assert found.libraries == library_versions()
    assert {"python", "torch", "transformers", "tokenizers"} <= found.libraries.keys()


def test_tokens_are_numbered_from_the_first_free_id() -> None:
    records = manifest().tokens
    assert [record.token_id for record in records] == [290, 291]
    assert [record.distill["loss"] for record in records] == [0.5, 0.25]
    assert records[1].new_token == NewToken(" é", "ĠÃ©", (5, 7, 8))
    assert manifest().first_new_id == 290
    assert [record.distill for record in token_records(TOKENS, 290)] == [{}, {}]


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no vocabext\.json; it is no expanded checkpoint"):
        read_manifest(tmp_path)
    with pytest.raises(UsageError, match="missing does not exist"):
        read_manifest(tmp_path / "missing")


def test_a_manifest_of_version_1_is_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    edit(tmp_path, lambda document: [document.pop(key) for key in ("untied", "tensors", "originals")])
    edit(tmp_path, lambda document: document.update(version=1))
    found = read_manifest(tmp_path)
    assert (found.untied, found.tensors, found.originals) == (False, {}, None)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "..\\b", ""])
@pytest.mark.parametrize("part", ["carried_over", "files", "shards"])
def test_originals_that_lie_elsewhere_are_refused(tmp_path: Path, path: str, part: str) -> None:
    original = {"num_bytes": 1, "sha256": None, "stored": "x"}
    for entry in ({path: original}, {"x": {**original, "stored": path}}):
        write_manifest(tmp_path, manifest())
        edit(tmp_path, lambda document, entry=entry: document["originals"][part].update(entry))
        with pytest.raises(CheckpointError, match="leads out of the folder"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(("change", "error"), [
    (lambda document: document.update(version=99), "format version 99, this vocabext reads 2"),
    (lambda document: document.pop("base"), "is damaged"),
    (lambda document: document.update(tokens=[3]), "is damaged"),
    (lambda document: document.update(tokens=3), "is damaged"),
    (lambda document: document["tokens"][0].update(token_id="x"), r"is damaged .*tokens\[0\]\.token_id"),
    (lambda document: document["tokens"][1].update(token_id=295), "the id 295, it should be 291"),
])
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: Any, error: str) -> None:
    write_manifest(tmp_path, manifest())
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=error):
        read_manifest(tmp_path)


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_manifest(tmp_path)


def test_a_missing_file_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "b") is None
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
