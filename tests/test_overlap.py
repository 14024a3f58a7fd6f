"""Which snippets are one text."""

import numpy as np

from vocabext.distill.overlap import HEAD, text_numbers

RNG = np.random.default_rng(0)
DOCUMENT = RNG.integers(0, 1_000, 60)
OTHER = RNG.integers(0, 1_000, 60)


def test_equal_texts_and_texts_inside_others_are_one() -> None:
    assert text_numbers([DOCUMENT, OTHER, DOCUMENT.copy(), OTHER[10:30]]) == [0, 1, 0, 1]
    assert text_numbers([OTHER[10:30], DOCUMENT, OTHER]) == [0, 1, 0]
    assert text_numbers([]) == []


def test_windows_of_a_document_that_overlap_by_half_are_one() -> None:
    assert text_numbers([DOCUMENT[:40], DOCUMENT[20:60]]) == [0, 0]
    assert text_numbers([DOCUMENT[20:60], DOCUMENT[:40]]) == [0, 0]
    assert text_numbers([DOCUMENT[:40], DOCUMENT[21:60]]) == [0, 1]
    assert text_numbers([DOCUMENT[:30], DOCUMENT[30:], DOCUMENT[15:45]]) == [0, 0, 0]  # each is one with the third


def test_texts_that_only_share_a_passage_are_two() -> None:
    assert text_numbers([np.concatenate((DOCUMENT[:30], OTHER[:10])), np.concatenate((DOCUMENT[:30], OTHER[10:20]))]
                        ) == [0, 1]
    mixed = np.concatenate((OTHER[:5], DOCUMENT[:30], OTHER[5:10]))
    assert text_numbers([mixed, DOCUMENT]) == [0, 1]


def test_short_texts_are_one_with_their_equals_only() -> None:
    short = DOCUMENT[: HEAD - 1]
    assert text_numbers([short, DOCUMENT, short.copy(), DOCUMENT[: HEAD - 2]]) == [0, 1, 0, 2]
