import json
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fuzz import every, examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import tiny_folder
from tiny_tokenizers import KINDS, LLAMA_3_SPLIT, SPECIAL, TEXT, as_hf, gpt2, llama3, metaspace, tiny_base
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from vocabext import tokenizer as module
from vocabext.errors import TokenizerError, UsageError
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, chunks, extend, load_tokenizer, save_expanded
from vocabext.tokens import NewToken

WANTED = [
    " cardiac", "cardiac", " cardiacs", " ureter", " ureteral", "ureter", " heart rate", " heart rates", "signs and",
    " signs and symptoms", " symptoms", " the the", "ha ha", " ha ha ha", " of a heart", "mg/dL", " naïve cafés",
    "self.assertEqual(", "self.other", " it's a", "déjà vu", "שלום עולם", "中文字典", " a.b", "e\u0301te\u0301",
    " raters 12", "rest.", " (rate)", "s", "a the",
]
FRAGMENTS = [
    *WANTED, *(t.strip() for t in WANTED), *(t[:-1] for t in WANTED), *(t[1:] for t in WANTED), *SPECIAL,
    "<0x0A>", "<0x", "0A>", "<unk>", "<s", "▁", "▁▁", " ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000",
    "\u200d", "\u0301", "\u202e", "\ufeff", "\x00", "'", "’", "'s", "'t", ".", ",", "-", "(", ")", "/", "_", "1", "12",
    "999", "½", "²", "A", "É", "ß", "ﬁ", "Ａ", "ـ", "العربية", "שָׁלוֹם", "ไทย", "한국어", "👩\u200d👩", "🙂", "the",
    " the", "heart", " heart", "s", "ed", "al", "x", "Ġ", "Ċ",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=12).map("".join)


@cache
def expanded(kind: str) -> ExpandedTokenizer:
    base = tiny_base(kind)
    return extend(base, possible(base))


def possible(base: BaseTokenizer, wanted: list[str] = WANTED) -> list[NewToken]:
    tokens: dict[tuple[int, ...], NewToken] = {}
    for text in wanted:
        try:
            token = base.new_token(text)
        except TokenizerError:
            continue
        tokens.setdefault(token.run, token)
    return list(tokens.values())


def check_invariant(base: BaseTokenizer, new: ExpandedTokenizer, text: str) -> None:
    found, wanted = new.encode(text), base.encode(text)
    assert new.expansion.unmerge(found).tolist() == wanted
    assert len(found) <= len(wanted)
    assert new.decode(found) == base.decode(wanted)


def check_all(base: BaseTokenizer, new: ExpandedTokenizer, texts: list[str]) -> None:
    for text in texts:
        check_invariant(base, new, text)


# ---- the invariant -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(150))
@given(text=TEXTS)
@example(text="<0x0A>")
@example(text="</s><0x0A><s> cardiac<s>cardiac</s>")
@example(text=" cardiac cardiac cardiaccardiacs")
@example(text="")
def test_unmerging_gives_the_base_ids(kind: str, text: str) -> None:
    check_invariant(tiny_base(kind), expanded(kind), text)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_not_trivially_true(kind: str) -> None:
    base, new = tiny_base(kind), expanded(kind)
    assert len(new.tokens) >= 20
    text = "The cardiac ureter. cardiac signs and symptoms, naïve cafés of a heart"
    assert len(new.encode(text)) < len(base.encode(text)) - 6
    reached = {i for token in new.tokens for lead in ("", "x", "\n", ". ", ",") for tail in ("", " ", ".", " x")
               for i in new.encode(lead + token.token + tail) if i >= new.first_new_id}
    assert len(reached) >= 0.9 * len(new.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_extension_is_noticed(kind: str) -> None:
    # The check of the invariant can fail: tokens as AddedTokens match inside longer words.
    base = tiny_base(kind)
    good = expanded(kind)
    backend = Tokenizer.from_str(base.backend.to_str())
    backend.add_tokens([token.token for token in good.tokens])
    bad = ExpandedTokenizer(backend, base.hf, good.expansion)
    with pytest.raises((AssertionError, ValueError)):
        check_all(base, bad, [f"The {fragment}ally the{fragment}" for fragment in FRAGMENTS])


@settings(max_examples=examples(60))
@given(texts=st.lists(TEXTS, min_size=2, max_size=30))
def test_batches_are_encoded_like_single_texts(texts: list[str]) -> None:
    new = expanded("llama3")
    assert new.encode_batch(texts) == [new.encode(text) for text in texts]


ALPHABET = "abc "


@pytest.mark.slow
@settings(max_examples=examples(100))
@given(data=st.data())
def test_any_vocabulary_with_any_new_tokens(data: st.DataObject) -> None:
    """Few characters, many merges: almost every edge is one that some merge crosses."""
    symbols = ["a", "b", "c", module.SPACE_MARK]
    merges: list[tuple[str, str]] = []
    for _ in range(data.draw(st.integers(0, 12))):
        pair = data.draw(st.tuples(st.sampled_from(symbols), st.sampled_from(symbols)))
        if "".join(pair) not in symbols:
            merges.append(pair)
            symbols.append("".join(pair))
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate([*symbols, *SPECIAL])}, merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    base = BaseTokenizer(as_hf(backend))
    strings = st.text(ALPHABET, min_size=1, max_size=8)
    tokens = possible(base, data.draw(st.lists(strings, max_size=6)))
    try:
        new = extend(base, tokens)
    except TokenizerError:
        with pytest.raises(TokenizerError, match="cannot be reached by merges"):
            extend(base, [])  # an honest refusal: some tables of merges are beyond repair
        return
    texts = [*data.draw(st.lists(st.text(ALPHABET + "?", max_size=25), min_size=5, max_size=20))]
    texts += [a.token + b.token for a in new.tokens for b in new.tokens]
    check_all(base, new, texts)


