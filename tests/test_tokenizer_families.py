"""What holds for the tokenizers of every family, whatever the text and whatever the new tokens."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from fuzz import examples
from hard_texts import ALL_WANTED, FRAGMENTS, WANTED, possible
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    CHUNKS,
    FAMILIES,
    MERGING,
    MORE_TEXT,
    UNIGRAM,
    cut_at_spaces,
    every_family,
    every_merging_family,
    family_base,
    metaspace,
)
from tokenizer_checks import chained, check_ids, check_offsets, check_prompts, check_streaming, expanded, texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vocabext.errors import TokenizerError
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend

# What the construction of a family rules out; everything else must be possible.
SPACES = {"\n        ", "\r\n"}
MULTIPLE_SPACES = {"    return", "        self.", "\n        "}
REFUSED = {
    "gpt-neox": MULTIPLE_SPACES,  # runs of spaces are added tokens
    "phi": MULTIPLE_SPACES,
    "gemma": {text for text in WANTED["indentation"] if "\n" in text},  # so are line breaks
    # Digits are cut out first, and then the expression begins anew: only what begins in a space is safe.
    "starcoder": {text for text in ALL_WANTED if any(c.isnumeric() for c in text)} | {
        "signs and", "Signs and symptoms", "mg/dL", "self.assertEqual(", "сердечный приступ", "οξεία καρδιακή",
        "שלום עולם", "स्थिति", "हृदय रोग", "โรคหัวใจ", "심장 질환", "e\u0301te\u0301", "x\u0323\u0307y", "it's not",
        "don't know", "e.g.", "a\u200db\u200dc"},
    "bloom": {"self.assertEqual(", " self.assertEqual(", "        self.", "):\n", "---\n", "e.g.", " (e.g."},
}



# ---- the checks ----------------------------------------------------------------------------------


# ---- the texts -----------------------------------------------------------------------------------


def on_any_text(most: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of a family's name and the data of hypothesis."""
    several = settings(max_examples=examples(most))
    return lambda test: every_family(several(given(data=st.data())(test)))


@on_any_text(40)
def test_unmerging_gives_the_base_ids_and_the_same_text(name: str, data: st.DataObject) -> None:
    base = family_base(name)
    check_ids(base, expanded(name), data.draw(texts(name)))


@on_any_text(15)
def test_a_new_token_spans_what_its_pieces_span(name: str, data: st.DataObject) -> None:
    base = family_base(name)
    check_offsets(base, expanded(name), data.draw(texts(name)))


@on_any_text(15)
def test_a_stream_sends_the_same_text(name: str, data: st.DataObject) -> None:
    base = family_base(name)
    check_streaming(base, expanded(name), data.draw(texts(name)))


@cache
def expanded_hf(name: str) -> PreTrainedTokenizerFast:
    return FAMILIES[name].as_hf(expanded(name).backend)


@on_any_text(8)
def test_frames_and_chat_templates_are_the_same(name: str, data: st.DataObject) -> None:
    base = family_base(name)
    check_prompts(base.hf, expanded_hf(name), expanded(name), data.draw(texts(name)))


@on_any_text(5)
def test_batches_are_encoded_like_single_texts(name: str, data: st.DataObject) -> None:
    family_base(name)
    batch = data.draw(st.lists(texts(name), min_size=1, max_size=8))
    assert expanded(name).encode_batch(batch) == [expanded(name).encode(text) for text in batch]


ODD = " \n\t\r.,-_/()1aAéxsS▁:;!\u0301\u200d\u00a0\u3000½²٣中のไ한🙂👩\ufe0fßſİǆ\x00\x7f\u0345ـאि"
CORPUS = "\n".join([*MORE_TEXT, *ALL_WANTED])
CANDIDATES = st.one_of(
    st.builds(lambda at, length: CORPUS[at : at + length], st.integers(0, len(CORPUS) - 20), st.integers(1, 18)),
    st.text(ODD, min_size=1, max_size=6),
    st.builds("{}{}".format, st.sampled_from(FRAGMENTS), st.sampled_from(FRAGMENTS)),
)


