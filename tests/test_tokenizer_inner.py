"""Words inside runs of letters that no space divides (Chinese, Japanese), on byte-level BPE."""

import json
import random
from functools import cache

import pytest
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LLAMA_3_SPLIT, as_hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vocabext.corpus import Document
from vocabext.errors import TokenizerError
from vocabext.mine.stage import mine
from vocabext.options import MineConfig
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend
from vocabext.tokenizer.boundaries import MergeTable, holds_spaceless
from vocabext.tokenizer.inner import inner_guard, is_inner
from vocabext.tokens import NewToken

CHARACTERS = "患者有心肌病史临床高血压的了不在データの言語"
WORDS = ["心肌病", "患者", "患者有", "高血压", "病史", "データ", "言語", "的患者", "abc患者", "患者, 心肌病",
         "心肌病史 abc", " cardiac", "血压的"]
ODD = [*"abc ,。！1é한ไ", "  ", "\n", "😀", "・", "゛", "'s", "</s>", "\u0301"]


def trained(split: str | None, *, ignore_merges: bool = False, seed: int = 0) -> BaseTokenizer:
    """A byte-level tokenizer whose merges join characters, and parts of characters, in many ways."""
    rng = random.Random(seed)
    text = ["".join(rng.choices(CHARACTERS + "abc ", k=40)) for _ in range(60)]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split_steps = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split_steps, pre_tokenizers.ByteLevel(False,
                                                                                            use_regex=split is None)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens(["<s>", "</s>"])
    return BaseTokenizer(as_hf(backend))


@cache
def pair(split: str | None, seed: int) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    base = trained(split, seed=seed)
    tokens: dict[tuple[int, ...], NewToken] = {}
    for word in WORDS:
        try:
            token = base.new_token(word)
        except TokenizerError:
            continue
        tokens.setdefault(token.run, token)
    return base, extend(base, list(tokens.values()))


@pytest.mark.slow
@pytest.mark.parametrize("split", [None, LLAMA_3_SPLIT], ids=["gpt2", "llama3"])
@settings(max_examples=examples(300))
@given(parts=st.lists(st.sampled_from([*WORDS, *CHARACTERS, *ODD]) | st.text(max_size=2), max_size=12),
       seed=st.integers(0, 3))
def test_cuts_inside_a_run_of_letters_are_exact(split: str | None, parts: list[str], seed: int) -> None:
    base, new = pair(split, seed)
    found, wanted = new.encode("".join(parts)), base.encode("".join(parts))
    assert new.expansion.unmerge(found).tolist() == wanted
    assert new.decode(found) == base.decode(wanted)


@pytest.mark.parametrize("split", [None, LLAMA_3_SPLIT], ids=["gpt2", "llama3"])
def test_words_are_found_inside_a_run_of_letters(split: str | None) -> None:
    found = set()
    for seed in range(4):
        _, new = pair(split, seed)
        for offset, token in enumerate(new.tokens):
            for before in ("", "了", "a", "。"):
                for after in ("了", "不", ""):
                    if before + after and new.first_new_id + offset in new.encode(before + token.token + after):
                        found.add(token.token)
    assert {"心肌病", "高血压", "データ", " cardiac"} <= found


def test_without_its_guards_a_cut_would_be_wrong() -> None:
    wrong = 0
    for seed in range(4):
        base, new = pair(None, seed)
        spec = json.loads(new.backend.to_str())
        step = spec["pre_tokenizer"]["pretokenizers"][-2]
        # The tree alone, without what refuses neighbours.
        step["pattern"]["Regex"] = "|".join(t.token for t in new.tokens if is_inner(t.token))
        bare = ExpandedTokenizer(Tokenizer.from_str(json.dumps(spec)), base.hf, new.expansion)
        rng = random.Random(seed)
        for _ in range(300):
            text = "".join(rng.choices([*WORDS, *CHARACTERS], k=6))
            wrong += bare.expansion.unmerge(bare.encode(text)).tolist() != base.encode(text)
    assert wrong > 0


def test_what_counts_as_such_a_word() -> None:
    assert [is_inner(text) for text in ("心肌病", "データ", "心 肌", "a心", "・", "한국")] == [True] * 2 + [False] * 4
    assert [holds_spaceless(text) for text in ("a心", "한국 abc")] == [True, False]


