import re
from typing import Any

import pytest
from fuzz import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers

from vocabext.tokenizer import boundaries
from vocabext.tokenizer.boundaries import (
    Definitions,
    MergeTable,
    character_class,
    escape,
    prefix_tree,
    whole_text_expression,
)


class Bpe:
    """A BPE model and the table of its merges."""

    def __init__(self, alphabet: str, pairs: list[tuple[int, int]]) -> None:
        """Take merges as pairs of indices into the tokens that are there by then, modulo their number."""
        symbols, merges = list(alphabet), []
        for left, right in pairs:
            pair = symbols[left % len(symbols)], symbols[right % len(symbols)]
            if pair not in merges and "".join(pair) not in symbols:
                merges.append(pair)
                symbols.append("".join(pair))
        vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
        self.model = models.BPE(vocabulary, merges)
        self.table = MergeTable(merges, vocabulary)

    def __call__(self, text: str) -> list[str]:
        return [piece.value for piece in self.model.tokenize(text)] if text else []


MODELS = st.builds(Bpe, st.just("abc"), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=14))
TEXTS = st.text("abc", max_size=9)


def cut_changes(bpe: Bpe, left: str, text: str, right: str) -> bool:
    return bpe(left + text + right) != bpe(left) + bpe(text) + bpe(right)


@settings(max_examples=examples(200))
@given(bpe=MODELS, text=st.text("abc", min_size=1, max_size=6), contexts=st.lists(st.tuples(TEXTS, TEXTS), max_size=20))
def test_outside_its_hazards_a_string_can_be_cut_out(bpe: Bpe, text: str, contexts: list[tuple[str, str]]) -> None:
    hazards = bpe.table.hazards(text)
    for left, right in contexts:
        if left.endswith(tuple(hazards.left)) or right.startswith(tuple(hazards.right)):
            continue
        assert not cut_changes(bpe, left, text, right), (left, text, right, hazards)


def test_inside_its_hazards_it_cannot() -> None:
    # The check above can fail: without the guards, these cuts change the ids.
    bpe = Bpe("abc", [(0, 1), (1, 2)])  # ab, bc
    assert bpe.table.hazards("b").left == {"a"}
    assert bpe.table.hazards("b").right == {"c"}
    assert cut_changes(bpe, "a", "b", "")
    assert cut_changes(bpe, "", "b", "c")


def test_a_merge_that_comes_too_late_is_no_hazard() -> None:
    # `b c` could happen across the edge of `ab`, but `a b` comes first and takes the b away.
    early = Bpe("abc", [(0, 1), (1, 2)])
    assert early.table.hazards("ab").right == frozenset()
    late = Bpe("abc", [(1, 2), (0, 1)])
    assert late.table.hazards("ab").right == {"c"}
    assert cut_changes(late, "", "ab", "c")


@settings(max_examples=examples(60))
@given(bpe=MODELS)
def test_hazards_are_not_just_everything(bpe: Bpe) -> None:
    hazards = bpe.table.hazards("a")
    assert hazards.right <= {right for left, right in bpe.table.ranks if left == "a"}
    assert hazards.left <= {left for left, right in bpe.table.ranks if right == "a"}


# ---- regular expressions -------------------------------------------------------------------------


def matches(expression: str, text: str) -> list[str]:
    """What the tokenizers library cuts out of a text for an expression: matches and what lies between them."""
    split: Any = pre_tokenizers.Split(Regex(expression), "isolated")
    return [chunk for chunk, _ in split.pre_tokenize_str(text)]


@pytest.mark.slow
@settings(max_examples=examples(150))
@given(text=st.text(min_size=1, max_size=5))
@example(text="-]^[\\")
@example(text="\x00\n")
def test_an_escaped_literal_matches_itself_only(text: str) -> None:
    assert matches(rf"\A{escape(text)}\z", text) == [text]
    assert matches(rf"\A{escape(text)}\z", f"{text}x") == [f"{text}x"]
    assert matches(rf"\A{character_class(text)}+\z", text) == [text]
    assert character_class("") == ""


@settings(max_examples=examples(150))
@given(words=st.sets(st.text("abc.", min_size=1, max_size=5), min_size=1, max_size=12),
       text=st.text("abc. ", max_size=30))
def test_the_tree_finds_the_longest_string(words: set[str], text: str) -> None:
    plain = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    expected = [part for part in re.split(f"({plain.pattern})", text) if part]
    assert matches(prefix_tree(dict.fromkeys(words, "")), text) == expected


