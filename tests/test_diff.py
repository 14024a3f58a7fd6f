"""`diff` says what an expansion has changed, and nothing else."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from planted import EMBEDDING, HEAD, edit_tensor, flip_last_bit
from tiny_checkpoints import tiny_folder
from tiny_expanded import TOKENS, expanded_pair

from vocabext.cli.diff import diff as command
from vocabext.diff import ADDED, CHANGED, LINKED, REMOVED, SAME, diff
from vocabext.errors import CheckpointError, UsageError

UNTOUCHED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return expanded_pair(tmp_path, tied=False, sharded=True, num_rows=292, link="hard")


def test_files_are_the_same_linked_changed_added_or_left_out(pair: tuple[Path, Path]) -> None:
    base, folder = pair
    (base / "pytorch_model.bin").write_bytes(b"x")
    (folder / "README.md").write_text("# Tiny\n")  # as long as before
    found = {file.name: file for file in diff(str(base), folder).files}
    assert found["extra/notes.txt"].state == SAME
    assert found["README.md"].state == CHANGED
    assert found["vocabext.json"].state == ADDED
    assert (found["pytorch_model.bin"].state, found["pytorch_model.bin"].bytes_after) == (REMOVED, None)
    linked = {name for name, file in found.items() if file.state == LINKED}
    assert linked == {path.name for path in folder.glob("*.safetensors") if path.samefile(base / path.name)} != set()


def test_tensors_rows_and_settings(pair: tuple[Path, Path]) -> None:
    base, folder = pair
    found = diff(str(base), folder)
    assert [(t.name, t.rows_before, t.rows_after, t.width) for t in found.tensors] == [
        (HEAD, 292, 296, (64,)), (EMBEDDING, 292, 296, (64,))]
    assert found.config == {"vocab_size": (292, 296)}
    rows = found.rows
    assert (rows.num_new, rows.first_id, rows.last_id, rows.num_free_taken, rows.num_surplus) == (3, 290, 292, 2, 3)
    edit_tensor(folder, UNTOUCHED, flip_last_bit(0))
    changed = next(t for t in diff(str(base), folder).tensors if t.name == UNTOUCHED)
    assert changed.note == "unexpected: it should be as in the base"


def test_a_separated_head_is_a_tensor_that_was_not_there(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path, untie=True)
    head = next(t for t in diff(str(base), folder).tensors if t.name == HEAD)
    assert (head.rows_before, head.rows_after) == (None, 300)
    assert head.note.startswith("head; new rows: ")


def test_tokens_show_their_runs_and_how_text_is_cut(pair: tuple[Path, Path]) -> None:
    base, folder = pair
    found = diff(str(base), folder, ["x the heart of the muscle", "no news"])
    assert [token.token for token in found.tokens] == TOKENS
    for token in found.tokens:
        assert "".join(token.pieces) == token.token
        assert token.example is not None
        assert token.token in token.example.after
        assert "".join(token.example.before) == "".join(token.example.after) == token.example.text
    news, none = found.examples
    assert " the heart" in news.after
    assert news.before[1:3] == (" the", " heart")
    assert none.before == none.after


def test_another_base_and_other_folders_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = pair
    other = tiny_folder(tmp_path / "other", num_ids=280)
    with pytest.raises(CheckpointError, match=r"with 290 token ids, but .* has 280; pass the base it was made from"):
        diff(str(other), folder)
    with pytest.raises(CheckpointError, match=r"no vocabext\.json"):
        diff(str(folder), base)
    with pytest.raises(UsageError, match="does not exist"):
        diff(str(tmp_path / "missing"), folder)


def test_the_command_writes_a_page_or_json(pair: tuple[Path, Path]) -> None:
    base, folder = pair
    arguments = [str(base), str(folder), "--text", "x the heart"]
    page = CliRunner().invoke(command, [*arguments, "--tokens", "1"], catch_exceptions=False).stdout
    for line in ("config.json: vocab_size is 296, was 292", "19 of 21 tensors have the same bytes", "' muscle of'",
                 "3 new rows (ids 290 to 292): 2 took free rows, 1 were added, with 3 unused behind them",
                 "and 2 more; --tokens or --json shows them", "x| the heart"):
        assert line in page
    assert "' are rated'" not in page
    document = json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert [token["run"] for token in document["tokens"]] == [list(t.run) for t in diff(str(base), folder).tokens]
