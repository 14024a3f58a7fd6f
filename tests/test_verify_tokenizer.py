"""What `verify` says about tokenizers: every check fires on the fault it is there for."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planted import Json, added_token, detail, draw_fewer_texts, edit_tokenizer, failed, key_of, opened, token_id
from tiny_checkpoints import edit_json
from tiny_expanded import DOCUMENTS, TOKENS, expanded_pair

from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.verdicts import FAIL, SKIPPED
from vocabext.corpus import Document
from vocabext.tokenizer import MergeChain
from vocabext.verify import behaviour
from vocabext.verify.pair import FaultError
from vocabext.verify.stage import verify

KINDS = ("gpt2", "llama3", "metaspace")
PIPELINE, OLD_IDS, STALE = "tokenizer is the base's, extended", "old token ids kept", "no stale tokenizer files"
# Checks that may see what a fault does to text, depending on the texts that are drawn.
BEHAVIOUR = {OLD_IDS, "prompts and chats as in the base", "invariant on the corpus", "invariant on adversarial text",
             "streaming and offsets", "new tokens reachable and readable"}
PHRASE, WORD = " the heart", " heartless"


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_fewer_texts(monkeypatch)


@pytest.fixture(scope="module")
def sound_families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {kind: expanded_pair(tmp_path_factory.mktemp(kind), kind=kind, num_rows=448,
                                texts=[PHRASE, WORD, " are rat", " muscle"]) for kind in KINDS}


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest, sound_families: dict[str, tuple[Path, Path]],
           tmp_path: Path) -> tuple[Path, Path]:
    base, folder = sound_families[request.param]
    return base, Path(shutil.copytree(folder, tmp_path / request.param))


def move_to_added_tokens(folder: Path) -> None:
    def move(document: Json) -> None:
        document["model"]["vocab"].pop(key_of(folder, WORD))
        document["added_tokens"].append(added_token(WORD, token_id(folder, WORD)))

    edit_tokenizer(folder, move)


def add_beside(folder: Path) -> None:
    edit_tokenizer(folder, lambda document: document["added_tokens"].append(
        added_token(WORD, 1 + max(document["model"]["vocab"].values()))))


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_faults_of_tokens_that_are_merges(tmp_path: Path) -> None:
    base, folder = expanded_pair(tmp_path, kind="metaspace", num_rows=448,
                                 texts=["dm", "dmd", "ed.", "md"])
    assert failed(verify(folder, str(base), load_weights=False)) == []

    def drop(document: Json) -> None:
        document["model"]["merges"].remove(["d", "m"])

    def put_first(document: Json) -> None:
        document["model"]["merges"].insert(0, document["model"]["merges"].pop())

    for fault in (drop, put_first):
        copy = Path(shutil.copytree(folder, tmp_path / fault.__name__))
        edit_tokenizer(copy, fault)
        result = verify(copy, str(base), load_weights=False)
        assert PIPELINE in failed(result)
        assert detail(result, PIPELINE).startswith("model.merges[")
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
                     detail(result, PIPELINE))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "spm.model",
                                  "qwen.tiktoken", "tokenizer.model.v3"])
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
) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_folder_of_a_version_that_searched_for_its_tokens_is_judged_by_what_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # as 0.1.0 did: no token is a merge
        patched.setattr(MergeChain, "add", lambda self, token: False)
        base, folder = expanded_pair(tmp_path, kind="metaspace", num_rows=448, texts=[" the heart", " of the"])
    manifest = json.loads((folder / "vocabext.json").read_text())
    for version, verdict in ((manifest["vocabext_version"], FAIL), ("0.1.0", SKIPPED)):
        (folder / "vocabext.json").write_text(json.dumps({**manifest, "vocabext_version": version}))
        result = verify(folder, str(base), load_weights=False)
        assert [c.verdict for c in result.checks if c.name == PIPELINE] == [verdict]
        assert failed(result) == [PIPELINE] * (verdict == FAIL)
    assert "adds the same tokens in another way" in detail(result, PIPELINE)
    remove_a_merge(folder)
    assert PIPELINE in failed(verify(folder, str(base), load_weights=False))


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


# -- text ---------------------------------------------------------------------------------------------------------

def test_a_token_that_stands_for_another_run(tmp_path: Path) -> None:
    pair = expanded_pair(tmp_path)
    manifest = json.loads((pair[1] / "vocabext.json").read_text())
    manifest["tokens"][0]["run"][0] += 1
    (pair[1] / "vocabext.json").write_text(json.dumps(manifest))
    result = verify(pair[1], str(pair[0]), DOCUMENTS, load_weights=False)
    assert {"new tokens reachable and readable", "invariant on the corpus", PIPELINE} <= set(failed(result))
    assert re.search(rf"{TOKENS[0]!r} stands for \[.*\] here, not for \[.*\]", detail(result, PIPELINE))


DECODER = {"type": "Sequence", "decoders": [
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, {"type": "Fuse"},
    {"type": "Replace", "pattern": {"Regex": "[a-z] [a-z]"}, "content": "_"}]}


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


@pytest.mark.parametrize(("place", "token"), [((0, 8), "▁theatre"), ((1, 8), "▁theatre"), ((0, 0), "▁")])
def test_a_mark_stands_for_a_space_that_its_place_may_hold_or_not(place: tuple[int, int], token: str) -> None:
    before = SimpleNamespace(offsets=[(0, 4), (4, 8)])
    after = SimpleNamespace(offsets=[place], tokens=[token])
    behaviour._check_offsets(" theatre", before, after, [0, 2], loose=True)
    if place != (0, 8):
        with pytest.raises(FaultError, match=r"^token 0 of ' theatre' stands at \(\d, \d\), its pieces at \(0, 8\)$"):
            behaviour._check_offsets(" theatre", before, after, [0, 2], loose=False)


def test_a_place_without_some_letters_is_a_fault_with_or_without_a_mark() -> None:
    before, after = SimpleNamespace(offsets=[(0, 8)]), SimpleNamespace(offsets=[(1, 7)], tokens=["▁theatre"])
    with pytest.raises(FaultError, match=r"stands at \(1, 7\)"):
        behaviour._check_offsets(" theatre", before, after, [0, 1], loose=True)


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
        behaviour.invariant_on_corpus(opened(*gpt2), [Document("d", "so!!")], limit=None)


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
}


def test_adversarial_text_holds_what_is_known_to_hurt(gpt2: tuple[Path, Path]) -> None:
    texts = list(opened(*gpt2).adversary.texts(10_000, 0))
    assert [what for what, expression in HURTS.items() if not any(re.search(expression, text) for text in texts)] == []
