"""Ids that the files of a model folder name: never given away, never hidden inside a new token, given rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from planted import draw_fewer_texts, edit_tensor
from safetensors.torch import load_file
from tiny_checkpoints import edit_json, tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens, patched
from tiny_families import tiny_family
from tiny_tokenizers import FAMILIES, family_base
from tokenizers import AddedToken
from transformers import AutoTokenizer

from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.named_ids import NamedIds, Rules, named_ids
from vocabext.checkpoint.verdicts import FAIL, Verification
from vocabext.cli.inspect import inspect
from vocabext.cli.main import cli
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.evaluate.stage import evaluate_folder
from vocabext.mine.stage import mine
from vocabext.model.frozen import load_model
from vocabext.options import CollectConfig, DistillConfig, EvalConfig, MineConfig
from vocabext.revert import revert
from vocabext.run import RunConfig, run
from vocabext.tokenizer import BaseTokenizer, extend, load_base, load_tokenizer
from vocabext.verify.stage import verify

EVAL = EvalConfig(prompts=1, continuation=2, context=48, dtype="float32", device="cpu")
CHECK = "named ids, stops and bans kept"
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_fewer_texts(monkeypatch)


def failed(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if check.verdict == FAIL}


def folder_with(tmp_path: Path, files: dict[str, dict[str, Any]], **options: Any) -> Path:
    """A tiny base of 290 ids and 300 rows, with entries in its files."""
    base = tiny_folder(tmp_path / "base", **options)
    for name, entries in files.items():
        path = base / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **entries}))
    return base


def made_the_old_way(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expanded folder whose new tokens got the ids behind the tokenizer's own, and hold what they like."""
    with monkeypatch.context() as old:
        old.setattr("vocabext.tokenizer.loading.named_ids", lambda folder: NamedIds(rules=Rules()))
        return patched(base, tmp_path)