def bytes_table(*merges: tuple[bytes, bytes]) -> MergeTable:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    spell = {c: pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(c)[0][0] for c in "心病的。"}
    letters = {b: c for text, key in spell.items() for b, c in zip(text.encode(), key, strict=True)}
    table = [("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for left, right in merges]
    return MergeTable(table, {c: i for i, c in enumerate(alphabet)})


def test_guards_are_written_for_characters() -> None:
    heart, ill, of = ("心".encode(), "病".encode(), "的".encode())
    inside = [(heart[:1], heart[1:2]), (heart[:2], heart[2:])]
    assert inner_guard("心", bytes_table(*inside)) == ""
    with_of = [*inside, (of[:1], of[1:2]), (of[:2], of[2:])]
    assert inner_guard("心", bytes_table(*with_of, (heart, of))) == "(?![的])"
    assert inner_guard("心", bytes_table(*with_of, (of, heart))) == "(?<![的]心)"
    # The first byte of 的 is that of every character from U+7000 to U+7FFF.
    assert inner_guard("心", bytes_table(*inside, (heart, of[:1]))) == r"(?![\x{7000}-\x{7FFF}])"
    # The last byte of 病 ends thousands of characters: the word is not cut out anywhere.
    assert inner_guard("心", bytes_table((ill[2:], heart[:1]), *inside)) is None


def steps(tokenizer: BaseTokenizer | ExpandedTokenizer) -> int:
    return len(json.loads(tokenizer.backend.to_str())["pre_tokenizer"]["pretokenizers"])


def test_a_word_whose_parts_are_tokens_is_a_merge_and_nothing_is_searched() -> None:
    base = trained(LLAMA_3_SPLIT, seed=2)
    words = ["有在", "有在的", "了有在的"]
    new = extend(base, [base.new_token(word) for word in words])
    assert steps(new) == steps(base)
    assert base.scheme.parts(new.tokens) == [(), (0,), (1,)]
    for before, after in (("", ""), ("史", ""), ("", "不"), ("史", "不")):
        for number, word in enumerate(words):
            assert new.first_new_id + number in new.encode(before + word + after)
    # Without the part in the middle the longest is searched for, and so is what holds it; the first stays a merge.
    some = extend(base, [new.tokens[0], new.tokens[2]])
    assert steps(some) == steps(base) + 1
    assert base.scheme.parts(some.tokens) == [(), ()]
    assert some.first_new_id + 1 in some.encode("史了有在的不")
    assert some.first_new_id in some.encode("史有在不")


@pytest.mark.slow
@settings(max_examples=examples(200))
@given(text=st.lists(st.sampled_from([*CHARACTERS, *ODD, "有在的"]), max_size=20).map("".join), seed=st.integers(0, 3))
def test_merges_inside_a_run_of_letters_are_exact(text: str, seed: int) -> None:
    base, new = merged(seed)
    assert steps(new) == steps(base)
    found = new.encode(text)
    assert new.expansion.unmerge(found).tolist() == base.encode(text)
    assert new.decode(found) == base.decode(base.encode(text))


@cache
def merged(seed: int) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    base = trained(LLAMA_3_SPLIT, seed=seed)
    rng = random.Random(seed)
    texts = ["".join(rng.choices("的了不在史有", k=30)) for _ in range(40)]
    result = mine([Document(str(i), text) for i, text in enumerate(texts)], base,
                  MineConfig(dedup=False, budget=20, min_count=5), at_most=True)
    assert len(result.tokens) > 10
    return base, extend(base, result.tokens)


def test_mining_finds_words_inside_runs_of_letters() -> None:
    base = trained(LLAMA_3_SPLIT, seed=2)
    rng = random.Random(5)
    texts = ["".join(rng.choices(["冠状动脉", *"的了不在史有"], k=30)) for _ in range(20)]
    result = mine([Document(str(i), text) for i, text in enumerate(texts)], base,
                  MineConfig(dedup=False, budget=1, min_count=5))
    # Its characters have three pieces each, which no merge of two makes: it is searched for.
    assert result.tokens[0].token == "冠状动脉"
    assert result.tokens[0].count > 20
    assert steps(extend(base, result.tokens)) == steps(base) + 1


def test_words_inside_runs_of_letters_are_mined_with_their_parts_and_beside_other_words() -> None:
    base = trained(LLAMA_3_SPLIT, seed=2)
    rng = random.Random(5)
    texts = ["".join(rng.choices(["有在的了", *"不史", " cardiac", " ab,"], k=30)) for _ in range(20)]
    result = mine([Document(str(i), text) for i, text in enumerate(texts)], base,
                  MineConfig(dedup=False, budget=9, min_count=5))
    names = [token.token for token in result.tokens]
    assert " cardiac" in names
    assert "有在的了" in names
    assert steps(extend(base, result.tokens[: names.index("有在的了") + 1])) == steps(base)
    parts = base.scheme.parts(result.tokens)[names.index("有在的了")]
    assert parts
    assert all(part < names.index("有在的了") for part in parts)
    assert result.parts == sum(token.count < 5 for token in result.tokens)


def test_what_cannot_be_searched_for_is_not_mined_and_not_counted_as_searched() -> None:
    plain = trained(LLAMA_3_SPLIT, ignore_merges=True, seed=2)
    spec = json.loads(plain.backend.to_str())
    key = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("不在史不在史")[0][0]
    spec["model"]["vocab"][key] = plain.first_new_id  # found by a lookup, never made by merges
    odd = BaseTokenizer(as_hf(Tokenizer.from_str(json.dumps(spec))))
    word = [plain.new_token("冠状动脉")]
    assert (len(plain.scheme.searched(word)), odd.scheme.searched(word)) == (1, [])
    rng = random.Random(5)
    texts = ["".join(rng.choices(["冠状动脉", *"的了不在史有"], k=30)) for _ in range(20)]
    result = mine([Document(str(i), text) for i, text in enumerate(texts)], odd,
                  MineConfig(dedup=False, budget=3, min_count=5))
    assert not any("冠" in text for text in [*(token.token for token in result.tokens), *result.rejected])


def test_where_a_lookup_could_find_more_than_merges_words_are_whole_chunks_only() -> None:
    base = trained(LLAMA_3_SPLIT, ignore_merges=True)
    spec = json.loads(base.backend.to_str())
    word = "心肌病史心"
    plain = len(json.loads(extend(base, [base.new_token(word)]).backend.to_str())["pre_tokenizer"]["pretokenizers"])
    assert plain == 3
    key = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("不在史不在史")[0][0]
    spec["model"]["vocab"][key] = base.first_new_id  # found by a lookup, never made by merges
    odd = BaseTokenizer(as_hf(Tokenizer.from_str(json.dumps(spec))))
    new = extend(odd, [odd.new_token(word)])
    assert len(json.loads(new.backend.to_str())["pre_tokenizer"]["pretokenizers"]) == plain - 1
    for text in (f"不在史不在史{word}", word, f"a {word}。"):
        assert new.expansion.unmerge(new.encode(text)).tolist() == odd.encode(text)