@on_any_text(4)
def test_any_string_that_is_taken_as_a_token(name: str, data: st.DataObject) -> None:
    """Not only those that people want: parts of words, of phrases, of characters, and odd characters."""
    base = family_base(name)
    candidates = data.draw(st.lists(CANDIDATES, min_size=10, max_size=40))
    new = extend(base, possible(base, candidates))
    parts = st.one_of(st.sampled_from(candidates), st.sampled_from(FRAGMENTS), st.text(ODD, max_size=3))
    for _ in range(5):
        text = data.draw(st.lists(parts, max_size=8).map("".join))
        check_ids(base, new, text)
        check_offsets(base, new, text)
        check_streaming(base, new, text)


BEFORE = ["", "x", "x ", "  ", "\n", ". ", "(", "é", "1", "’", "語", "▁", "\u0301"]
AFTER = ["", " ", "  ", " x", "x", "s", ".", ".x", ", ", "\n", "\n\n x", ")", "'s", "’", "1", "_", "\u0301", "\u200d",
         "語"]
CONTEXTS = [*((before, "") for before in BEFORE), *(("", after) for after in AFTER), *zip(BEFORE, AFTER, strict=False)]


@pytest.mark.slow
@every_family
def test_every_token_in_many_contexts(name: str) -> None:
    base, new = family_base(name), expanded(name)
    tokens = [token.token for token in new.tokens]
    around = [before + token + after for token in tokens for before, after in CONTEXTS]
    around += [one + other for one in tokens for other in tokens[::5]]
    for text, found, wanted in zip(around, new.encode_batch(around), base.encode_batch(around), strict=True):
        assert new.expansion.unmerge(found).tolist() == wanted, text


@every_family
def test_very_long_words(name: str) -> None:
    base, new = family_base(name), expanded(name)
    for text in ("heartbeat" * 400, "ж" * 3000, "心脏病" * 1000, " " * 3000, "\n" * 2000, "=" * 3000, "12" * 1500,
                 "x\u0301" * 1500, "signs and symptoms" * 200, " 5 mg" * 500, "👩\u200d⚕️" * 500):
        check_ids(base, new, f"a{text} cardiac {text}")


# ---- new tokens that are merges ------------------------------------------------------------------



@every_merging_family
def test_tokens_with_all_their_parts_are_merges_and_nothing_is_searched(name: str) -> None:
    base, new = family_base(name), chained(name)
    assert len(new.tokens) > 60
    specs = [json.loads(tokenizer.backend.to_str()) for tokenizer in (base, new)]
    assert specs[0]["pre_tokenizer"] == specs[1]["pre_tokenizer"]
    assert specs[1]["model"]["ignore_merges"] is False
    words = [token for token in new.tokens if token.token.startswith(" ") and len(token.run) > 3]
    assert words
    for token in words:
        assert new.first_new_id + new.tokens.index(token) in new.encode(f"x{token.token}")


@pytest.mark.slow
@every_merging_family
@settings(max_examples=examples(60))
@given(data=st.data())
def test_merges_keep_ids_offsets_and_streams(name: str, data: st.DataObject) -> None:
    base, new, text = family_base(name), chained(name), data.draw(texts(name))
    check_ids(base, new, text)
    check_offsets(base, new, text)
    check_streaming(base, new, text)


@pytest.mark.slow
@every_merging_family
def test_merges_in_many_contexts(name: str) -> None:
    base, new = family_base(name), chained(name)
    around = [before + token.token + after for token in new.tokens for before, after in CONTEXTS]
    for text, found, wanted in zip(around, new.encode_batch(around), base.encode_batch(around), strict=True):
        assert new.expansion.unmerge(found).tolist() == wanted, text


def with_added(added: AddedToken, normalizer: normalizers.Normalizer | None = None) -> BaseTokenizer:
    backend = metaspace()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([added])
    return BaseTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_an_added_character_that_plain_text_may_hold_is_refused() -> None:
    for base in (with_added(AddedToken("ß", single_word=True, normalized=False)),
                 with_added(AddedToken("Å", normalized=False), normalizers.NFC())):
        with pytest.raises(TokenizerError, match=r"the added token '[ßÅ]' is one character, and would be found"):
            extend(base, [base.new_token("dm")])
    base = with_added(AddedToken("ß", normalized=False))
    new = extend(base, [base.new_token("dm")])
    check_ids(base, new, "aßb dm ßdmß")