# ---- ids and specials ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_new_ids_follow_the_last_and_special_tokens_keep_theirs(kind: str) -> None:
    base, new = tiny_base(kind), expanded(kind)
    assert new.first_new_id == base.first_new_id == 1 + max(base.backend.get_vocab().values())
    for offset, token in enumerate(new.tokens):
        assert new.backend.token_to_id(token.key) == new.first_new_id + offset
    for special in SPECIAL:
        assert new.backend.token_to_id(special) == base.backend.token_to_id(special)
        assert new.encode(f"a{special}b") == base.encode(f"a{special}b")
    old = base.backend.get_vocab()
    assert {key: i for key, i in new.backend.get_vocab().items() if i < new.first_new_id} == old


def test_without_care_special_tokens_are_renumbered() -> None:
    # The trap itself: if this fails one day, the care in `extend` is no longer needed.
    base = tiny_base("llama3")
    spec = json.loads(base.backend.to_str())
    spec["model"]["vocab"]["Ġcardiac"] = base.first_new_id
    assert Tokenizer.from_str(json.dumps(spec)).token_to_id("<s>") != base.backend.token_to_id("<s>")


def test_the_prefix_of_a_prompt_is_found() -> None:
    assert tiny_base("gpt2").prefix_ids == []
    assert tiny_base("llama3").prefix_ids == [tiny_base("llama3").added["<s>"]]
    assert expanded("llama3").prefix_ids == tiny_base("llama3").prefix_ids


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
def test_the_text_of_a_byte_token_does_not_become_the_byte(kind: str) -> None:
    base, new = tiny_base(kind), expanded(kind)
    texts = ["<0x0A>", " <0x0A>", "\n<0x0A>\n", "</s><0x0A>", "cardiac<0x0A>cardiac", "<0x0A><0x0A>", "cardiac<unk>"]
    check_all(base, new, texts)
    check_all(base, extend(base, [base.new_token("0x0A"), base.new_token(" cardiac")]), texts)
    check_all(base, extend(base, [base.new_token("0x0A>")]), texts)
    assert base.vocabulary["<0x0A>"] not in new.encode("cardiac<0x0A>")
    assert base.vocabulary["<0x0A>"] in new.encode("\n")


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
def test_without_protection_it_would(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseTokenizer(as_hf(KINDS[kind]()))
    monkeypatch.setitem(base.scheme.__dict__, "unreachable", {})
    new = extend(base, [base.new_token(" cardiac")])
    with pytest.raises(AssertionError):
        check_all(base, new, ["</s><0x0A>", "x cardiac<0x0A> cardiac", " cardiac<0x0A>"])


def test_an_entry_that_cannot_be_protected_is_refused() -> None:
    spec = json.loads(gpt2().to_str())
    spec["model"]["vocab"]["theatrics"] = 342  # a whole chunk, and no merge makes it
    base = BaseTokenizer(as_hf(Tokenizer.from_str(json.dumps(spec))))
    with pytest.raises(TokenizerError, match="'theatrics' cannot be reached by merges"):
        extend(base, [base.new_token(" cardiac")])


def test_an_entry_that_cannot_be_protected_is_refused_under_python_o() -> None:
    spec = json.loads(gpt2().to_str())
    spec["model"]["vocab"]["theatrics"] = 342
    scheme = BaseTokenizer(as_hf(Tokenizer.from_str(json.dumps(spec)))).scheme
    without_asserts: dict[str, Any] = {"__name__": "without_asserts"}
    source = Path(chunks.__file__).read_text(encoding="utf-8")
    exec(compile(source, chunks.__file__, "exec", optimize=1), without_asserts)
    with pytest.raises(TokenizerError, match="'theatrics' cannot be reached by merges"):
        without_asserts["ChunkScheme"].extended(scheme, [scheme.new_token(" cardiac")])


def test_an_added_token_that_wants_to_stand_alone_is_refused() -> None:
    # Inside `rate1` it is not taken out of the text, but a chunk of its own.
    spec = json.loads(gpt2().to_str())
    token = {"id": 342, "content": "ureter", "single_word": True, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
    spec["added_tokens"].append(token)
    base = BaseTokenizer(as_hf(Tokenizer.from_str(json.dumps(spec))))
    with pytest.raises(TokenizerError, match="'ureter' cannot be reached by merges"):
        extend(base, [base.new_token(" cardiac")])


# ---- which texts can be tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("gpt2", "", "the text is empty"),
        ("gpt2", " the", "is in the vocabulary already"),
        ("gpt2", "x<s>y", "contains the added token '<s>'"),
        ("metaspace", " the", "is in the vocabulary already"),
        ("crossing", " cardiac qi", "has characters that this tokenizer does not know"),
    ],
)
def test_what_cannot_be_a_token_says_why(kind: str, text: str, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        tiny_base(kind).new_token(text)


def test_the_normalizer_decides_what_a_token_is() -> None:
    backend = llama3()
    backend.normalizer = normalizers.NFC()
    base = BaseTokenizer(as_hf(backend))
    assert base.new_token(" cafe\u0301s") == base.new_token(" cafés")
    new = extend(base, [base.new_token(" cafe\u0301s")])
    assert new.tokens[0].token == " cafés"
    assert new.encode("x cafe\u0301s")[-1] == new.first_new_id
    check_invariant(base, new, "x cafe\u0301s cafés\u0301")


def test_a_token_names_its_run_and_its_text() -> None:
    for kind in KINDS:
        base, new = tiny_base(kind), expanded(kind)
        for offset, token in enumerate(new.tokens):
            assert base.scheme.key_text(token.key) == token.token
            # The decoder of a space-mark tokenizer strips the space at the start of a text.
            assert new.decode([new.first_new_id + offset]) in (token.token, token.token.removeprefix(" "))
            assert token.run == tuple(new.expansion.unmerge([new.first_new_id + offset]))


def test_two_strings_with_one_run_are_refused() -> None:
    base = tiny_base("gpt2")
    token = base.new_token(" cardiac")
    with pytest.raises(TokenizerError, match="' cardiac' and ' cardiac' have the same base ids"):
        extend(base, [token, token])
    spaced = tiny_base("metaspace").new_token(" cardiac")
    marked = tiny_base("metaspace").new_token("▁cardiac")  # the mark is a space to this tokenizer
    with pytest.raises(TokenizerError, match="have the same base ids; keep one of them"):
        extend(tiny_base("metaspace"), [spaced, marked])


def test_a_token_of_another_tokenizer_is_refused() -> None:
    token = tiny_base("metaspace").new_token(" cardiac")
    with pytest.raises(TokenizerError, match="these tokens were made for another tokenizer"):
        extend(tiny_base("crossing"), [token])


def test_extending_leaves_the_base_as_it_is() -> None:
    base = tiny_base("metaspace")
    before = base.backend.to_str()
    extend(base, possible(base))
    assert base.backend.to_str() == before
    assert extend(base, []).encode("The cardiac <0x0A>") == base.encode("The cardiac <0x0A>")


# ---- phrases on chunks ---------------------------------------------------------------------------


def with_split(*steps: Any) -> BaseTokenizer:
    backend = gpt2()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return BaseTokenizer(as_hf(backend))


@pytest.mark.parametrize(
    "steps",
    [
        (pre_tokenizers.Split(Regex(r"(?<=\p{L})\p{N}+|.|\s"), "isolated"),),
        (pre_tokenizers.Split(Regex(r"\w+\b|\W"), "isolated"),),
        (pre_tokenizers.Split(Regex(r"^\w+|\w+|\W"), "isolated"),),
        (pre_tokenizers.Split(Regex(r" ?\p{L}+"), "merged_with_next"),),
        (pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")),
    ],
)
def test_behind_splitting_that_looks_back_or_is_unknown_only_words_are_taken(steps: tuple[Any, ...]) -> None:
    base = with_split(*steps)
    assert "phrases not" in base.describe()
    phrases = [" signs and symptoms", "cardiac rate", "ha ha ha"]
    assert possible(base, phrases) == [t for t in possible(base, phrases) if len(base.scheme.chunks(t.token)) == 1]
    new = extend(base, possible(base))
    for fragment in FRAGMENTS:
        check_invariant(base, new, f"a{fragment} cardiac {fragment}")


# What DeepSeek V3 splits by, in its order.
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}", r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
    r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
LAYOUT = ["):\n        return", "    return", "\n        ", ":\n       ", "):\n", " 5 mg", " 10 mm Hg",
          ".assertEqual(self", " (the", " heart, ", "the\n\nend", "\n\n  and", "1999 and"]


STEPS = {
    "deepseek": tuple(pre_tokenizers.Split(Regex(expression), "isolated") for expression in DEEPSEEK_SPLITS),
    "digits": (pre_tokenizers.Digits(True), pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")),
    "gaps": (pre_tokenizers.Split(Regex(r"\s+"), "isolated"),),  # words are what lies between two matches
    "one": (pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),),
    "repeated": (pre_tokenizers.Split(Regex(rf"([^\s\p{{L}}])\1+|{LLAMA_3_SPLIT}"), "isolated"),),  # refers back
}


@cache
def with_layout(name: str) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    base = with_split(*STEPS[name])
    return base, extend(base, possible(base, [*WANTED, *LAYOUT]))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=examples(150))