NAMED: dict[str, tuple[str, dict[str, Any], int]] = {
    "eos in config.json": ("config.json", {"eos_token_id": 290}, 291),
    "one of several eos": ("generation_config.json", {"eos_token_id": [1, 292]}, 293),
    "pad": ("generation_config.json", {"pad_token_id": 291}, 292),
    "begin of decoding": ("config.json", {"decoder_start_token_id": 290}, 291),
    "suppressed": ("generation_config.json", {"suppress_tokens": [3, 291]}, 292),
    "suppressed at the beginning": ("generation_config.json", {"begin_suppress_tokens": [290]}, 291),
    "banned run": ("generation_config.json", {"bad_words_ids": [[5], [290, 293]]}, 294),
    "biased run": ("generation_config.json", {"sequence_bias": [[[290, 291], -5.0]]}, 292),
    "forced": ("generation_config.json", {"forced_decoder_ids": [[1, 294]]}, 295),
    "image": ("config.json", {"image_token_index": 290, "image_token_id": 291}, 292),
    "with a fraction of nothing": ("generation_config.json", {"eos_token_id": [1, 290.0, 1e400]}, 291),
    "beginning and end of an image": ("config.json", {"visual": {"image_start_id": 290, "vision_end_id": 291}}, 292),
    "as a number": ("config.json", {"im_patch_token": 290}, 291),
    "a language": ("generation_config.json", {"lang_to_id": {"<|en|>": 290, "<|de|>": 291}}, 292),
    "sound of a processor": ("processor_config.json", {"audio_token_id": 293}, 294),
    "preprocessor": ("video_preprocessor_config.json", {"video_token_id": 290}, 291),
    "nested part": ("config.json", {"vision_config": {"image_token_id": 290, "hidden_size": 8}}, 291),
    "deeper part": ("config.json", {"thinker_config": {"audio_config": {"audio_token_id": 295}}}, 296),
    "decoder": ("config.json", {"decoder": {"eos_token_id": 290}}, 291),
    "none": ("config.json", {"eos_token_id": None, "pad_token_id": -1}, 290),
    "used already": ("config.json", {"eos_token_id": [0, 1, 289]}, 290),
    "another vocabulary": ("config.json", {"text_encoder": {"vocab_size": 999, "eos_token_id": 291}}, 290),
    "a count": ("config.json", {"num_image_token": 291, "max_length": 292, "hidden_size_id": 1}, 290),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_new_token_never_gets_an_id_that_a_file_names(case: str, tmp_path: Path) -> None:
    name, entries, first = NAMED[case]
    base = load_tokenizer(folder_with(tmp_path, {name: entries}))
    assert base.num_own_ids == 290
    assert base.first_new_id == first
    tokens = new_tokens(tmp_path / "base")
    expanded = extend(base, tokens)
    assert expanded.first_new_id == first
    assert [expanded.backend.token_to_id(token.key) for token in tokens] == [first, first + 1, first + 2]


def test_ids_of_added_tokens_are_left_free(tmp_path: Path) -> None:
    base = folder_with(tmp_path, {"tokenizer_config.json": {"extra_image_token_id": 294}})
    assert load_tokenizer(base).first_new_id == 295
    edit_json(base / "tokenizer_config.json", added_tokens_decoder={"297": {"content": "<s>"}})
    (base / "added_tokens.json").write_text('{"<|extra|>": 298}')
    assert named_ids(base).where[297] == "tokenizer_config.json: added_tokens_decoder"
    assert named_ids(base).where[298] == "added_tokens.json: added tokens"


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_whose_config_names_ids_behind_the_tokenizer_passes_verify(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """As models do whose matrix is padded: 290 ids, 300 rows, an eos, a pad and bans between."""
    base = folder_with(tmp_path, {
        "config.json": {"eos_token_id": 290, "pad_token_id": 291},
        "generation_config.json": {"eos_token_id": 290, "suppress_tokens": [292], "bad_words_ids": [[293]]}}, tied=tied)
    said: list[str] = []
    folder = patched(base, tmp_path, say=said.append)
    manifest = read_manifest(folder)
    assert [token.token_id for token in manifest.tokens] == [294, 295, 296]
    assert manifest.reserved == {
        "290": "config.json: eos_token_id", "291": "config.json: pad_token_id",
        "292": "generation_config.json: suppress_tokens", "293": "generation_config.json: bad_words_ids"}
    assert any("begin at 294: 290 (config.json: eos_token_id)" in line for line in said)
    result = verify(folder, str(base), DOCUMENTS)
    assert failed(result) == {}
    for name in ROWS[:1 if tied else 2]:
        before, after = (load_file(path / "model.safetensors")[name] for path in (base, folder))
        assert torch.equal(before[:294], after[:294])
    evaluate_folder(folder, str(base), DOCUMENTS[:1], EVAL)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2", "gemma", "t5", "xlm-r"])
def test_every_kind_of_tokenizer_leaves_named_ids_free(name: str) -> None:
    """The ids between are holes, for the expanded tokenizer as for the base."""
    own = family_base(name)
    end = own.first_new_id
    base = BaseTokenizer(FAMILIES[name].as_hf(FAMILIES[name].build()), NamedIds({end + 2: "config.json: eos_token_id"}))
    tokens = [own.new_token(text) for text in (" heartbeats", " rates of")]
    new = extend(base, tokens)
    assert new.first_new_id == end + 3
    text = "the heartbeats and rates of it, rates of heartbeats"
    ids = new.encode(text)
    assert new.expansion.is_new(ids).sum() >= 2
    assert new.expansion.unmerge(ids).tolist() == own.encode(text)
    for i in range(end, end + 3):
        assert new.decode([i]) == own.decode([i])
        assert new.decode([*ids, i]) == own.decode([*own.encode(text), i])


@pytest.mark.slow
def test_an_expanded_folder_of_unigram_tokens_with_named_ids_passes_verify(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", num_rows=600)
    family_base("t5").hf.save_pretrained(base)
    end = family_base("t5").first_new_id
    edit_json(base / "config.json", eos_token_id=end + 1)
    folder = patched(base, tmp_path, [" heartbeats", " blood and"])
    assert read_manifest(folder).first_new_id == end + 2
    assert failed(verify(folder, str(base), DOCUMENTS)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "entries"), [
    ("config.json", {"eos_token_id": 290}), ("generation_config.json", {"suppress_tokens": [292]}),
    ("config.json", {"vision_config": {"image_token_id": 291}})])
def test_verify_fails_a_folder_whose_new_ids_a_file_names(
    name: str, entries: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = folder_with(tmp_path, {name: entries})
    folder = made_the_old_way(base, tmp_path, monkeypatch)
    found = failed(verify(folder, str(base), DOCUMENTS, load_weights=False))
    assert list(found) == [CHECK]
    assert f"{name}: " in found[CHECK]
    assert "which the new token" in found[CHECK]


@pytest.mark.slow
def test_verify_fails_a_folder_whose_own_config_names_a_new_id_later(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    folder = patched(base, tmp_path)
    edit_json(folder / "config.json", eos_token_id=291)
    assert "config.json: eos_token_id names the id 291, which the new token ' the heart' has" in failed(
        verify(folder, str(base), load_weights=False))[CHECK]


def test_an_id_far_behind_all_rows_is_left_alone_until_the_new_tokens_would_reach_it(tmp_path: Path) -> None:
    """Tiny models keep the defaults of their classes, such as an eos of 50256; no token comes near."""
    base = folder_with(tmp_path, {"config.json": {"eos_token_id": 10**9}})
    said: list[str] = []
    folder = patched(base, tmp_path, say=said.append)
    assert read_manifest(folder).first_new_id == 290
    assert any("far behind all rows" in line and "1000000000 (config.json: eos_token_id)" in line for line in said)
    tokens = new_tokens(base)
    near = BaseTokenizer(load_tokenizer(base).hf, NamedIds({290 + 257: "config.json: eos_token_id"}))
    near.scheme.first_new_id = 546
    with pytest.raises(TokenizerError, match="eos_token_id names the id 547, and the new tokens would have the ids 546 "
                                             "to 548; correct that entry"):
        extend(near, tokens)


# -- stops and bans -----------------------------------------------------------------------------------------------

def run_of(base: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(base).encode(text, add_special_tokens=False)


def rule(base: Path, which: str) -> dict[str, Any]:
    """An entry of generation_config.json that forbids ` the heart` (` the`, ` heart`) in some way."""
    the, heart = run_of(base, " the heart")
    of = run_of(base, " of")[0]
    return {
        "end of text inside": {"eos_token_id": [1, heart]}, "end of text first": {"eos_token_id": the},
        "suppressed": {"suppress_tokens": [heart]}, "suppressed at the beginning": {"begin_suppress_tokens": [the]},
        "banned whole": {"bad_words_ids": [[the, heart]]}, "banned id": {"bad_words_ids": [[1], [heart]]},
        "banned run goes on": {"bad_words_ids": [[of, the, heart, of]]},
        "banned run ends inside": {"bad_words_ids": [[of, the]]}, "banned run begins": {"bad_words_ids": [[heart, of]]},
        "biased": {"sequence_bias": [[[the, heart], -10.0]]}, "forced end": {"forced_eos_token_id": heart},
        "forced": {"forced_decoder_ids": [[1, heart]]}, "stop inside": {"stop_strings": [" the"]},
        "stop ends inside": {"stop_strings": ["of the"]},
    }[which]


RULES = ["end of text inside", "end of text first", "suppressed", "suppressed at the beginning", "banned whole",
         "banned id", "banned run goes on", "banned run ends inside", "banned run begins", "biased", "forced end",
         "forced", "stop inside", "stop ends inside"]


@pytest.mark.parametrize("which", RULES)
def test_a_token_that_hides_a_stop_or_a_ban_is_refused(which: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    made = new_tokens(base, [" the heart"])
    edit_json(base / "generation_config.json", **rule(base, which))
    tokenizer = load_base(base)
    with pytest.raises(TokenizerError, match=r"' the heart' (holds|begins|goes on).*generation_config.json: "):
        tokenizer.new_token(" the heart")
    with pytest.raises(TokenizerError, match=r"1 of 1 tokens would hide from generation.*' the heart'.*drop them"):
        extend(tokenizer, made)


@pytest.mark.parametrize("rules", [
    {"begin_suppress_tokens": ["heart"]}, {"bad_words_ids": [["heart", "of", "of"]][:0]},
    {"stop_strings": ["heart"]}, {"bad_words_ids": [["of", "of"]]}, {"suppress_tokens": [-1], "bad_words_ids": None},
    {"stop_strings": "rest"}])
def test_a_token_that_hides_nothing_is_not_refused(rules: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    ids = {"heart": run_of(base, " heart")[0], "of": run_of(base, " of")[0]}
    edit_json(base / "generation_config.json", **json.loads(json.dumps(rules), object_hook=lambda entries: {
        key: value if key == "stop_strings" else _with_ids(value, ids) for key, value in entries.items()}))
    assert load_base(base).new_token(" the heart").run == tuple(run_of(base, " the heart"))


def _with_ids(value: Any, ids: dict[str, int]) -> Any:
    return [_with_ids(item, ids) for item in value] if isinstance(value, list) else ids.get(value, value)


def test_mine_counts_and_lists_what_would_hide_a_stop(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    config = MineConfig(dedup=False, budget=5, min_count=4)
    assert any(" heart" in token.token for token in mine(DOCUMENTS, load_base(base), config).tokens)
    edit_json(base / "generation_config.json", eos_token_id=[1, run_of(base, " heart")[0]])
    result = mine(DOCUMENTS, load_base(base), config)
    assert not any(" heart" in token.token for token in result.tokens)
    reasons = [why for why in result.rejected.values() if "generation_config.json: eos_token_id" in why]
    assert reasons
    assert any("which generation_config.json: eos_token_id names" in why for why in result.rejected_by_reason())


def test_what_was_kept_is_said_and_written_down(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    line = run_of(base, "!")[0]
    edit_json(base / "generation_config.json", eos_token_id=[1, line], bad_words_ids=[[5, 6]])
    said: list[str] = []
    manifest = read_manifest(patched(base, tmp_path, say=said.append))
    assert manifest.rules["anywhere"][str(line)] == "generation_config.json: eos_token_id"
    assert manifest.rules["runs"] == [[5, 6]]
    assert any("runs of ids that none overlaps (generation_config.json: bad_words_ids)" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("which", RULES)
def test_verify_fails_a_folder_whose_tokens_hide_a_stop_or_a_ban(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_folder(tmp_path / "base")
    edit_json(base / "generation_config.json", **rule(base, which))
    folder = made_the_old_way(base, tmp_path, monkeypatch)
    assert "tokens would hide from generation" in failed(verify(folder, str(base), load_weights=False))[CHECK]


def test_generation_stops_where_the_base_stops(tmp_path: Path) -> None:
    """A plain piece that ends a text is written as itself, so both stop behind it."""
    base = tiny_folder(tmp_path / "base")
    edit_json(base / "generation_config.json", eos_token_id=[1, run_of(base, " heart")[0]])
    folder = patched(base, tmp_path, [" muscle of", " are rated"])
    texts = []
    for path in (base, folder):
        model = load_model(path, device="cpu", dtype="float32").model
        prompt = AutoTokenizer.from_pretrained(path).encode("the muscle", return_tensors="pt")
        assert model.generation_config.eos_token_id == [1, run_of(base, " heart")[0]]
        texts.append(model.generate(prompt, do_sample=False, max_new_tokens=8, pad_token_id=0)[0].tolist())
    assert texts[0] == texts[1]


# -- ids without a row --------------------------------------------------------------------------------------------

def one_id_more(tmp_path: Path, *, special: bool = True, tied: bool = True) -> Path:
    """As Gemma 3: the last id of the tokenizer has no row."""
    base = tiny_folder(tmp_path / "base", num_rows=290, tied=tied)
    _with_image_token(base, special=special)
    return base


def _with_image_token(base: Path, *, special: bool) -> None:
    hf = AutoTokenizer.from_pretrained(base)
    hf.add_tokens([AddedToken("<image_soft_token>", special=special, normalized=False)], special_tokens=special)
    hf.save_pretrained(base)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("of_a_config", [True, False])
def test_a_special_id_without_a_row_gets_a_silent_one(
    tied: bool, of_a_config: bool, tmp_path: Path,
) -> None:
    if of_a_config:  # the number of rows, as many configs have it
        base = folder_with(tmp_path, {"config.json": {"eos_token_id": 290}}, num_rows=290, tied=tied)
        what = "config.json: eos_token_id"
    else:
        base, what = one_id_more(tmp_path, tied=tied), "the special token '<image_soft_token>'"
    shown = CliRunner().invoke(inspect, [str(base)])
    assert f"290 ({what})" in shown.output
    said: list[str] = []
    folder = patched(base, tmp_path, say=said.append)
    manifest = read_manifest(folder)
    assert manifest.given_rows == {"290": what}
    assert [token.token_id for token in manifest.tokens] == [291, 292, 293]
    assert any(f"get one that is never written: 290 ({what})" in line for line in said)
    tensors = load_file(folder / "model.safetensors")
    silent = tensors[ROWS[0] if tied else ROWS[1]]
    assert torch.equal(silent[290], silent[288:290].mean(0))  # between two rows: never on top
    assert tied or not tensors[ROWS[0]][290].any()
    result = verify(folder, str(base), DOCUMENTS)
    assert failed(result) == {}
    evaluate_folder(folder, str(base), DOCUMENTS[:1], EVAL)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_run_walks_the_whole_way_where_a_special_id_has_no_row(family: str, tmp_path: Path) -> None:
    """Gemma 3 as text: an id for images behind the last row; here an end of text behind that, too."""
    base = tiny_family(tmp_path / "base", family, num_rows=290)
    _with_image_token(base, special=True)
    edit_json(base / "generation_config.json", eos_token_id=[1, 292])
    for name, documents in (("corpus", DOCUMENTS[:2]), ("heldout", DOCUMENTS[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    outcomes = run(RunConfig(
        model=str(base), corpus=(str(tmp_path / "corpus.jsonl"),), heldout=(str(tmp_path / "heldout.jsonl"),),
        output=tmp_path / "new", mine=MineConfig(dedup=False, budget=3, min_count=4), evaluate=EVAL,
        collect=CollectConfig(snippets=4, window=16, min_snippets=2),
        distill=DistillConfig(epochs=1, dtype="float32", device="cpu")))
    assert [outcome.state for outcome in outcomes] == ["made"] * 6
    manifest = read_manifest(tmp_path / "new")
    assert (manifest.first_new_id, list(manifest.given_rows)) == (293, ["290", "292"])
    revert(tmp_path / "new", tmp_path / "back")
    assert all((tmp_path / "back" / path.name).read_bytes() == path.read_bytes() for path in base.iterdir())


def test_verify_fails_a_given_row_that_was_changed(tmp_path: Path) -> None:
    base = one_id_more(tmp_path)
    folder = patched(base, tmp_path)

    edit_tensor(folder, ROWS[0], lambda rows: rows[290].add_(1))
    assert "row 290 of model.embed_tokens.weight is none of the base's" in failed(
        verify(folder, str(base), load_weights=False))["old rows bit-identical"]


@pytest.mark.parametrize("verb", ["mine", "run", "inspect"])
def test_an_id_of_plain_text_without_a_row_is_refused_before_mining(verb: str, tmp_path: Path) -> None:
    base = one_id_more(tmp_path, special=False)
    (tmp_path / "corpus.txt").write_text(" ".join(document.text for document in DOCUMENTS))
    arguments = {"mine": [str(tmp_path / "corpus.txt"), "--model", str(base), "-o", str(tmp_path / "out")],
                 "run": [str(tmp_path / "corpus.txt"), "--model", str(base), "-o", str(tmp_path / "out")],
                 "inspect": [str(base)]}[verb]
    shown = CliRunner().invoke(cli, [verb, *arguments])
    said = str(shown.exception) if isinstance(shown.exception, CheckpointError) else shown.output
    assert ("the tokenizer has 291 ids but the embedding matrix has only 290 rows: there is none for id 290, "
            "'<image_soft_token>'") in said
    assert not (tmp_path / "out-work" / "candidates.jsonl").exists()
