"""`verify` as a whole: a sound checkpoint passes every check, and everything is said."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from planted import EMBEDDING, detail, draw_fewer_texts, edit_tensor, edit_tokenizer, failed, flip_last_bit, skipped
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, expanded_pair

from vocabext.checkpoint.verdicts import FAIL, PASS
from vocabext.cli.verify import verify as command
from vocabext.corpus import Document
from vocabext.errors import BadCheckpointError, CheckpointError, CorpusError, TokenizerError, UsageError
from vocabext.verify.stage import verify

BASE = "made from this base"
VLLM = "loads in vLLM, same greedy output"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return expanded_pair(tmp_path_factory.mktemp("pair"), tied=request.param)


@pytest.fixture
def pair(sound: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(sound[0], tmp_path / "base")), Path(shutil.copytree(sound[1], tmp_path / "expanded"))

@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_fewer_texts(monkeypatch)


@pytest.mark.slow
def test_a_sound_checkpoint_passes_every_check(sound: tuple[Path, Path]) -> None:
    base, folder = sound
    result = verify(folder, str(base), DOCUMENTS)
    assert [c for c in result.checks if c.verdict != PASS and c.name != VLLM] == []
    assert skipped(result) == {VLLM: "not asked for; pass --vllm"}
    assert result.passed


def test_what_was_not_checked_is_said(sound: tuple[Path, Path]) -> None:
    result = verify(sound[1], str(sound[0]), load_weights=False)
    assert list(skipped(result)) == ["invariant on the corpus", "loads in transformers, same logits", VLLM]
    assert result.passed


@pytest.mark.slow
def test_a_base_with_other_ids_is_the_first_suspect(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", num_ids=280)
    result = verify(pair[1], str(other), load_weights=False)
    assert result.checks[0].verdict == FAIL
    assert result.checks[0].name == BASE
    assert re.search(rf"--against {other} is another model: it has 280 token ids, but .* made from \S+ with 290; pass",
                     result.checks[0].detail)


@pytest.mark.slow
def test_a_base_of_other_weights_is_the_first_suspect(pair: tuple[Path, Path]) -> None:
    edit_tensor(pair[0], EMBEDDING, flip_last_bit(7))
    result = verify(pair[1], str(pair[0]), load_weights=False)
    assert failed(result) == [BASE, "old rows bit-identical"]
    assert re.search("may be another model than .* digest [0-9a-f]{12}, recorded is [0-9a-f]{12}; pass",
                     detail(result, BASE))


def test_a_base_of_other_bytes_that_mean_the_same_is_no_fault(pair: tuple[Path, Path]) -> None:
    edit_tokenizer(pair[0], lambda document: None)
    result = verify(pair[1], str(pair[0]), load_weights=False)
    assert result.passed
    assert "tokenizer.json" in detail(result, BASE)
    assert detail(result, BASE).endswith("but no check found a difference")



def test_a_folder_that_is_no_expanded_checkpoint(sound: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        verify(tmp_path / "missing", str(sound[0]))
    with pytest.raises((UsageError, CheckpointError), match=r"vocabext\.json"):
        verify(sound[0], str(sound[0]))

@pytest.mark.slow
def test_the_command_writes_its_verdicts_and_fails_with_the_bad_checkpoint_code(pair: tuple[Path, Path]) -> None:
    arguments = [str(pair[1]), "--against", str(pair[0]), "--skip-weights"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert json.loads((pair[1] / "verify.json").read_text())["passed"] is True
    edit_tensor(pair[1], EMBEDDING, flip_last_bit(0))
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, BadCheckpointError)
    assert result.exception.exit_code == 3
    assert json.loads((pair[1] / "verify.json").read_text())["passed"] is False


def test_a_base_or_a_corpus_that_cannot_be_read_is_no_fault_of_the_checkpoint(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def unreadable() -> Iterator[Document]:
        raise CorpusError("notes.jsonl:1 has no field 'text'")
        yield

    with pytest.raises(CorpusError, match="no field"):
        verify(pair[1], str(pair[0]), unreadable(), load_weights=False)
    with pytest.raises(UsageError, match="does not exist"):
        verify(pair[1], str(tmp_path / "nowhere"), load_weights=False)
    for file, error in (("tokenizer.json", TokenizerError), ("model.safetensors", CheckpointError)):
        (pair[0] / file).unlink()
        with pytest.raises(error, match=r"there (is|are) no"):
            verify(pair[1], str(pair[0]), load_weights=False)
        shutil.copyfile(pair[1] / file, pair[0] / file)
