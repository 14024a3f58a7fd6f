"""Every check of `verify` passes on a sound checkpoint and fires on the fault it is there for."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import edit_json
from tiny_expanded import DOCUMENTS, TOKENS, expanded_pair

from vocabext.cli.verify import verify as command
from vocabext.errors import BadCheckpointError, CheckpointError, CorpusError, TokenizerError, UsageError
from vocabext.records import Document
from vocabext.verify import FAIL, PASS, SKIPPED, Verification, adversarial_texts, verify

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return expanded_pair(tmp_path_factory.mktemp("pair"), tied=request.param)


@pytest.fixture
def pair(sound: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(sound[0], tmp_path / "base")), Path(shutil.copytree(sound[1], tmp_path / "expanded"))


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.NUM_ADVERSARIAL", 500)


def failed(result: Verification) -> list[str]:
    return [check.name for check in result.checks if check.verdict == FAIL]


def test_a_sound_checkpoint_passes_every_check(sound: tuple[Path, Path]) -> None:
    base, folder = sound
    result = verify(folder, str(base), DOCUMENTS)
    assert {check.verdict for check in result.checks} == {PASS}, [c for c in result.checks if c.verdict != PASS]
    assert result.passed


def test_what_was_not_checked_is_said(sound: tuple[Path, Path]) -> None:
    result = verify(sound[1], str(sound[0]), load_weights=False)
    assert [c.name for c in result.checks if c.verdict == SKIPPED] == [
        "invariant on the corpus", "loads in transformers, same logits"]
    assert result.passed


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors[name] = new if (new := change(tensors[name])) is not None else tensors[name]
    save_file(tensors, path, metadata)


def flip_last_bit(row: int) -> Callable[[torch.Tensor], None]:
    def change(matrix: torch.Tensor) -> None:
        matrix.view(torch.uint8)[row, 0] ^= 1

    return change


def test_a_flipped_bit_in_an_untouched_tensor(pair: tuple[Path, Path]) -> None:
    edit_tensor(pair[1], "model.layers.0.mlp.down_proj.weight", flip_last_bit(3))
    result = verify(pair[1], str(pair[0]), load_weights=False)
    assert failed(result) == ["untouched tensors equal"]


def test_a_flipped_bit_in_an_old_row(pair: tuple[Path, Path]) -> None:
    edit_tensor(pair[1], EMBEDDING, flip_last_bit(7))
    result = verify(pair[1], str(pair[0]), load_weights=False)
    assert failed(result) == ["old rows bit-identical"]
    assert "row 7" in next(c.detail for c in result.checks if c.verdict == FAIL)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "norm nan"), (0.0, "norm 0.0"), (1e3, "times as long")])
def test_an_implausible_new_row(pair: tuple[Path, Path], value: float, words: str) -> None:
    first = json.loads((pair[1] / "vocabext.json").read_text())["tokens"][0]["token_id"]

    def change(matrix: torch.Tensor) -> None:
        matrix[first + 1] = value

    edit_tensor(pair[1], EMBEDDING, change)
    result = verify(pair[1], str(pair[0]), load_weights=False)
    assert failed(result) == ["new rows plausible"]
    assert words in next(c.detail for c in result.checks if c.verdict == FAIL)
    assert repr(TOKENS[1]) in next(c.detail for c in result.checks if c.verdict == FAIL)


def test_a_changed_setting(pair: tuple[Path, Path]) -> None:
    edit_json(pair[1] / "config.json", rms_norm_eps=0.5)
    names = failed(verify(pair[1], str(pair[0])))
    # There were free rows, so the file was carried over as it is: its bytes are checked, too.
    assert names == ["config agrees", "files carried over", "loads in transformers, same logits"]


def test_a_vocabulary_size_that_is_off_by_one(pair: tuple[Path, Path]) -> None:
    rows = json.loads((pair[1] / "config.json").read_text())["vocab_size"]
    edit_json(pair[1] / "config.json", vocab_size=rows + 1)
    assert "config agrees" in failed(verify(pair[1], str(pair[0]), load_weights=False))


def test_a_file_that_was_lost_changed_or_should_not_be_there(pair: tuple[Path, Path]) -> None:
    (pair[1] / "extra" / "notes.txt").write_text("other\n")
    assert failed(verify(pair[1], str(pair[0]), load_weights=False)) == ["files carried over"]
    (pair[1] / "extra" / "notes.txt").unlink()
    assert failed(verify(pair[1], str(pair[0]), load_weights=False)) == ["files carried over"]


def test_a_lost_chat_template(pair: tuple[Path, Path]) -> None:
    (pair[1] / "chat_template.jinja").unlink()
    assert failed(verify(pair[1], str(pair[0]), load_weights=False)) == ["files carried over", "old token ids kept"]


def edit_tokenizer(folder: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_two_swapped_ids(pair: tuple[Path, Path]) -> None:
    def swap(document: dict) -> None:  # type: ignore[type-arg]
        vocabulary = document["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_tokenizer(pair[1], swap)
    names = failed(verify(pair[1], str(pair[0]), DOCUMENTS, load_weights=False))
    assert {"old token ids kept", "invariant on the corpus", "invariant on adversarial text"} <= set(names)


def test_a_removed_merge(pair: tuple[Path, Path]) -> None:
    edit_tokenizer(pair[1], lambda document: document["model"]["merges"].pop(0))
    assert failed(verify(pair[1], str(pair[0]), load_weights=False)) == ["invariant on adversarial text"]


def test_a_lost_pre_tokenizer_makes_tokens_unreachable(pair: tuple[Path, Path]) -> None:
    original = json.loads((pair[0] / "tokenizer.json").read_text())["pre_tokenizer"]
    edit_tokenizer(pair[1], lambda document: document.update(pre_tokenizer=original))
    assert failed(verify(pair[1], str(pair[0]), DOCUMENTS, load_weights=False)) == ["new tokens reachable and readable"]


def test_a_split_without_its_guard(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path, texts=[" are rat", *TOKENS])

    def drop_guard(document: dict) -> None:  # type: ignore[type-arg]
        step = document["pre_tokenizer"]["pretokenizers"][0]
        guard = r"(?![\p{L}\p{M}\p{N}'’])"
        assert guard in step["pattern"]["Regex"]
        step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(guard, "")

    assert verify(folder, str(base), DOCUMENTS, load_weights=False).passed
    edit_tokenizer(folder, drop_guard)
    # The corpus does not show it, the generated text does.
    assert failed(verify(folder, str(base), DOCUMENTS, load_weights=False)) == ["invariant on adversarial text"]


def test_a_token_that_stands_for_another_run(pair: tuple[Path, Path]) -> None:
    manifest = json.loads((pair[1] / "vocabext.json").read_text())
    manifest["tokens"][0]["run"][0] += 1
    (pair[1] / "vocabext.json").write_text(json.dumps(manifest))
    names = failed(verify(pair[1], str(pair[0]), DOCUMENTS, load_weights=False))
    assert {"new tokens reachable and readable", "invariant on the corpus"} <= set(names)


def test_weights_that_do_not_load(pair: tuple[Path, Path]) -> None:
    (pair[1] / "model.safetensors").write_bytes(b"nothing")
    assert "loads in transformers, same logits" in failed(verify(pair[1], str(pair[0])))


def test_other_logits_are_caught_without_any_other_difference(pair: tuple[Path, Path],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from vocabext import model as models

    load = models.load_model

    def load_scaled(folder: Path, **options: object) -> models.FrozenModel:
        loaded = load(folder, **options)  # type: ignore[arg-type]
        if Path(folder) == pair[1]:
            loaded.model.lm_head.weight.mul_(1.01)
        return loaded

    monkeypatch.setattr(models, "load_model", load_scaled)
    assert failed(verify(pair[1], str(pair[0]))) == ["loads in transformers, same logits"]


def test_a_folder_that_is_no_expanded_checkpoint(sound: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        verify(tmp_path / "missing", str(sound[0]))
    with pytest.raises((UsageError, CheckpointError), match=r"vocabext\.json"):
        verify(sound[0], str(sound[0]))


def test_adversarial_text_holds_new_tokens_and_repeats_for_a_seed(sound: tuple[Path, Path]) -> None:
    from vocabext.expansion import Expansion
    from vocabext.tokenizer import load_tokenizer

    base = load_tokenizer(sound[0])
    expansion = Expansion([base.new_token(text) for text in TOKENS], base.num_used_ids)
    texts = list(adversarial_texts(base, expansion, 200, 0))
    assert texts == list(adversarial_texts(base, expansion, 200, 0))
    assert texts != list(adversarial_texts(base, expansion, 200, 1))
    assert sum(any(token in text for token in TOKENS) for text in texts) > 100


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
