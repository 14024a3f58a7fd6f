"""Every check of `verify` passes on a sound checkpoint and fires on the fault it is there for."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import edit_json, tiny_folder
from tiny_expanded import DOCUMENTS, TOKENS, expanded_pair

from vocabext.checks import behaviour
from vocabext.checks.pair import FaultError, Pair
from vocabext.cli.verify import verify as command
from vocabext.errors import BadCheckpointError, CheckpointError, CorpusError, TokenizerError, UsageError
from vocabext.manifest import read_manifest
from vocabext.records import Document
from vocabext.verify import FAIL, PASS, SKIPPED, Verification, verify

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
    monkeypatch.setattr(behaviour, "STREAMED", 300)
    monkeypatch.setattr(behaviour, "RANDOM_ROWS", 200)


def failed(result: Verification) -> list[str]:
    return [check.name for check in result.checks if check.verdict == FAIL]


def detail(result: Verification, name: str) -> str:
    return next(check.detail for check in result.checks if check.name == name)


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
    assert failed(verify(pair[1], str(pair[0]), load_weights=False)) == [
        "files carried over", "prompts and chats as in the base"]


# -- the tokenizer ------------------------------------------------------------------------------------------------

KINDS = ("gpt2", "llama3", "metaspace")
PIPELINE, OLD_IDS, STALE = "tokenizer is the base's, extended", "old token ids kept", "no stale tokenizer files"
# Checks that may see what a fault does to text, depending on the texts that are drawn.
BEHAVIOUR = {OLD_IDS, "prompts and chats as in the base", "invariant on the corpus", "invariant on adversarial text",
             "streaming and offsets", "new tokens reachable and readable"}  # fmt: skip
PHRASE, WORD = " the heart", " heartless"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def sound_families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {kind: expanded_pair(tmp_path_factory.mktemp(kind), kind=kind, num_rows=448,
                                texts=[PHRASE, WORD, " are rat", " muscle"]) for kind in KINDS}  # fmt: skip


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest, sound_families: dict[str, tuple[Path, Path]],
           tmp_path: Path) -> tuple[Path, Path]:  # fmt: skip
    base, folder = sound_families[request.param]
    return base, Path(shutil.copytree(folder, tmp_path / request.param))


def edit_tokenizer(folder: Path, change: Callable[[Json], object]) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def token_id(folder: Path, text: str) -> int:
    tokens = json.loads((folder / "vocabext.json").read_text())["tokens"]
    return next(int(token["token_id"]) for token in tokens if token["token"] == text)


def added_token(content: str, token_id: int) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": token_id, "content": content, **flags}


def key_of(folder: Path, text: str) -> str:
    tokens = json.loads((folder / "vocabext.json").read_text())["tokens"]
    return next(str(token["key"]) for token in tokens if token["token"] == text)


def move_to_added_tokens(folder: Path) -> None:
    def move(document: Json) -> None:
        document["model"]["vocab"].pop(key_of(folder, WORD))
        document["added_tokens"].append(added_token(WORD, token_id(folder, WORD)))

    edit_tokenizer(folder, move)


def add_beside(folder: Path) -> None:
    edit_tokenizer(folder, lambda document: document["added_tokens"].append(
        added_token(WORD, 1 + max(document["model"]["vocab"].values()))))  # fmt: skip


def drop_ignore_merges(folder: Path) -> None:
    edit_tokenizer(folder, lambda document: document["model"].update(ignore_merges=False))


def renumber_special_tokens(folder: Path) -> None:
    """What happens to special tokens that only stand among the added tokens, once the vocabulary grows."""

    def renumber(document: Json) -> None:
        for number, token in enumerate(document["added_tokens"]):
            document["model"]["vocab"].pop(token["content"])
            token["id"] = 1 + max(document["model"]["vocab"].values()) + number

    edit_tokenizer(folder, renumber)


def remove_a_merge(folder: Path) -> None:
    edit_tokenizer(folder, lambda document: document["model"]["merges"].pop(0))


def swap(first: str, second: str) -> Callable[[Path], None]:
    def change(document: Json) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    return lambda folder: edit_tokenizer(folder, change)


def swap_new(folder: Path) -> None:
    swap(key_of(folder, WORD), key_of(folder, PHRASE))(folder)


def drop_guards(folder: Path) -> None:
    """Take the assertions in front of and behind the new strings out of the expression."""

    def drop(document: Json) -> None:
        step = next(step for step in document["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split")
        expression = step["pattern"]["Regex"]
        step["pattern"]["Regex"] = re.sub(r"\(\?<?[=!](?!\\S\))[^()]*\)", "", expression)
        assert step["pattern"]["Regex"] != expression

    edit_tokenizer(folder, drop)


@dataclass(frozen=True)
class Fault:
    """A fault to plant into a folder, the check that must name it, and how."""

    plant: Callable[[Path], object]
    check: str
    words: str


FAULTS = {
    "a new token is an added token": Fault(
        move_to_added_tokens, PIPELINE, r"^' heartless' \(id \d+\) is an added token, which matches inside longer"),
    "an added token beside a new token": Fault(
        add_beside, PIPELINE, r"^' heartless' \(id \d+\) is an added token, which matches inside longer"),
    "ignore_merges is dropped": Fault(
        drop_ignore_merges, PIPELINE, "^model.ignore_merges is false, it should be true$"),
    "special tokens are renumbered": Fault(
        renumber_special_tokens, OLD_IDS, r"^'(<unk>|</?s>)' had the id \d+ and has \d+ now$"),
    "a merge is removed": Fault(
        remove_a_merge, PIPELINE, r"^model.merges\[0\] is \[.*\], it should be \[.*\] \(\d+ instead of \d+\)$"),
    "two old ids are swapped": Fault(
        swap("a", "b"), OLD_IDS, r"^'[ab]' had the id \d+ and has \d+ now$"),
    "two new ids are swapped": Fault(
        swap_new, PIPELINE, r"^model.vocab\['.*heart.*'\] is \d+, it should be \d+$"),
    "the split has no guards": Fault(
        drop_guards, PIPELINE, r"^pre_tokenizer.pretokenizers\[\d\].pattern.Regex .*is \".*\", it should be \".*\(\?"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_shows_in_text(family: tuple[Path, Path], name: str) -> None:
    fault = FAULTS[name]
    fault.plant(family[1])
    result = verify(family[1], str(family[0]), load_weights=False)
    assert fault.check in failed(result)
    assert re.search(fault.words, detail(result, fault.check))
    # The comparison of the parts only knows what we write; what is wrong with it shows in what it does.
    assert set(failed(result)) & BEHAVIOUR
    assert set(failed(result)) <= {PIPELINE, *BEHAVIOUR}


@pytest.mark.parametrize("kind", KINDS)
def test_sound_families_pass(sound_families: dict[str, tuple[Path, Path]], kind: str) -> None:
    base, folder = sound_families[kind]
    result = verify(folder, str(base), DOCUMENTS, load_weights=False)
    assert failed(result) == []


@pytest.mark.parametrize(("kind", "name"), [
    ("gpt2", "GPT2Tokenizer"), ("llama3", "GPT2Tokenizer"), ("llama3", "Qwen2Tokenizer"),
    ("metaspace", "LlamaTokenizer"), ("metaspace", "GemmaTokenizer"),
])
def test_a_model_class_that_rebuilds_the_tokenizer(
    sound_families: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str, name: str
) -> None:
    base, folder = sound_families[kind]
    folder = Path(shutil.copytree(folder, tmp_path / "expanded"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class=name)
    result = verify(folder, str(base), load_weights=False)
    assert PIPELINE in failed(result)
    assert set(failed(result)) & BEHAVIOUR
    assert set(failed(result)) <= {PIPELINE, *BEHAVIOUR}
    assert re.search(f"loads the tokenizer as {name}, .* tokenizer_class must be PreTrainedTokenizerFast",
                     detail(result, PIPELINE))  # fmt: skip


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "spm.model",
                                  "qwen.tiktoken", "tokenizer.model.v3"])  # fmt: skip
@pytest.mark.parametrize("recorded", [True, False])
def test_a_stale_file_from_which_others_rebuild_the_tokenizer(
    sound_families: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, recorded: bool
) -> None:
    base, folder = sound_families["metaspace"]
    folder = Path(shutil.copytree(folder, tmp_path / "expanded"))
    (folder / name).write_text("{}")
    if recorded:
        manifest = json.loads((folder / "vocabext.json").read_text())
        manifest["files"]["left_out"][name] = "would rebuild the tokenizer without the new tokens"
        (folder / "vocabext.json").write_text(json.dumps(manifest))
    result = verify(folder, str(base), load_weights=False)
    assert failed(result) == [STALE]
    assert detail(result, STALE).startswith(f"from {name} other readers would make a tokenizer without the new tokens")


def edit_part(folder: Path, name: str, value: Any) -> None:
    edit_tokenizer(folder, lambda document: document.update({name: value}))


ONLY_TEXT = [{"Sequence": {"id": "A", "type_id": 0}}]
NO_FRAME = {"type": "TemplateProcessing", "single": ONLY_TEXT, "pair": ONLY_TEXT, "special_tokens": {}}
TRIMMED = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(("kind", "part", "value", "words", "check"), [
    ("llama3", "normalizer", {"type": "NFD"}, r'^normalizer is {"type": "NFD"}, it should be null$',
     "invariant on adversarial text"),
    ("llama3", "post_processor", NO_FRAME, r"^post_processor.pair\[0\] is {.*}, it should be {.*} \(1 instead of ",
     "prompts and chats as in the base"),
    ("gpt2", "post_processor", TRIMMED, '^post_processor is {"type": "ByteLevel"', "streaming and offsets"),
    ("metaspace", "decoder", {"type": "Fuse"}, r'^decoder is {"type": "Fuse"}, it should be {"type": "Sequence"',
     "new tokens reachable and readable"),
])
def test_each_other_part_of_the_tokenizer(
    sound_families: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str, part: str, value: Json, words: str,
    check: str
) -> None:  # fmt: skip
    base, folder = sound_families[kind]
    folder = Path(shutil.copytree(folder, tmp_path / "expanded"))
    edit_part(folder, part, value)
    result = verify(folder, str(base), load_weights=False)
    assert {PIPELINE, check} <= set(failed(result)) <= {PIPELINE, *BEHAVIOUR}
    assert re.search(words, detail(result, PIPELINE))


def test_a_flag_of_an_added_token(family: tuple[Path, Path]) -> None:
    edit_tokenizer(family[1], lambda document: document["added_tokens"][-1].update(single_word=True))
    result = verify(family[1], str(family[0]), load_weights=False)
    assert detail(result, PIPELINE) == "the added token '</s>' differs: its single_word is true, it should be false"


def test_an_added_token_that_is_lost(family: tuple[Path, Path]) -> None:
    edit_tokenizer(family[1], lambda document: document["added_tokens"].pop())
    edit_json(family[1] / "tokenizer_config.json", eos_token=None)  # from which it would come back
    result = verify(family[1], str(family[0]), load_weights=False)
    assert re.search(r"the added token '</s>' \(id \d+\) is missing", detail(result, PIPELINE))


def test_another_expression_of_another_version_is_judged_by_what_it_does(family: tuple[Path, Path]) -> None:
    manifest = json.loads((family[1] / "vocabext.json").read_text())
    manifest["vocabext_version"] = "0.0.1"
    (family[1] / "vocabext.json").write_text(json.dumps(manifest))
    assert detail(verify(family[1], str(family[0]), load_weights=False), PIPELINE).startswith("6 parts")

    def harmless(document: Json) -> None:
        step = next(step for step in document["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split")
        step["pattern"]["Regex"] = f"(?:{step['pattern']['Regex']})"

    edit_tokenizer(family[1], harmless)
    result = verify(family[1], str(family[0]), load_weights=False)
    assert result.passed
    assert "made by vocabext 0.0.1" in detail(result, PIPELINE)
    assert [c.verdict for c in result.checks if c.name == PIPELINE] == [SKIPPED]
    drop_guards(family[1])
    assert set(failed(verify(family[1], str(family[0]), load_weights=False))) & BEHAVIOUR


@pytest.fixture
def gpt2(sound_families: dict[str, tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    base, folder = sound_families["gpt2"]
    return Path(shutil.copytree(base, tmp_path / "base")), Path(shutil.copytree(folder, tmp_path / "expanded"))


def test_a_tokenizer_that_does_not_load_is_said_once(gpt2: tuple[Path, Path]) -> None:
    (gpt2[1] / "tokenizer.json").write_text("{")
    result = verify(gpt2[1], str(gpt2[0]), load_weights=False)
    assert failed(result) == [PIPELINE]
    assert "no tokenizer that transformers can load" in detail(result, PIPELINE)
    assert {c.detail for c in result.checks if c.name in BEHAVIOUR and c.verdict == SKIPPED} == {
        "the tokenizer cannot be loaded", "no --corpus was given"}


def test_a_lost_pre_tokenizer_makes_tokens_unreachable(gpt2: tuple[Path, Path]) -> None:
    original = json.loads((gpt2[0] / "tokenizer.json").read_text())["pre_tokenizer"]
    edit_part(gpt2[1], "pre_tokenizer", original)
    assert failed(verify(gpt2[1], str(gpt2[0]), DOCUMENTS, load_weights=False)) == [
        PIPELINE, "new tokens reachable and readable"]


# -- the base -----------------------------------------------------------------------------------------------------

BASE = "made from this base"


def test_a_base_with_other_ids_is_the_first_suspect(gpt2: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", num_ids=280)
    result = verify(gpt2[1], str(other), load_weights=False)
    assert result.checks[0].verdict == FAIL
    assert result.checks[0].name == BASE
    assert re.search(rf"--against {other} is another model: it has 280 token ids, but .* made from \S+ with 342; pass",
                     result.checks[0].detail)  # fmt: skip


def test_a_base_of_other_weights_is_the_first_suspect(gpt2: tuple[Path, Path]) -> None:
    edit_tensor(gpt2[0], EMBEDDING, flip_last_bit(7))
    result = verify(gpt2[1], str(gpt2[0]), load_weights=False)
    assert failed(result) == [BASE, "old rows bit-identical"]
    assert re.search("may be another model than .* digest [0-9a-f]{12}, recorded is [0-9a-f]{12}; pass",
                     detail(result, BASE))  # fmt: skip


def test_a_base_of_other_bytes_that_mean_the_same_is_no_fault(gpt2: tuple[Path, Path]) -> None:
    edit_tokenizer(gpt2[0], lambda document: None)
    result = verify(gpt2[1], str(gpt2[0]), load_weights=False)
    assert result.passed
    assert "tokenizer.json" in detail(result, BASE)
    assert detail(result, BASE).endswith("but no check found a difference")


# -- text ---------------------------------------------------------------------------------------------------------

def test_a_token_that_stands_for_another_run(pair: tuple[Path, Path]) -> None:
    manifest = json.loads((pair[1] / "vocabext.json").read_text())
    manifest["tokens"][0]["run"][0] += 1
    (pair[1] / "vocabext.json").write_text(json.dumps(manifest))
    result = verify(pair[1], str(pair[0]), DOCUMENTS, load_weights=False)
    assert {"new tokens reachable and readable", "invariant on the corpus", PIPELINE} <= set(failed(result))
    assert re.search(rf"{TOKENS[0]!r} stands for \[.*\] here, not for \[.*\]", detail(result, PIPELINE))


DECODER = {"type": "Sequence", "decoders": [
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, {"type": "Fuse"},
    {"type": "Replace", "pattern": {"Regex": "[a-z] [a-z]"}, "content": "_"}]}  # fmt: skip


def opened(base: Path, folder: Path) -> Pair:
    return Pair(folder, str(base), read_manifest(folder))


def test_text_that_cannot_be_decoded_token_by_token(gpt2: tuple[Path, Path]) -> None:
    edit_part(gpt2[1], "decoder", DECODER)
    with pytest.raises(FaultError, match=r"^token by token '.* reads '.*, as a whole '"):
        behaviour.streaming_and_offsets(opened(*gpt2))


def test_a_base_that_cannot_be_streamed_is_no_fault(gpt2: tuple[Path, Path]) -> None:
    for folder in gpt2:
        edit_part(folder, "decoder", DECODER)
    assert behaviour.streaming_and_offsets(opened(*gpt2)).startswith(f"{behaviour.STREAMED} texts")


def test_places_without_spaces_are_compared_without_spaces(gpt2: tuple[Path, Path]) -> None:
    for folder in gpt2:
        edit_part(folder, "post_processor", TRIMMED)
    assert behaviour.streaming_and_offsets(opened(*gpt2))


def test_a_mark_stands_for_a_space_that_its_place_may_hold_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = opened(*expanded_pair(tmp_path, kind="t5", texts=[PHRASE, WORD, " theatre"], num_rows=1200))
    assert behaviour.streaming_and_offsets(pair)
    monkeypatch.setattr(behaviour, "_same_but_spaces", lambda *places: False)
    with pytest.raises(FaultError, match=r"^token \d+ of '.*' stands at \(\d+, \d+\), its pieces at \(\d+, \d+\)$"):
        behaviour.streaming_and_offsets(pair)


def test_places_behind_a_character_that_vanishes_are_the_base_s_own_fault(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path, kind="crossing", texts=[WORD, " muscle"])
    pair = opened(base, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pair.base_tokenizer.scheme), "drops_unknown", False)
        with pytest.raises(FaultError, match=r"^token \d+ of '.*' stands at \(\d+, \d+\), its pieces at \(\d+, \d+\)$"):
            behaviour.streaming_and_offsets(pair)
    assert behaviour.streaming_and_offsets(pair)


def test_a_new_token_of_bytes_does_not_join_broken_bytes(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path, kind="metaspace", texts=[" ж"], num_rows=448)
    assert all(i < 300 for i in read_manifest(folder).tokens[0].run[1:])  # bytes behind the space
    assert behaviour.streaming_and_offsets(opened(base, folder))


def test_what_no_text_encodes_to_must_decode_as_its_pieces(
    sound_families: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, folder = sound_families["metaspace"]
    folder = Path(shutil.copytree(folder, tmp_path / "expanded"))
    edit_tokenizer(folder, lambda document: document["decoder"]["decoders"].remove({"type": "ByteFallback"}))
    with pytest.raises(FaultError, match=r"^the ids \[.*\] decode to '.*, their pieces to '.*"):
        behaviour.streaming_and_offsets(opened(base, folder))


def test_an_id_beyond_the_last_new_token_is_named(gpt2: tuple[Path, Path]) -> None:
    edit_tokenizer(gpt2[1], lambda document: document["added_tokens"].append(added_token("!!", 346)))
    with pytest.raises(FaultError, match=r"the tokenizer gives the id 346 \('!!'\), but 345 is the last new token"):
        behaviour.invariant_on_corpus(opened(*gpt2), [Document("d", "so!!")])


def test_a_chat_template_that_writes_something_else(gpt2: tuple[Path, Path]) -> None:
    for folder in gpt2:
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}")
    assert behaviour.prompts_as_in_base(opened(*gpt2)).endswith("2 chats")
    edit_json(gpt2[1] / "tokenizer_config.json", bos_token="</s>")
    with pytest.raises(FaultError, match=r"the chat template writes '</s>The quick .*, in the base '<s>The quick "):
        behaviour.prompts_as_in_base(opened(*gpt2))
    (gpt2[1] / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(FaultError, match="the chat template differs from the base"):
        behaviour.prompts_as_in_base(opened(*gpt2))


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


def test_adversarial_text_holds_new_tokens_and_repeats_for_a_seed(gpt2: tuple[Path, Path]) -> None:
    adversary = opened(*gpt2).adversary
    texts = list(adversary.texts(200, 0))
    assert texts == list(adversary.texts(200, 0))
    assert texts != list(adversary.texts(200, 1))
    assert sum(any(token in text for token in adversary.tokens) for text in texts) > 100


HURTS = {
    "control characters": "[\x00-\x08]", "a byte in brackets": "<0x[0-9A-F]{2}>", "a special token": "<s>",
    "a special token behind a new one": " the heart<s>", "a very long word": r"\S{500}", "spaces alone": "^ {9,}$",
    "line breaks of Windows": "\r\n", "a joiner": "\u200d", "right-to-left text": "[\u05d0-\u05ea\u0620-\u064a]",
    "direction marks": "[\u200e\u202e\u2066]", "a sequence of emoji": "\U0001f468\u200d\U0001f469",
    "a flag": "\U0001f1e9\U0001f1ea", "a combining character behind a new token": " muscle[\u0300-\u0345]",
    "the second plane": "[\U00010000-\U0001ffff]", "the third plane": "[\U00020000-\U0002ffff]",
    "tags": "[\U000e0000-\U000effff]", "private use": "[\U000f0000-\U0010ffff]", "a run of spaces": "x {30}",
    "what no character is": "[\ufffd\uffff]", "a new token inside a word": "[a-z]heartless[a-z]",
    "what makes an entry across the end of a new token": " are rathe", "across its beginning": "s muscle",
}  # fmt: skip


def test_adversarial_text_holds_what_is_known_to_hurt(gpt2: tuple[Path, Path]) -> None:
    texts = list(opened(*gpt2).adversary.texts(10_000, 0))
    assert [what for what, expression in HURTS.items() if not any(re.search(expression, text) for text in texts)] == []


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