def test_where_bytes_are_missing_nothing_that_is_spelled_in_bytes_can_be_a_token() -> None:
    spec = json.loads(metaspace().to_str())
    spec["model"]["vocab"]["never"] = spec["model"]["vocab"].pop("<0xC3>")
    base = BaseTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec))))
    odd, plain = base.encode("aÃऑb"), base.encode("aऑb")
    assert odd[:-1] == [*plain[:-1], 0], "the library puts the unknown character behind the bytes"
    for text in ("ऑ", "aऑ", "\n\n"):
        with pytest.raises(TokenizerError, match="spelled in bytes, and this tokenizer lacks some"):
            base.new_token(text)
    check_ids(base, extend(base, [base.new_token("dm")]), "aÃdmऑdmÃb")


@every_merging_family
def test_a_new_merge_ahead_of_those_of_the_base_would_be_noticed(name: str) -> None:
    base, new = family_base(name), chained(name)
    spec = json.loads(new.backend.to_str())
    merges = spec["model"]["merges"]
    added = len(merges) - len(json.loads(base.backend.to_str())["model"]["merges"])
    spec["model"]["merges"] = merges[-added:] + merges[:-added]
    wrong = ExpandedTokenizer(Tokenizer.from_str(json.dumps(spec)), new.hf, new.expansion)
    with pytest.raises(AssertionError):
        check_ids(base, wrong, "".join(f"x{token.token}s {token.token}" for token in new.tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_what_its_list_says(name: str) -> None:
    scheme = family_base(name).scheme
    assert (scheme.only_merges, scheme.name == "unigram", scheme.name == "chunks") == (
        name in MERGING, name in UNIGRAM, name in CHUNKS)


# ---- not vacuous ---------------------------------------------------------------------------------


@every_family
def test_all_that_people_want_can_be_a_token(name: str) -> None:
    base = family_base(name)
    refused = {}
    for text in ALL_WANTED:
        try:
            base.new_token(text)
        except TokenizerError as error:
            refused[text] = str(error)
    if name in UNIGRAM or name == "crossing":  # their tiny vocabularies lack most characters
        refused = {text: why for text, why in refused.items() if "not know" not in why and "one token" not in why}
    if name in UNIGRAM:  # phrases begin where a word does, and an entry may reach into what has no space in front
        known = ("does not begin with a space", "can reach into it", "when it is split", "in the vocabulary already")
        refused = {text: why for text, why in refused.items() if not any(reason in why for reason in known)}
    if "phrases not" in base.describe():
        known = ("cannot take phrases", "cuts text at every space")
        refused = {text: why for text, why in refused.items() if not any(reason in why for reason in known)}
    assert refused.keys() == REFUSED.get(name, set()), refused


@every_family
def test_new_tokens_are_used(name: str) -> None:
    base, new = family_base(name), expanded(name)
    assert len(new.tokens) >= (20 if name in UNIGRAM else 30)
    text = "The cardiac ureteral heartbeats. cardiac"
    assert len(new.encode(text)) < len(base.encode(text)) - 5
    contexts = [before + token.token + after for token in new.tokens
                for before in ("", "x", "\n", ". ", ",") for after in ("", " ", ".", " x")]
    reached = {i for ids in new.encode_batch(contexts) for i in ids if i >= new.first_new_id}
    assert len(reached) == len(new.tokens)


def edited(name: str, edit: Callable[[dict[str, Any]], None]) -> ExpandedTokenizer:
    """A family's expanded tokenizer with a fault."""
    spec = json.loads(expanded(name).backend.to_str())
    edit(spec)
    return ExpandedTokenizer(Tokenizer.from_str(json.dumps(spec)), expanded(name).hf, expanded(name).expansion)


def with_added_tokens(name: str) -> ExpandedTokenizer:
    backend = Tokenizer.from_str(family_base(name).backend.to_str())
    backend.add_tokens([token.token for token in expanded(name).tokens])
    return ExpandedTokenizer(backend, expanded(name).hf, expanded(name).expansion)


def with_swapped_ids(name: str) -> ExpandedTokenizer:
    one, other = (token.key for token in expanded(name).tokens[:2])

    def swap(spec: dict[str, Any]) -> None:
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        else:
            keys = [entry[0] for entry in vocabulary]
            i, j = keys.index(one), keys.index(other)
            vocabulary[i][0], vocabulary[j][0] = other, one

    return edited(name, swap)


def prompts_of(base: BaseTokenizer, new: ExpandedTokenizer, text: str, name: str) -> None:
    check_prompts(base.hf, FAMILIES[name].as_hf(new.backend), new, text)


def fails(check: Callable[..., None], name: str, bad: ExpandedTokenizer, *rest: str) -> bool:
    """Tell whether a check fails on one of many texts."""
    for fragment in FRAGMENTS:
        try:
            check(family_base(name), bad, f"The {fragment}ally the{fragment} cardiac {fragment}", *rest)
        except (AssertionError, ValueError):
            return True
    return False


@every_family
@pytest.mark.parametrize("fault", [with_added_tokens, with_swapped_ids])
def test_faults_are_noticed(name: str, fault: Callable[[str], ExpandedTokenizer]) -> None:
    assert not fails(check_ids, name, expanded(name))
    assert fails(check_ids, name, fault(name))
    assert fails(prompts_of, name, fault(name), name)


def test_a_token_that_takes_its_neighbours_text_is_noticed_by_its_span() -> None:
    """The ids are right, the offsets are not."""
    name = "llama2"
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    bad = edited(name, lambda spec: spec.update(normalizer=strip))
    assert fails(check_offsets, name, bad)


def test_a_decoder_that_waits_is_noticed_by_the_stream() -> None:
    name = "gpt2"
    bad = edited(name, lambda spec: spec.update(decoder={"type": "Sequence", "decoders": [
        spec["decoder"], {"type": "Replace", "pattern": {"String": "c"}, "content": "\ufffd"}]}))
    assert fails(check_streaming, name, bad)


# ---- what cannot be extended ---------------------------------------------------------------------


def bert() -> Tokenizer:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def clip() -> Tokenizer:
    """BPE on characters with a mark at the end of a word."""
    backend = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "a</w>": 2}, [], end_of_word_suffix="</w>",
                                   unk_token="<|endoftext|>"))
    lines = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), lines, normalizers.Lowercase()])
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def characters() -> Tokenizer:
    """BPE on words of characters, as the first GPT."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@pytest.mark.parametrize(
    ("build", "there"),
    [
        (bert, "this is a WordPiece tokenizer"),
        (word_level, "this is a WordLevel tokenizer"),
        (clip, "this BPE tokenizer uses end_of_word_suffix='</w>'"),
        (characters, r"this BPE tokenizer splits by \['Whitespace'\]"),
    ],
)
def test_what_cannot_be_extended_is_refused_by_name(build: Callable[[], Tokenizer], there: str) -> None:
    with pytest.raises(TokenizerError, match=f"{there}.*; supported are .*BPE"):
        BaseTokenizer(PreTrainedTokenizerFast(tokenizer_object=build()))


# ---- known faults --------------------------------------------------------------------------------


def with_tokens(name: str, *texts: str) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    base = family_base(name)
    return base, extend(base, possible(base, texts))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi"])
def test_a_phrase_that_ends_in_an_apostrophe(name: str) -> None:
    check_ids(*with_tokens(name, "x'"), "x's x't")


def test_a_phrase_that_begins_with_an_apostrophe() -> None:
    check_ids(*with_tokens("starcoder", "'s\n"), "ि's\n")


def test_a_hazard_with_a_character_that_vanishes() -> None:
    check_ids(*with_tokens("crossing", " se"), "se,\x0b ")


def test_a_base_that_looks_up_whole_texts_is_refused() -> None:
    family = FAMILIES["llama2"]
    spec = json.loads(family.build().to_str())
    spec["model"]["ignore_merges"] = True
    with pytest.raises(TokenizerError, match="looks whole texts up before it merges"):
        BaseTokenizer(family.as_hf(Tokenizer.from_str(json.dumps(spec))))


@pytest.mark.slow
@settings(max_examples=examples(60))
@given(data=st.data())
def test_text_that_is_cut_at_spaces_with_unknown_characters(data: st.DataObject) -> None:
    """The class SentencePieceBPETokenizer makes such a tokenizer."""
    base = BaseTokenizer(FAMILIES["sentencepiece-bpe"].as_hf(cut_at_spaces(byte_fallback=False)))
    new = extend(base, possible(base))
    assert len(new.tokens) > 15
    check_ids(base, new, data.draw(texts("sentencepiece-bpe")))


NORMALIZERS = {
    "NFC": normalizers.NFC(), "NFKC": normalizers.NFKC(), "lower case": normalizers.Lowercase(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "spaces in front": normalizers.Prepend("  "), "ends stripped": normalizers.Strip(), "NMT": normalizers.Nmt(),
    "one space": normalizers.Replace(Regex(r"\s+"), " "),
}
FIRST_STEPS = {
    "digits": pre_tokenizers.Digits(False), "each digit": pre_tokenizers.Digits(True),
    "signs": pre_tokenizers.Punctuation("isolated"), "runs of signs": pre_tokenizers.Punctuation("contiguous"),
    "words": pre_tokenizers.Whitespace(), "spaces": pre_tokenizers.WhitespaceSplit(),
    "scripts": pre_tokenizers.UnicodeScripts(), "lengths": pre_tokenizers.FixedLength(7),
    "BERT": pre_tokenizers.BertPreTokenizer(), "hyphens": pre_tokenizers.CharDelimiterSplit("-"),
}
LAST_STEPS = {"Falcon": [pre_tokenizers.Digits(False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]}
OPTIONS = {"dropout of nothing": {"dropout": 0.0}, "joined unknowns": {"fuse_unk": True, "unk_token": "<|endoftext|>"},
           "bytes": {"byte_fallback": True}, "empty affixes": {"continuing_subword_prefix": "",
                                                               "end_of_word_suffix": ""}}
VARIANTS = [*NORMALIZERS, *FIRST_STEPS, *LAST_STEPS, *OPTIONS]


@cache
def varied(variant: str, prefixed: bool) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    """A GPT-2 with another normalizer, with a step in front of its own, or with an option of its model."""
    family = FAMILIES["roberta" if prefixed else "gpt2"]
    backend = family.build()
    backend.normalizer = NORMALIZERS.get(variant)
    if variant in FIRST_STEPS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([FIRST_STEPS[variant], backend.pre_tokenizer])
    if variant in LAST_STEPS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, *LAST_STEPS[variant]])
    spec = json.loads(backend.to_str())
    spec["model"].update(OPTIONS.get(variant, {}))
    base = BaseTokenizer(family.as_hf(Tokenizer.from_str(json.dumps(spec))))
    return base, extend(base, possible(base, [*ALL_WANTED, *(f" {text}" for text in ALL_WANTED)]))


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "space in front"])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=examples(15))
@given(data=st.data())
def test_bytes_behind_any_normalizer_and_any_first_step(variant: str, prefixed: bool, data: st.DataObject) -> None:
    base, new = varied(variant, prefixed)
    check_ids(base, new, data.draw(texts("roberta" if prefixed else "gpt2")))


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "space in front"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_words_are_found_behind_any_normalizer_and_any_first_step(variant: str, prefixed: bool) -> None:
    base, new = varied(variant, prefixed)
    assert len(new.tokens) > 8
    for token in new.tokens:
        assert base.scheme.key_text(token.key) == token.token
        check_ids(base, new, f"x{token.token} {token.token}")
    text = "x cardiac ureteral cardiac, cardiac"
    assert len(new.encode(text)) <= len(base.encode(text)) - (0 if variant == "lengths" else 4)


def test_rounded_scores_are_said() -> None:
    assert "its scores are rounded to 2^-24" in family_base("t5").describe()


def test_a_replacement_character_is_refused() -> None:
    # A stream of tokens holds text that ends in one back, waiting for the rest of a character.
    with pytest.raises(TokenizerError, match="contains the character that stands for broken text"):
        family_base("gpt2").new_token("-\ufffd")
