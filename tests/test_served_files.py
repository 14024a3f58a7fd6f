"""A verdict of `verify` belongs to the files that it checked: others are not served."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from planted import detail, draw_fewer_texts, edit_tensor, failed, flip_last_bit, overwrite_last_byte
from tiny_expanded import expanded_pair

from vocabext.api.model import Expanded, Model
from vocabext.checkpoint import served
from vocabext.errors import CheckpointError
from vocabext.serve.model import card_of, require_verified
from vocabext.verify import behaviour
from vocabext.verify.stage import RECORDED, verify

OLD = Path(__file__).parent / "data" / "0.2.0" / "expanded"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and its expansion that `verify` has passed."""
    with pytest.MonkeyPatch.context() as patched:
        draw_fewer_texts(patched)
        base, folder = expanded_pair(tmp_path_factory.mktemp("made"), link="copy")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        shutil.copy(folder / "chat_template.jinja", base)
        assert Expanded(folder, Model(str(base))).verify(skip_weights=True).passed
    return base, folder


@pytest.fixture
def folder(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "expanded"))


def refusal(folder: Path, *, check_digests: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        require_verified(folder, check_digests=check_digests)
    assert "\n" not in str(caught.value)
    assert f"run: vocabext verify {folder} --against " in str(caught.value)
    return str(caught.value)


def test_a_folder_is_served_as_it_was_verified_wherever_it_lies(folder: Path) -> None:
    recorded = json.loads((folder / "verify.json").read_text())["files"]
    assert recorded.keys() == {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                               "tokenizer.json", "tokenizer_config.json", "vocabext.json"}
    (folder / "README.md").write_text("# results")
    (folder / "eval.json").write_text("{}")
    require_verified(folder, check_digests=True)
    assert dict(card_of(folder))["verified"] == "passed"


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def overwritten(path: Path) -> None:
    """Change a byte; a JSON file stays one."""
    if path.name == "vocabext.json":
        path.write_text(path.read_text().replace('"method": "mean"', '"method": "maen"'))
    else:
        overwrite_last_byte(path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "vocabext.json",
                                  "chat_template.jinja"])
@pytest.mark.parametrize("change", [longer, overwritten, Path.unlink])
def test_a_file_that_was_changed_after_verify_is_refused_by_name_with_both_values(
    folder: Path, name: str, change: Callable[[Path], None]
) -> None:
    record = json.loads((folder / "verify.json").read_text())["files"][name]
    size, digest = record["num_bytes"], record["sha256"][:12]
    change(folder / name)
    if name == "vocabext.json" and change is Path.unlink:
        with pytest.raises(CheckpointError, match=r"\(vocabext_base/\) without its vocabext\.json; copy"):
            require_verified(folder)
        return
    said = refusal(folder, check_digests=True)
    assert {longer: f"{name} has {size + 1:,} bytes; {size:,} were verified",
            overwritten: f"; {digest} was verified; run",
            Path.unlink: f"{name} is missing; {size:,} bytes were verified"}[change] in said
    if name == "model.safetensors" and change is overwritten:
        require_verified(folder)  # without reading the weights
    else:
        assert refusal(folder) == said
        assert f"changed since: {name} " in dict(card_of(folder))["verified"]


def test_a_copied_verdict_is_refused(folder: Path, tmp_path: Path) -> None:
    _, other = expanded_pair(tmp_path / "other", texts=[" the heart", " so on"])
    shutil.copy(folder / "verify.json", other)
    assert "is not as it was verified" in refusal(other)


@pytest.mark.parametrize("name", ["model-2.safetensors", "added_tokens.json", "modeling.py", "merges.txt",
                                  "additional_chat_templates/tool.jinja"])
def test_a_file_that_was_added_after_verify_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert f"{name} was added; it was not verified" in refusal(folder)


def test_a_verdict_of_an_older_version_is_refused_with_the_way_on(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    (folder / "verify.json").write_text('{"artifact": "verify", "version": 1, "passed": true, "checks": []}')
    said = refusal(folder)
    assert f"verify.json of {folder} was made by an older version" in said
    assert said.endswith("or pass --unverified to serve it all the same")


def test_a_damaged_record_is_refused(folder: Path) -> None:
    document = json.loads((folder / "verify.json").read_text())
    (folder / "verify.json").write_text(json.dumps({**document, "files": {"config.json": 7}}))
    with pytest.raises(CheckpointError, match=r"verify\.json is damaged"):
        require_verified(folder)


def test_a_file_that_changes_while_it_is_verified_is_a_fault(
    made: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_fewer_texts(monkeypatch)
    monkeypatch.setattr(behaviour, "old_ids", lambda pair: overwrite_last_byte(folder / "tokenizer_config.json") or "")
    result = verify(folder, str(made[0]), load_weights=False)
    assert failed(result) == [RECORDED]
    assert detail(result, RECORDED) == "tokenizer_config.json was changed while it was verified; run verify again"
    assert result.files == {}


def test_no_files_are_recorded_for_a_folder_that_failed(
    made: tuple[Path, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_fewer_texts(monkeypatch)
    monkeypatch.setattr(served.Extent, "sha256", None)  # nothing is read for nothing
    edit_tensor(folder, "model.embed_tokens.weight", flip_last_bit(3))
    result = verify(folder, str(made[0]), load_weights=False)
    assert not result.passed
    assert result.files == {}