@given(data=st.data())
def test_phrases_behind_several_splitting_steps(name: str, data: st.DataObject) -> None:
    base, new = with_layout(name)
    parts = st.sampled_from([*FRAGMENTS, *LAYOUT, *(t.token for t in new.tokens)])
    check_invariant(base, new, "".join(data.draw(st.lists(parts | st.text(max_size=3), max_size=8))))


@pytest.mark.parametrize("name", STEPS)
def test_there_are_phrases_behind_several_splitting_steps(name: str) -> None:
    base, new = with_layout(name)
    phrases = {t.token: i for i, t in enumerate(new.tokens) if len(base.scheme.chunks(t.token)) > 1}
    assert len(phrases) >= 4
    for phrase, i in phrases.items():
        assert any(new.first_new_id + i in new.encode(before + phrase + after)
                   for before in ("", "x", ".", "\n") for after in ("", " x", "x", " 1")), phrase


def test_a_phrase_with_digits_is_refused_where_digits_stand_alone() -> None:
    base = with_split(pre_tokenizers.Digits(True), pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"))
    with pytest.raises(TokenizerError, match="a phrase with digits, which this tokenizer always cuts apart"):
        base.new_token(" 10 mm Hg")


def test_a_phrase_whose_beginning_depends_on_what_stands_before_is_refused() -> None:
    steps = pre_tokenizers.Split(Regex(r"x?\n?x|."), "isolated"), pre_tokenizers.Split(Regex("y"), "isolated")
    base = with_split(*steps)
    with pytest.raises(TokenizerError, match="'xyz' is a phrase whose first cut depends on what stands before it"):
        base.new_token("xyz")


def test_a_phrase_whose_ending_depends_on_what_follows_is_refused() -> None:
    base = with_split(pre_tokenizers.Split(Regex(r"\n\s+[A-Za-z]?|\s+\S|\S+|\s"), "isolated"))
    with pytest.raises(TokenizerError, match="ends in a space, where its cut depends on what follows"):
        base.new_token("a\n  ")


def test_a_phrase_that_what_follows_could_cut_elsewhere_is_refused() -> None:
    base = with_split(pre_tokenizers.Split(Regex(r" ?\p{L}+(?! ureter)|[\s\S]"), "isolated"))
    base.new_token(" heart cardiac")
    eager = with_split(pre_tokenizers.Split(Regex(r" ?\p{L}*q(?:\.x)?| ?\p{L}+|[\s\S]"), "isolated"))
    eager.new_token(" heart rate")
    with pytest.raises(TokenizerError, match=r"' heart q' is cut differently when '\.x' follows"):
        eager.new_token(" heart q")


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_a_phrase_is_a_token_only_where_its_guard_holds(kind: str) -> None:
    new = expanded(kind)
    phrase = new.first_new_id + [t.token for t in new.tokens].index(" signs and symptoms")
    for tail in ("", ".", " and", "\n", ")", "-x"):
        assert phrase in new.encode(f"The signs and symptoms{tail}"), tail
    for tail in ("x", "1", "'s", "’s", "\u0301"):
        assert phrase not in new.encode(f"The signs and symptoms{tail}"), tail


def test_a_word_is_found_only_as_a_whole_word() -> None:
    for kind in KINDS:
        new = expanded(kind)
        # Where tokens cross spaces, `The` takes the space that follows it.
        text = "ureter" if kind == "crossing" else " ureter"
        ureter = new.first_new_id + [t.token for t in new.tokens].index(text)
        assert ureter in new.encode("The ureter")
        assert ureter in new.encode("The ureter(the")
        assert ureter not in new.encode("The ureteral the ureters")


# ---- what is refused by name ---------------------------------------------------------------------


def word_piece() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def changed(change: Any, start: Any = gpt2) -> Tokenizer:
    spec = json.loads(start().to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (word_piece, "this is a WordPiece tokenizer; supported are BPE"),
        (lambda: changed(lambda s: s["model"].update(end_of_word_suffix="</w>")), "uses end_of_word_suffix='</w>'"),
        (lambda: changed(lambda s: s["model"].update(dropout=0.1)), "uses dropout=0.1"),
        (lambda: changed(lambda s: s["pre_tokenizer"].update(use_regex=False)), "does not split the text"),
        (lambda: changed(lambda s: s.update(pre_tokenizer=None)), "splits by nothing"),
        (lambda: changed(lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Isolated"}, s["pre_tokenizer"]]}), metaspace),
         r"splits by \['Punctuation', 'Metaspace'\]"),
    ],
)
def test_other_tokenizers_are_refused_by_name(backend: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        BaseTokenizer(as_hf(backend()))


def test_a_folder_that_is_not_there_or_holds_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing does not exist"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(TokenizerError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
    tiny = tiny_folder(tmp_path / "base")
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json in it; copy the tokenizer files"):
        load_tokenizer(tiny)


def test_an_expanded_folder_that_cannot_be_extended_again_says_so(tmp_path: Path) -> None:
    as_hf(metaspace()).save_pretrained(tmp_path)
    new = extend(load_tokenizer(tmp_path), possible(load_tokenizer(tmp_path)))
    save_expanded(new, tmp_path, tmp_path)
    with pytest.raises(TokenizerError, match="this tokenizer was extended by vocabext already; extend its base"):
        load_tokenizer(tmp_path)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "new").mkdir()
    as_hf(KINDS[kind]()).save_pretrained(tmp_path / "base")
    base = load_tokenizer(str(tmp_path / "base"))
    new = extend(base, possible(base))
    assert save_expanded(new, tmp_path / "base", tmp_path / "new") == []
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert loaded.special_tokens_map == base.hf.special_tokens_map
    for fragment in FRAGMENTS:
        text = f"The {fragment}. {fragment}"
        assert loaded.encode(text, add_special_tokens=False) == new.encode(text)
        framed = loaded.encode(text)
        assert new.expansion.unmerge(framed).tolist() == base.hf.encode(text)
        assert loaded.decode(framed) == base.hf.decode(base.hf.encode(text))


def test_a_folder_with_the_class_of_the_model_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaTokenizer rebuilds the pre-tokenizer and the BPE model, and the new tokens are gone."""
    for name in ("base", "new"):
        (tmp_path / name).mkdir()
    as_hf(metaspace()).save_pretrained(tmp_path / "base")
    base = load_tokenizer(str(tmp_path / "base"))
    new = extend(base, possible(base))
    original = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, **options: (
        with_class(Path(folder), "LlamaTokenizer"), original(folder, **options))[1])
    with pytest.raises(TokenizerError, match=r"transformers loads another (model|pre_tokenizer) than was written"):
        save_expanded(new, tmp_path / "base", tmp_path / "new")


def with_class(folder: Path, name: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))


def test_the_base_is_what_the_class_of_the_model_makes_of_it(tmp_path: Path) -> None:
    as_hf(metaspace()).save_pretrained(tmp_path)
    with_class(tmp_path, "LlamaTokenizer")
    base = load_tokenizer(str(tmp_path))
    assert isinstance(base.hf, LlamaTokenizer)
    assert base.scheme.spec == json.loads(base.hf.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    (tmp_path / "new").mkdir()
    new = extend(base, possible(base))
    save_expanded(new, tmp_path, tmp_path / "new")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    for fragment in FRAGMENTS:
        assert loaded.encode(f"The {fragment}.", add_special_tokens=False) == new.encode(f"The {fragment}.")
        check_invariant(base, new, f"The {fragment}.")


def test_files_that_would_bring_the_old_tokenizer_back_are_named(tmp_path: Path) -> None:
    for name in ("base", "new"):
        (tmp_path / name).mkdir()
    as_hf(gpt2()).save_pretrained(tmp_path / "base")
    for name in ("merges.txt", "vocab.json"):
        (tmp_path / "base" / name).write_text("{}")
    base = tiny_base("gpt2")
    assert save_expanded(expanded("gpt2"), tmp_path / "base", tmp_path / "new") == ["merges.txt", "vocab.json"]
    assert base.first_new_id < AutoTokenizer.from_pretrained(tmp_path / "new").vocab_size


# ---- units ---------------------------------------------------------------------------------------


def test_units_are_chunks_or_words() -> None:
    text = "The heartless theatre, self.a"
    expected = {"gpt2": "The| heartless| theatre|,| self|.|a", "llama3": "The| heartless| theatre|,| self|.a",
                "metaspace": " |The| heartless| theatre|,| self|.|a"}
    for kind, units in expected.items():
        base = tiny_base(kind)
        (found,) = base.scheme.encode_units([text])
        assert found.ids.tolist() == base.encode(text)
        keys = [base.backend.id_to_token(i) or "" for i in found.ids.tolist()]
        marked = [("|" if start else "") + base.scheme.key_text(key)
                  for start, key in zip(found.starts, keys, strict=True)]
        assert "".join(marked)[1:] == units, kind


# ---- real tokenizers -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.assets
@every("name", ["gpt2", "gpt-neox-20b", "llama-2", "qwen-tiktoken"], few=["gpt2", "llama-2"])
def test_real_tokenizers(name: str, assets: Path, tmp_path: Path) -> None:
    archive = assets / "tokenizers" / f"{name}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is absent")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    base = load_tokenizer(tmp_path / name)
    words = (assets / "new_tokens" / "medical_new_tokens.txt").read_text().splitlines()[::20]
    tokens = possible(base, [*words, *WANTED])
    assert len(tokens) > 120
    new = extend(base, tokens)
    for i, token in enumerate(tokens):
        fragment = FRAGMENTS[i % len(FRAGMENTS)]
        follower = tokens[(i * 7 + 1) % len(tokens)].token
        for text in (token.token, f"x{token.token}{fragment}", f"{fragment}{token.token}", token.token + follower,
                     f"The{token.token} and{follower}, {TEXT[i % len(TEXT)]}"):
            check_invariant(base, new, text)
    (tmp_path / "new").mkdir()
    stale = save_expanded(new, tmp_path / name, tmp_path / "new")
    assert "tokenizer.json" not in stale
    shutil.rmtree(tmp_path / name)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "The cardiac ureter <0x0A>\n signs and symptoms" + "".join(t.token for t in tokens)
    assert loaded.encode(text, add_special_tokens=False) == new.encode(text)
