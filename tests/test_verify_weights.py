"""What `verify` says about weights, config and files: each fault makes exactly its own check fail."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from planted import (
    EMBEDDING,
    HEAD,
    detail,
    draw_fewer_texts,
    edit_tensor,
    edit_tensors,
    failed,
    flip_last_bit,
    opened,
    set_row,
    shard_of,
    skipped,
)
from tiny_checkpoints import edit_json
from tiny_expanded import TOKENS, expanded_pair, patched

from vocabext.checkpoint.verdicts import VERIFY_NAME, Verification
from vocabext.errors import CheckpointError
from vocabext.files.atomic import write_json
from vocabext.model import frozen as models
from vocabext.verify import logits, tensors
from vocabext.verify.pair import NotCheckedError
from vocabext.verify.stage import verify

SHARDS, CONFIG, TENSORS = "shards complete", "config agrees", "untouched tensors equal"
OLD, NEW, FILES = "old rows bit-identical", "new rows plausible", "files carried over"
PROMPTS, LOGITS = "prompts and chats as in the base", "loads in transformers, same logits"
UNTOUCHED = "model.layers.0.mlp.down_proj.weight"
FIRST, END = 290, 293  # ids of the new tokens

# How the pair is made; 292 rows grow to 296, of which three belong to no id.
MADE: dict[str, dict[str, object]] = {
    "tied": {"tied": True}, "sharded": {"tied": False, "sharded": True, "link": "copy"},
    "untied by us": {"tied": True, "untie": True, "dtype": torch.bfloat16}, "grown": {"tied": False, "num_rows": 292},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {name: expanded_pair(tmp_path_factory.mktemp(name.replace(" ", "-")), **options)  # type: ignore[arg-type]
            for name, options in MADE.items()}


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_fewer_texts(monkeypatch)
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 20)
    monkeypatch.setattr("vocabext.verify.behaviour.STREAMED", 20)


def copied(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return pair[0], Path(shutil.copytree(pair[1], tmp_path / "expanded"))


@pytest.mark.parametrize("made", MADE)
def test_sound_checkpoints_pass(sound: dict[str, tuple[Path, Path]], made: str) -> None:
    base, folder = sound[made]
    result = verify(folder, str(base))
    assert failed(result) == []
    assert "bit-equal" in detail(result, LOGITS)


# -- a fault for every check --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fault:
    """A fault to plant into a folder, the one check that must name it, and how."""

    plant: Callable[[Path], object]
    check: str
    words: str
    made: str = "tied"


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return plant


def name_another_shard(weight_map: dict[str, str]) -> None:
    weight_map[UNTOUCHED] = next(file for file in weight_map.values() if file != weight_map[UNTOUCHED])


def cut_short(folder: Path) -> None:
    path = shard_of(folder, UNTOUCHED)
    path.write_bytes(path.read_bytes()[:-10])


def announce_a_longer_header(folder: Path) -> None:
    path = shard_of(folder, UNTOUCHED)
    path.write_bytes((10**12).to_bytes(8, "little") + path.read_bytes()[8:])


def in_tensor(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensor(folder, name, change)


def in_file(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(shard_of(folder, UNTOUCHED), change)


def swap(row: int, other: int) -> Callable[[torch.Tensor], None]:
    def change(matrix: torch.Tensor) -> None:
        matrix[[row, other]] = matrix[[other, row]]

    return change


def in_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def other_type(found: dict[str, torch.Tensor]) -> None:
    found[UNTOUCHED] = found[UNTOUCHED].view(torch.int32)


def other_shape(found: dict[str, torch.Tensor]) -> None:
    found[UNTOUCHED] = found[UNTOUCHED].T.contiguous()


FAULTS = {
    "a shard is missing": Fault(
        lambda folder: shard_of(folder, UNTOUCHED).unlink(), SHARDS, "lacks the shard model-", "sharded"),
    "the index names a wrong shard": Fault(
        edit_index(name_another_shard), SHARDS, "is in model-.*not there", "sharded"),
    "the index names a shard elsewhere": Fault(
        edit_index(lambda names: names.update({UNTOUCHED: "../base/x"})), SHARDS, "no plain file name", "sharded"),
    "a shard is cut short": Fault(cut_short, SHARDS, "truncated", "sharded"),
    "a header is longer than the file": Fault(announce_a_longer_header, SHARDS, "announces a header of 1000000000000"),
    "a tensor is missing": Fault(in_file(lambda found: found.pop(UNTOUCHED)), SHARDS, f"missing tensors: {UNTOUCHED}$"),
    "a tensor too many": Fault(
        in_file(lambda found: found.update(odd=torch.zeros(1))), SHARDS, "unexpected tensors: odd$"),
    "vocab_size is off by one": Fault(in_config(vocab_size=301), CONFIG, "vocab_size 301, .* 300 rows"),
    "a setting has changed": Fault(in_config(rms_norm_eps=0.5), CONFIG, "rms_norm_eps is 0.5, in the base 1e-06"),
    "a setting is lost": Fault(in_config(hidden_act=None), CONFIG, "hidden_act is None, in the base 'silu'"),
    "the head is said to be its own": Fault(
        in_config(tie_word_embeddings=False), CONFIG, "tie_word_embeddings is False, in the base True"),
    "the head is said to be tied": Fault(
        in_config(tie_word_embeddings=True), CONFIG, "tie_word_embeddings is True, in the base False", "sharded"),
    "the separated head is said to be tied": Fault(
        in_config(tie_word_embeddings=True), CONFIG, "is tied .* and was separated here", "untied by us"),
    "a bit of an untouched tensor": Fault(
        in_tensor(UNTOUCHED, flip_last_bit(3)), TENSORS, f"the bytes of {UNTOUCHED} differ from the base, from byte"),
    "a bit in a shard that was copied": Fault(
        in_tensor("model.layers.1.mlp.up_proj.weight", flip_last_bit(0)), TENSORS, "layers.1.mlp.up_proj", "sharded"),
    "a tensor of another type": Fault(
        in_file(other_type), TENSORS, r"is F32 \[64, 96\] in the base and I32 \[64, 96\]"),
    "a tensor of another shape": Fault(
        in_file(other_shape), TENSORS, r"is F32 \[64, 96\] in the base and F32 \[96, 64\]"),
    "the last bit of an old row": Fault(in_tensor(EMBEDDING, flip_last_bit(7)), OLD, f"row 7 of {EMBEDDING} differs"),
    "a row behind the new ones": Fault(in_tensor(EMBEDDING, flip_last_bit(END)), OLD, f"row {END} of {EMBEDDING}"),
    "an old row of the head": Fault(in_tensor(HEAD, flip_last_bit(0)), OLD, f"row 0 of {HEAD} differs", "sharded"),
    "an old row of the separated head": Fault(
        in_tensor(HEAD, flip_last_bit(289)), OLD, f"row 289 of {HEAD} differs", "untied by us"),
    "a new row is no number": Fault(
        in_tensor(EMBEDDING, set_row(FIRST + 1, float("nan"))), NEW, f"{TOKENS[1]!r} in {EMBEDDING} has norm nan"),
    "a new row is infinite": Fault(
        in_tensor(HEAD, set_row(FIRST, float("inf"))), NEW, f"{TOKENS[0]!r} in {HEAD} has norm inf", "untied by us"),
    "a new row is zero": Fault(in_tensor(EMBEDDING, set_row(END - 1, 0.0)), NEW, f"{TOKENS[2]!r} .* has norm 0.0"),
    "a new row is 100 times too long": Fault(
        in_tensor(EMBEDDING, lambda matrix: matrix[FIRST].mul_(100)), NEW, "times as long as the longest base row"),
    "a row of no id is not zero": Fault(
        in_tensor(HEAD, set_row(END + 2, 0.5)), NEW, f"row 295 of {HEAD} is none of the base's and", "grown"),
    "two new rows change places": Fault(
        in_tensor(EMBEDDING, swap(FIRST, END - 1)), NEW, f"the new rows of {EMBEDDING} were changed after they were"),
    "the last bit of a new row": Fault(
        in_tensor(EMBEDDING, flip_last_bit(FIRST)), NEW, "digest is [0-9a-f]{12}, recorded is [0-9a-f]{12}; patch"),
    "the last bit of a new row of the separated head": Fault(
        in_tensor(HEAD, flip_last_bit(END - 1)), NEW, f"the new rows of {HEAD} were changed", "untied by us"),
    "the last bit of a new row that grew": Fault(
        in_tensor(HEAD, flip_last_bit(END - 1)), NEW, f"the new rows of {HEAD} were changed", "grown"),
    "the chat template is lost": Fault(
        lambda folder: (folder / "chat_template.jinja").unlink(), PROMPTS, "the chat template differs from the base"),
    "the generation config is lost": Fault(
        lambda folder: (folder / "generation_config.json").unlink(), FILES, "generation_config.json .* is missing now"),
    "the generation config has changed": Fault(
        lambda folder: edit_json(folder / "generation_config.json", top_k=3), FILES, "generation_config.json differs"),
    "a file below a folder has changed": Fault(
        lambda folder: (folder / "extra" / "notes.txt").write_text("Kept\n"), FILES, "extra/notes.txt differs"),
    "weights of somebody else": Fault(
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "more.safetensors"), FILES,
        "more.safetensors is no file of this checkpoint, and other readers may load weights from it; delete it"),
    "a pickle": Fault(
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), FILES, "pytorch_model.bin is no file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_makes_its_own_check_fail(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    base, folder = copied(sound[fault.made], tmp_path)
    fault.plant(folder)
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == [fault.check], [(c.name, c.detail) for c in result.checks if c.verdict == "fail"]
    with pytest.raises(AssertionError, match=fault.words):
        raise AssertionError(detail(result, fault.check))


def test_new_rows_that_an_older_version_wrote_have_no_digest(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, folder = copied(sound["sharded"], tmp_path)
    document = json.loads((folder / "vocabext.json").read_text())
    assert {len(record.pop("new_rows_sha256")) for record in document["tensors"].values()} == {64}
    (folder / "vocabext.json").write_text(json.dumps(document))
    edit_tensor(folder, HEAD, flip_last_bit(FIRST))
    result = verify(folder, str(base), load_weights=False)
    assert result.passed
    assert detail(result, NEW).endswith(f"; the bits of those in {EMBEDDING}, {HEAD} were not checked: no digest was "
                                        "recorded")


def test_a_check_that_breaks_off_takes_no_other_verdict_along(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = sound["tied"]

    def broken(error: Exception) -> Callable[..., str]:
        def check(*_: object) -> str:
            raise error

        return check

    monkeypatch.setattr("vocabext.verify.files.carried_over", broken(KeyError("odd")))
    monkeypatch.setattr("vocabext.verify.tensors.new_rows", broken(OSError("unreadable\nand more")))
    monkeypatch.setattr("vocabext.verify.tensors.old_rows", broken(MemoryError()))
    monkeypatch.setattr("vocabext.verify.config.config_agrees", broken(torch.OutOfMemoryError("CUDA out of memory")))
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == [NEW, FILES]
    assert detail(result, FILES) == "the check broke off with KeyError: 'odd'"
    assert detail(result, NEW) == "the check broke off with OSError: unreadable and more"
    assert skipped(result)[OLD] == "the memory is too small for it: MemoryError"
    assert skipped(result)[CONFIG] == "the memory is too small for it: CUDA out of memory"


def test_what_cannot_be_looked_into_is_not_checked(sound: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, folder = copied(sound["sharded"], tmp_path)
    cut_short(folder)
    result = verify(folder, str(base))
    assert failed(result) == [SHARDS]
    assert {CONFIG, TENSORS, OLD, NEW, LOGITS} <= skipped(result).keys()
    assert skipped(result)[OLD] == "the shards cannot be loaded"


def test_other_files_are_named_and_no_fault(sound: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, folder = copied(sound["tied"], tmp_path)
    (folder / "notes.md").write_text("mine\n")
    result = verify(folder, str(base), load_weights=False)
    assert result.passed
    assert detail(result, FILES).endswith("; there are also notes.md")


# -- shards that both folders share -------------------------------------------------------------------------------

@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path]:
    return expanded_pair(tmp_path, tied=False, sharded=True, link="hard")


def edit_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")


def test_shared_shards_are_recognised(linked: tuple[Path, Path]) -> None:
    base, folder = linked
    shared = [path.name for path in folder.glob("*.safetensors") if path.samefile(base / path.name)]
    result = verify(folder, str(base), load_weights=False)
    assert result.passed
    said = f"{len(shared)} shards shared with the base on the disk (0 with a recorded digest)"
    assert said in detail(result, TENSORS)
    assert sorted(result.carried_sha256) == sorted(shared)


def test_a_shared_shard_that_was_edited_has_another_digest_than_at_the_first_verify(linked: tuple[Path, Path]) -> None:
    base, folder = linked
    first = verify(folder, str(base), load_weights=False)
    write_json(folder / VERIFY_NAME, first.to_json())
    again = verify(folder, str(base), load_weights=False)
    assert again.passed
    assert f"({len(first.carried_sha256)} with a recorded digest)" in detail(again, TENSORS)
    edit_in_place(folder / min(first.carried_sha256))
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == [TENSORS]
    assert "(a hard link), and was changed after it was linked" in detail(result, TENSORS)


def verify_and_write(base: Path, folder: Path) -> Verification:
    result = verify(folder, str(base), load_weights=False)
    write_json(folder / VERIFY_NAME, result.to_json())
    return result


@pytest.mark.slow
def test_a_shared_shard_that_was_edited_fails_however_often_it_is_verified(linked: tuple[Path, Path]) -> None:
    base, folder = linked
    first = verify_and_write(base, folder)
    edit_in_place(folder / max(first.carried_sha256))
    for _ in range(3):
        result = verify_and_write(base, folder)
        assert failed(result) == [TENSORS]
        assert result.carried_sha256 == first.carried_sha256


def test_copies_that_were_edited_on_both_sides_have_another_digest(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, folder = (Path(shutil.copytree(path, tmp_path / path.name)) for path in sound["sharded"])
    first = verify_and_write(base, folder)
    assert first.passed
    file = min(first.carried_sha256)
    for path in (base, folder):
        edit_in_place(path / file)
    for _ in range(2):
        result = verify_and_write(base, folder)
        assert failed(result) == [TENSORS]
        assert f"{file} is equal to the base's, but both were changed since" in detail(result, TENSORS)
        assert result.carried_sha256 == first.carried_sha256


def test_a_folder_that_is_made_anew_has_no_digests_of_the_old_one(linked: tuple[Path, Path]) -> None:
    base, folder = linked
    file = min(verify_and_write(base, folder).carried_sha256)
    edit_in_place(base / file)  # another base now, as far as anybody knows
    patched(base, folder.parent, link="hard", force=True)
    assert not (folder / VERIFY_NAME).exists()
    assert verify_and_write(base, folder).passed


# -- in chunks ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_small_chunks_find_the_same(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = copied(sound["grown"], tmp_path)
    for chunk in (1, 300, 10_000):  # a row has 256 bytes
        monkeypatch.setattr("vocabext.files.ranges.READ_BYTES", chunk)
        monkeypatch.setattr(tensors, "CHUNK_BYTES", chunk)
        pair = opened(base, folder)
        assert tensors.old_rows(pair).startswith("580 rows in")
        assert tensors.new_rows(pair, 3.0).startswith("3 rows, the longest 0.")


# -- what the model computes --------------------------------------------------------------------------------------

def test_other_logits_are_caught_without_any_other_difference(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = sound["tied"]
    load = logits._load

    def load_scaled(pair: object, *, new: bool) -> object:
        loaded = load(pair, new=new)  # type: ignore[arg-type]
        if new:
            loaded.model.lm_head.weight.mul_(1.01)
        return loaded

    monkeypatch.setattr(logits, "_load", load_scaled)
    assert failed(verify(folder, str(base))) == [LOGITS]


def test_logits_that_are_equal_up_to_rounding_must_be_so_for_the_kernel_s_sake_alone(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = opened(*sound["grown"])
    real, epsilon = logits._logits, 1e-7

    def rounded(loaded: object, pair: object, rows: object) -> list[torch.Tensor]:
        """As if a head of another length were multiplied by a kernel that rounds otherwise."""
        found = real(loaded, pair, rows)  # type: ignore[arg-type]
        grown = loaded.model.get_output_embeddings().weight.shape[0] == 296  # type: ignore[attr-defined]
        return [one * (1 + epsilon) for one in found] if grown else found

    monkeypatch.setattr(logits, "_logits", rounded)
    assert logits.same_logits(pair, True).endswith("bit-equal over the base's rows, up to rounding over all")
    monkeypatch.setattr(logits, "_cut_head", lambda loaded, num_rows: None)
    with pytest.raises(Exception, match="are the base's up to rounding, but not to the last bit"):
        logits.same_logits(pair, True)


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "_available_bytes", lambda: 1000)
    with pytest.raises(NotCheckedError, match=r"takes [\d,]+ bytes of memory, and 1,000 are available"):
        logits.same_logits(opened(*sound["tied"]), True)


def test_weights_that_transformers_refuses(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = sound["tied"]
    load = models.load_model

    def refuse(path: Path, **options: object) -> models.FrozenModel:
        if path == folder:
            raise CheckpointError(f"transformers cannot load {path}: it says why")
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "load_model", refuse)
    result = verify(folder, str(base))
    assert failed(result) == [LOGITS]
    assert detail(result, LOGITS) == f"transformers cannot load {folder}: it says why"


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_memory_is_that_of_the_numbers_it_computes_in(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int
) -> None:
    """Weights stored in bfloat16 take twice their size on a processor that does not multiply it."""
    pair = opened(*sound["untied by us"])
    needed = int(logits.MEMORY_FACTOR * size * pair.new.weight_bytes / 2)
    monkeypatch.setattr(models, "pick_dtype", lambda name, device: dtype)
    monkeypatch.setattr(logits, "_available_bytes", lambda: needed - 1)
    with pytest.raises(NotCheckedError, match=f"takes {needed:,} bytes of memory, and {needed - 1:,} are available"):
        logits.same_logits(pair, True)
    monkeypatch.setattr(logits, "_available_bytes", lambda: needed)
    logits._check_memory(pair)


def test_memory_that_is_too_small_for_the_second_model_is_no_fault(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = sound["tied"]
    real, calls = logits._logits, 0

    def compute(loaded: object, pair: object, rows: object) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls > 2:  # the base is asked twice
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loaded, pair, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(logits, "_logits", compute)
    result = verify(folder, str(base))
    assert failed(result) == []
    assert skipped(result)[LOGITS] == "the memory is too small for it: CUDA out of memory"


@pytest.mark.parametrize("broken", ["base", "expanded"])
def test_a_base_that_cannot_be_run_is_no_fault_but_a_folder_that_cannot_is(
    sound: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    base, folder = sound["tied"]
    real, load = logits._logits, logits._load
    loaded_as: dict[int, str] = {}

    def remember(pair: object, *, new: bool) -> object:
        model = load(pair, new=new)  # type: ignore[arg-type]
        loaded_as[id(model)] = "expanded" if new else "base"
        return model

    def compute(loaded: object, pair: object, rows: object) -> list[torch.Tensor]:
        if loaded_as[id(loaded)] == broken:
            raise TypeError("where() received an invalid combination\nof arguments")
        return real(loaded, pair, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(logits, "_load", remember)
    monkeypatch.setattr(logits, "_logits", compute)
    result = verify(folder, str(base))
    assert failed(result) == ([LOGITS] if broken == "expanded" else [])
    said = {"base": "the base itself cannot be run on text alone",
            "expanded": "the base can be run on text, this folder cannot"}[broken]
    assert detail(result, LOGITS) == f"{said}: where() received an invalid combination of arguments"
