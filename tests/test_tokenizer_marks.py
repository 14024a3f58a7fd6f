"""Byte-level BPE that puts a space in front of a text: what happens there, and behind every added token."""

import json
import tarfile
from functools import cache
from pathlib import Path

import pytest
from fuzz import examples
from hard_texts import ALL_WANTED, FRAGMENTS, possible
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import failed
from tiny_families import tiny_family
from tiny_tokenizers import FAMILIES, PREFIXED
from tokenizer_checks import check_ids, check_offsets, check_prompts, check_streaming
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vocabext.checkpoint.manifest import read_manifest
from vocabext.collect import collect
from vocabext.corpus import Document
from vocabext.errors import TokenizerError
from vocabext.options import CollectConfig, DistillConfig, EvalConfig, MineConfig
from vocabext.run import RunConfig, run
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend, load_tokenizer, save_expanded
from vocabext.verify.stage import verify

KINDS = {**{name: FAMILIES[name] for name in ("gpt2-prefix", "roberta")}, **PREFIXED}
every_kind = pytest.mark.parametrize("name", KINDS)
with_phrases = pytest.mark.parametrize("name", ["gpt2-prefix", "roberta", "for every part", "by the normalizer"])
# What a section may begin with: nothing, the space that is enough, and what looks like one and is not.
LEADS = ["", " ", "  ", "\t", "\n", "\r\n", "\n ", " \n", "\u00a0", "\u3000", "\u2028", "\u200b", "\u0301", "'", "("]
WORDS = ["cardiac", "signs and symptoms", "signs and", "5 mg", "12", "it's not", "心脏病", "é", "▁", "Ġ", "x"]


@cache
def base_of(name: str) -> BaseTokenizer:
    return BaseTokenizer(KINDS[name].as_hf(KINDS[name].build()))


@cache
def expanded(name: str) -> ExpandedTokenizer:
    base = base_of(name)
    return extend(base, possible(base, [*ALL_WANTED, *(f" {text}" for text in ALL_WANTED), "signs", "xyz"]))


def check_all(name: str, text: str) -> None:
    check_ids(base_of(name), expanded(name), text)
    check_offsets(base_of(name), expanded(name), text)
    check_streaming(base_of(name), expanded(name), text)


SECTIONS = st.builds("{}{}{}".format, st.sampled_from(LEADS), st.sampled_from([*WORDS, *ALL_WANTED]),
                     st.sampled_from(FRAGMENTS) | st.text(max_size=4))


@every_kind
@settings(max_examples=examples(50))
@given(data=st.data())
def test_unmerging_gives_the_base_ids_in_every_section(name: str, data: st.DataObject) -> None:
    special = st.sampled_from(sorted(base_of(name).added))
    check_all(name, "".join(data.draw(st.lists(SECTIONS | special | st.sampled_from(LEADS), max_size=8))))


@every_kind
@settings(max_examples=examples(10))
@given(text=SECTIONS)
def test_frames_and_chat_templates_are_the_same(name: str, text: str) -> None:
    new = KINDS[name].as_hf(expanded(name).backend)
    check_prompts(base_of(name).hf, new, expanded(name), text)


@every_kind
def test_the_beginning_of_a_text_and_what_follows_an_added_token(name: str) -> None:
    for special in ["", *base_of(name).added]:
        for lead in LEADS:
            for word in WORDS:
                check_all(name, f"{special}{lead}{word}{special}{special}{lead}{word}")


@every_kind
def test_the_first_word_of_a_text_is_the_token_that_it_is_after_a_space(name: str) -> None:
    base, new = base_of(name), expanded(name)
    cardiac = new.first_new_id + [token.token for token in new.tokens].index(" cardiac")
    for text in ("cardiac", "cardiac x", "x cardiac"):
        assert cardiac in new.encode(text), text
    assert name == "by the normalizer" or base.encode("cardiac") == base.encode(" cardiac")
    assert base.scheme.key_text(new.tokens[cardiac - new.first_new_id].key) == " cardiac"