def test_where_the_guard_of_the_longest_fails_a_shorter_one_is_tried() -> None:
    tree = prefix_tree({"ab": "", "abab": "(?!c)", "abc": r"(?=\z)"})
    assert matches(tree, "abababc") == ["abab", "abc"]
    assert matches(tree, "ababc") == ["ab", "abc"]
    assert matches(tree, "abcx") == ["ab", "cx"]


def test_what_is_needed_often_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundaries, "MAX_DEFINITIONS", 4)
    definitions = Definitions("(?<x0>a)")  # a name that is taken
    inner = definitions.call("[xyz]*+")
    guards = [definitions.call(f"(?!{inner}{c})") for c in "abcdefgh"]
    words = {f"{c}{i}": guards[i] for c in "stuvw" for i in range(8)}
    expression = definitions.written_out(prefix_tree({**words, "only once": definitions.call("(?=!)")}))
    assert definitions.call("") == ""
    assert expression.count("(?<") == 4
    assert "<x0>" not in expression
    assert expression.count("(?=!)") == 1
    written = {text: guard.replace(inner, "[xyz]*+") for text, guard in zip(
        words, [f"(?![xyz]*+{'abcdefgh'[int(text[1])]})" for text in words], strict=True)}
    plain = prefix_tree({**written, "only once": "(?=!)"})
    for text in ("s0a s0b s0xxa s0xxc", "t7h t7 w3yd w3y only once! only once", "u1bv1v1"):
        assert matches(expression, text) == matches(plain, text)
    assert Definitions().written_out("a|b") == "a|b"


def test_where_few_strings_go_on_the_tree_is_not_halved() -> None:
    few, many = ([f"{a}{b}" for a in "abcdefgh" for b in letters] for letters in ("xy", "uvwxyz"))
    assert "(?=" not in prefix_tree(dict.fromkeys(few, ""))
    assert "(?=" in prefix_tree(dict.fromkeys(many, ""))


# ---- guards of whole texts -----------------------------------------------------------------------


def guarded(bpe: Bpe, keys: list[str], **options: bool) -> str:
    return whole_text_expression(keys, bpe.table, **options)


@settings(max_examples=examples(200))
@given(bpe=st.builds(Bpe, st.just("ab.,"), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=14)),
       keys=st.sets(st.text("ab.,", min_size=1, max_size=5), min_size=1, max_size=5),
       texts=st.lists(st.text("ab.,", max_size=20), min_size=1, max_size=20))
def test_cutting_at_guarded_keys_changes_nothing(bpe: Bpe, keys: set[str], texts: list[str]) -> None:
    expression = guarded(bpe, sorted(keys))
    for text in texts:
        assert [piece for chunk in matches(expression, text) for piece in bpe(chunk)] == bpe(text)


def test_without_guards_it_would() -> None:
    bpe = Bpe("ab.,", [(0, 1), (1, 0)])  # ab, ba
    text = "a.ba.b"
    assert [p for chunk in matches(prefix_tree({".b": ""}), text) for p in bpe(chunk)] != bpe(text)
    assert [p for chunk in matches(guarded(bpe, [".b"]), text) for p in bpe(chunk)] == bpe(text)


def test_next_to_a_character_that_vanishes_nothing_is_cut() -> None:
    bpe = Bpe(".,", [(0, 1)])
    unsafe, safe = guarded(bpe, ["."]), guarded(bpe, ["."], drops_unknown=True)
    text = ".?,"  # the question mark is unknown: the model deletes it, and `.` and `,` merge
    assert bpe(text) == [".,"]
    assert [p for chunk in matches(unsafe, text) for p in bpe(chunk)] == [".", ","]
    assert [p for chunk in matches(safe, text) for p in bpe(chunk)] == [".,"]
    assert matches(safe, "..") == [".", "."]
    longer = Bpe(".,;", [(1, 2), (0, 3)])  # ,; and .,;
    guard = guarded(longer, ["."], drops_unknown=True)
    assert [p for chunk in matches(guard, ".,?;") for p in longer(chunk)] == longer(".,?;") == [".,;"]


def test_what_the_model_deletes_is_written_a_few_times_however_many_keys_there_are() -> None:
    alphabet = "".join(map(chr, range(0x61, 0x7B))) + ".,"
    merges = [(a, b) for a in alphabet for b in ".," if a != b]
    table = MergeTable([*merges, *((a, b + c) for a in alphabet for b, c in merges)],
                       {c: i for i, c in enumerate(alphabet)})
    keys = [a + b for a in alphabet[:26] for b in alphabet[:26]]
    few, many = (whole_text_expression(keys[:count], table, drops_unknown=True) for count in (52, 676))
    unknown = f"[^{character_class(alphabet)}]"
    assert many.count(unknown) <= few.count(unknown) + 1
    assert few.count(unknown) < 10
