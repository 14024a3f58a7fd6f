"""Guards around phrases, and how they are chosen."""

import re
from collections import Counter

import pytest
from tiny_tokenizers import family_base
from tokenizers import Regex, pre_tokenizers

from vocabext.tokenizer.chunks import ChunkScheme
from vocabext.tokenizer.phrases import FOLLOWING, LEFT, PRECEDING, RIGHT, SAMPLES, Guard, ending, right_guards
from vocabext.tokenizer.phrases import left_guard as widest_left


def matches(expression: str, text: str) -> bool:
    """Whether the expression holds somewhere in the text, for the engine that will run it."""
    step = pre_tokenizers.Split(Regex(expression), "removed")
    return [chunk for chunk, _ in step.pre_tokenize_str(text)] != [text]


@pytest.mark.parametrize("guard", {g.expression: g for guards in RIGHT.values() for g in guards}.values(),
                         ids=lambda g: g.expression)
def test_a_guard_on_the_right_is_its_expression(guard: Guard) -> None:
    for probe in FOLLOWING:
        assert guard.accepts(probe) == matches(f"\\A\ue000{guard.expression}", f"\ue000{probe}"), probe


@pytest.mark.parametrize("guard", LEFT, ids=lambda g: g.expression or "any")
def test_a_guard_on_the_left_is_its_expression(guard: Guard) -> None:
    for probe in PRECEDING:
        assert guard.accepts(probe) == matches(f"{guard.expression}\ue000\\z", f"{probe}\ue000"), probe


def test_samples_end_as_they_say() -> None:
    assert {end: {ending(text) for text in texts} for end, texts in SAMPLES.items()} == {e: {e} for e in SAMPLES}


def test_the_widest_guard_that_holds_is_taken() -> None:
    words = re.compile(r"\w+|\s|[^\w\s]+")
    signs = re.compile(r"\w+|\s|[^\w\s]+\w*")  # a sign takes the letters behind it along
    assert [right_guards(r.findall)["a sign"] for r in (words, signs)] == [RIGHT["a sign"][0], RIGHT["a sign"][3]]
    assert widest_left("ab cd", words.findall, 2) == LEFT[-1]  # behind a line break
    with_space = re.compile(r" ?\w+|\s|[^\w\s]+")
    assert widest_left(" ab cd", with_space.findall, 2) == LEFT[0]
    assert widest_left("x", re.compile(r"(?s).+").findall, 1) is None


def test_what_stands_in_front_of_phrases_is_split_once_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base = family_base("starcoder")
    assert isinstance(base.scheme, ChunkScheme)
    base.new_token(" of the heart")
    seen: Counter[str] = Counter()
    split = base.scheme.split
    monkeypatch.setattr(base.scheme, "split", lambda text: seen.update([text]) or split(text))
    for text in (" in a muscle", " and so on"):
        base.new_token(text)
    assert seen[" and so on"]
    assert not seen.keys() & set(PRECEDING) - {*FOLLOWING, " and so on"}
