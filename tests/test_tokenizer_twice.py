"""Every family once more, on a base that has tokens of ours: what is exact there, and what is refused."""

from functools import cache

import pytest
from fuzz import every, examples
from hard_texts import ALL_WANTED, FRAGMENTS, possible
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FAMILIES, FEW, MERGING, every_family, every_merging_family, family_base
from tokenizer_checks import chained, check_ids, check_offsets, expanded, texts

from vocabext.errors import TokenizerError
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend
from vocabext.tokens import NewToken

# Phrases that overlap with each other, and with those that people want.
OVERLAPPING = [" of the", " the heart", " of the heart", "rate of", " signs and", " and symptoms", " of", "the the"]
ALREADY = "this tokenizer was extended by vocabext already; extend its base with both lists"
WITH_PHRASES = [name for name in FAMILIES if name not in MERGING]


def again(name: str, once: ExpandedTokenizer) -> BaseTokenizer:
    return BaseTokenizer(FAMILIES[name].as_hf(once.backend))


def words(base: BaseTokenizer, wanted: list[str]) -> list[NewToken]:
    """Tokens that the splitting hands over as they are."""
    alone = [token for token in possible(base, wanted) if len(base.scheme.chunks(token.token)) == 1]
    return [token for token in alone if " " not in token.token[1:]]


@cache
def twice(name: str) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    """Merges or words first, then whatever is possible."""
    base = family_base(name)
    once = chained(name) if name in MERGING else extend(base, words(base, ALL_WANTED[::2]))
    middle = again(name, once)
    return middle, extend(middle, possible(middle, [*ALL_WANTED, *OVERLAPPING, *FRAGMENTS]))


@cache
def phrases_first(name: str) -> tuple[BaseTokenizer, ExpandedTokenizer]:
    base = family_base(name)
    middle = again(name, extend(base, possible(base, [*ALL_WANTED[::2], *OVERLAPPING[::2]])))
    return middle, extend(middle, words(middle, ALL_WANTED))


@every_family
@settings(max_examples=examples(30))
@given(data=st.data())
def test_a_second_extension_keeps_the_ids_of_the_first(name: str, data: st.DataObject) -> None:
    middle, new = twice(name)
    text = data.draw(texts(name))
    check_ids(middle, new, text)
    check_offsets(middle, new, text)


@pytest.mark.slow
@every_family
def test_a_second_extension_is_no_empty_one(name: str) -> None:
    middle, new = twice(name)
    assert len(new.tokens) >= 20
    contexts = [before + token.token + after for token in new.tokens for before in ("", "x", "\n", ". ")
                for after in ("", " ", ".", " x")]
    assert len({i for ids in new.encode_batch(contexts) for i in ids if i >= new.first_new_id}) >= 10
    assert any(i >= family_base(name).first_new_id for ids in middle.encode_batch(contexts) for i in ids)


@every("name", WITH_PHRASES, few=[name for name in FEW if name in WITH_PHRASES])
@settings(max_examples=examples(15))
@given(data=st.data())
def test_words_can_be_added_to_a_base_with_phrases_of_ours(name: str, data: st.DataObject) -> None:
    middle, new = phrases_first(name)
    assert new.tokens
    parts = texts(name) | st.lists(st.sampled_from([*OVERLAPPING, *ALL_WANTED]), max_size=6).map("".join)
    check_ids(middle, new, data.draw(parts))


@every("name", WITH_PHRASES, few=[name for name in FEW if name in WITH_PHRASES])
def test_phrases_on_a_base_that_has_phrases_of_ours_are_refused(name: str) -> None:
    base, (middle, _) = family_base(name), phrases_first(name)
    assert "phrases not" in middle.describe()
    phrase = base.new_token(" and symptoms")
    with pytest.raises(TokenizerError, match=rf"^' and symptoms' is a phrase, and {ALREADY}$"):
        extend(middle, [phrase])


def test_without_that_refusal_the_second_phrase_would_cut_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    base = family_base("gpt2")
    middle = again("gpt2", extend(base, [base.new_token(" of the")]))
    monkeypatch.setattr(middle.scheme, "extended_before", False)
    monkeypatch.setattr(middle.scheme, "_listed_phrase", None)
    new = extend(middle, [middle.new_token(" rate of")])
    with pytest.raises(AssertionError):
        check_ids(middle, new, "x rate of the heart")


@every_merging_family
def test_a_base_that_is_searched_for_tokens_of_ours_is_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match=f"^{ALREADY}$"):
        again(name, expanded(name))