@with_phrases
def test_a_phrase_in_front_of_a_text_is_the_token_that_it_is_after_a_space(name: str) -> None:
    base, new = base_of(name), expanded(name)
    phrase = new.first_new_id + [token.token for token in new.tokens].index(" signs and symptoms")
    assert phrase in new.encode("x signs and symptoms.")
    for text in ("signs and symptoms", "<sep>signs and symptoms, x", "<|endoftext|>signs and symptoms"):
        # What cuts a text before it gets its marks sees no space in front.
        assert (phrase in new.encode(text)) == (name != "for every part") or name == "by the normalizer", text
        check_ids(base, new, text)


@pytest.mark.parametrize("name", ["gpt2-prefix", "roberta", "before digits"])
def test_a_token_without_a_space_is_not_found_where_the_base_puts_one(name: str) -> None:
    base = base_of(name)
    bare = extend(base, [base.new_token("cardiac")])
    for text in ("cardiac", " cardiac", "<sep>cardiac", "cardiac<|endoftext|>cardiac", "x cardiac"):
        assert bare.encode(text) == base.encode(text)
    for text in ("(cardiac", "\ncardiac", "\tcardiac", "x <mask>\u3000cardiac"):
        assert bare.first_new_id in bare.encode(text), text
        check_ids(base, bare, text)


@pytest.mark.parametrize("name", ["for every part", "for every part between digits"])
def test_where_every_part_gets_a_space_a_word_has_one(name: str) -> None:
    base = base_of(name)
    assert base.new_token("cardiac") == base.new_token(" cardiac")
    assert base.new_token("cardiac").token == " cardiac"


def test_a_phrase_with_parts_that_get_a_space_is_refused() -> None:
    base = base_of("for every part")
    assert base.new_token(" signs, and").token == " signs , and"
    with pytest.raises(TokenizerError, match=r"this tokenizer turns '5 mg' into ' 5 mg', and that into something"):
        base.new_token("5 mg")


@every_kind
def test_decoding_strips_no_more_than_the_base_does(name: str) -> None:
    base, new = base_of(name), expanded(name)
    for text in ("cardiac signs and symptoms", " cardiac", "<sep> cardiac", "\ncardiac"):
        found, wanted = new.encode(text), base.encode(text)
        assert len(found) < len(wanted) or text.startswith("\n")
        assert new.decode(found) == base.decode(wanted)
        assert new.hf.decode(base.encode(text)) == base.hf.decode(wanted)
    if name in ("gpt2-prefix", "roberta"):
        assert new.decode(new.encode("cardiac")) == " cardiac"


def test_the_first_word_of_a_document_is_mined_and_collected() -> None:
    base = base_of("roberta")
    units = base.scheme.encode_units(["cardiac heart", "x cardiac heart"])
    assert units[0].ids.tolist() == units[1].ids.tolist()[-len(units[0].ids) :]
    token = base.new_token(" cardiac")
    documents = [Document("a", "cardiac heart and the heart"), Document("b", "<sep>cardiac heart of the blood")]
    (found,) = collect(documents, base, [token], CollectConfig(snippets=4, window=12, min_snippets=1))
    assert len(found.snippets) == 2


def test_an_entry_that_only_marked_text_could_spell_is_refused() -> None:
    """Behind the cut in front of digits every part gets a space, but the last step cuts them once more."""
    spec = json.loads(KINDS["for every part between digits"].build().to_str())
    spec["model"]["vocab"]["'s"] = 999
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != "'s"]
    base = BaseTokenizer(KINDS["roberta"].as_hf(Tokenizer.from_str(json.dumps(spec))))
    assert 999 not in base.encode("it's")
    with pytest.raises(TokenizerError, match="\"'s\" cannot be reached by merges"):
        extend(base, [base.new_token(" cardiac")])


# ---- through the door of transformers --------------------------------------------------------------


