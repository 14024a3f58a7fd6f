"""Every family: `verify` passes, `revert` gives every byte back, `diff` and `inspect` name the tables."""

from pathlib import Path

import pytest
from planted import HEAD, edit_tensor, failed, set_row, skipped
from test_patch import make_rows
from tiny_families import FAMILIES, tiny_family

from vocabext.checks import behaviour
from vocabext.diff import diff
from vocabext.inspect_model import inspect_model
from vocabext.manifest import read_manifest
from vocabext.patch import patch
from vocabext.revert import revert
from vocabext.verify import verify

TEXTS = tuple(f" heart {word}" for word in ("rate", "muscle", "of", "and", "the", "rest", "so", "a"))
LOGITS = "loads in transformers, same logits"
NOT_RUN = {"llava"}  # transformers has no causal model for it


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.NUM_ADVERSARIAL", 50)
    monkeypatch.setattr(behaviour, "STREAMED", 20)
    monkeypatch.setattr(behaviour, "RANDOM_ROWS", 20)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expanded(tmp_path: Path, family: str) -> tuple[Path, Path]:
    base = tiny_family(tmp_path / "base", family)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    return base, tmp_path / "new"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_there_and_back(tmp_path: Path, family: str) -> None:
    base, folder = expanded(tmp_path, family)
    result = verify(folder, str(base))
    assert failed(result) == []
    assert (LOGITS in skipped(result)) == (family in NOT_RUN)
    revert(folder, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    roles = {record.role for record in read_manifest(folder).tensors.values()}
    assert {row.role for row in inspect_model(str(base)).row_tensors} == roles
    changed = {tensor.note.split(";")[0] for tensor in diff(str(base), folder).tensors}
    assert changed == roles


def test_a_bias_of_no_id_must_be_silent(tmp_path: Path) -> None:
    base, folder = expanded(tmp_path, "phi")
    assert failed(verify(folder, str(base), load_weights=False)) == []
    edit_tensor(folder, HEAD.replace("weight", "bias"), set_row(300, 0.0))
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == ["new rows plausible"]