def folder_of(path: Path, **settings: object) -> Path:
    path.mkdir()
    backend = FAMILIES["gpt2"].build()  # its file says that no space is put in front
    (path / "tokenizer.json").write_text(backend.to_str())
    model = json.loads(backend.to_str())["model"]
    (path / "vocab.json").write_text(json.dumps({**model["vocab"], "<pad>": 990, "<mask>": 991, "<s>": 992,
                                                 "</s>": 993, "<unk>": 994}))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]))
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer"])
def test_a_class_that_puts_a_space_in_front_whatever_the_file_says(tokenizer_class: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", tokenizer_class=tokenizer_class, add_prefix_space=True)
    base = load_tokenizer(folder)
    assert base.encode("cardiac") == base.encode(" cardiac")
    new = extend(base, possible(base))
    (tmp_path / "new").mkdir()
    save_expanded(new, folder, tmp_path / "new")
    loaded = load_expanded_hf(tmp_path / "new")
    for text in ("cardiac signs", " signs and symptoms", "signs and symptoms", "\tcardiac", "x</s>cardiac", ""):
        assert new.expansion.unmerge(loaded.encode(text)).tolist() == base.hf.encode(text)
        assert loaded.encode(text, add_special_tokens=False) == new.encode(text)


def load_expanded_hf(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@every_kind
def test_a_text_that_comes_as_words(name: str) -> None:
    new = KINDS[name].as_hf(expanded(name).backend)
    for words in (["signs", "and", "symptoms"], [" cardiac", "", "cardiac", "12"]):
        found, wanted = (hf(words, is_split_into_words=True)["input_ids"] for hf in (new, base_of(name).hf))
        assert expanded(name).expansion.unmerge(found).tolist() == wanted


@every_kind
def test_no_reader_can_take_the_space_away(name: str) -> None:
    """transformers 4 rebuilds a lone ByteLevel step from `add_prefix_space` in tokenizer_config.json."""
    base = base_of(name)
    words = [token for token in possible(base) if len(base.scheme.chunks(token.token)) == 1]
    spec = json.loads(extend(base, words).backend.to_str())
    assert '"add_prefix_space": true' not in json.dumps(spec["pre_tokenizer"])


@pytest.mark.slow
@pytest.mark.assets
def test_the_real_gpt2_with_a_space_in_front(assets: Path, tmp_path: Path) -> None:
    archive = assets / "tokenizers" / "gpt2.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is absent")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    settings = tmp_path / "gpt2" / "tokenizer_config.json"
    content = json.loads(settings.read_text()) if settings.is_file() else {}
    settings.write_text(json.dumps({**content, "add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}))
    base = load_tokenizer(tmp_path / "gpt2")
    assert base.encode("heart") == base.encode(" heart")
    words = (assets / "new_tokens" / "medical_new_tokens.txt").read_text().splitlines()[::20]
    tokens = possible(base, [*words, *ALL_WANTED])
    new = extend(base, tokens)
    for i, token in enumerate(tokens):
        lead, fragment = LEADS[i % len(LEADS)], FRAGMENTS[i % len(FRAGMENTS)]
        word = f"{lead}{token.token.strip()}"
        for text in (f"{word}{fragment}", f"x<|endoftext|>{word} and {fragment}"):
            check_ids(base, new, text)
    firsts = [token for token in tokens if token.token[0] == " " and " " not in token.token[1:]]
    found = [new.encode(token.token[1:]) for token in firsts]
    assert found == [[new.first_new_id + tokens.index(token)] for token in firsts]


# ---- the whole way ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gpt2_with_a_space_in_front_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 200)
    base = tiny_family(tmp_path / "base", "gpt2")
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (base / "tokenizer.json").write_text(json.dumps(spec))
    sentences = ("ureter of the heart. The muscle of the ureter rates", "muscle and ureter, the rest<s>ureter rate")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(40) for text in sentences))
    run(RunConfig(model=str(base), corpus=(str(corpus),), output=tmp_path / "new",
                  mine=MineConfig(dedup=False, budget=5, min_count=3),
                  distill=DistillConfig(method="mean", device="cpu"),
                  evaluate=EvalConfig(prompts=1, continuation=2, context=48, dtype="float32", device="cpu")))
    assert failed(verify(tmp_path / "new", str(base))) == []
    new = load_expanded_hf(tmp_path / "new")
    first = read_manifest(tmp_path / "new").first_new_id
    assert new.encode("ureter of the heart.")[0] >= first
    assert new.encode("ureter of the heart.") == new.encode(" ureter of the heart.")
