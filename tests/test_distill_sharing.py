"""Few texts for many tokens: who gets which snippets."""

import random

from vocabext.distill.input_rows.sharing import BEFORE, FROM, share_texts
from vocabext.tokens import NewToken, TokenSnippets

FIRST = 100


def record(number: int, *snippets: tuple[int, ...]) -> TokenSnippets:
    token = NewToken(f"t{number}", f"t{number}", (1, 2))
    return TokenSnippets(token, snippets, tuple(snippet.index(FIRST + number) for snippet in snippets), 9, 1)


def random_group(tokens: int, snippets: int) -> list[TokenSnippets]:
    rng = random.Random(0)
    records = []
    for number in range(tokens):
        made = []
        for _ in range(snippets):
            ids = [FIRST + min(int(rng.expovariate(0.1)), tokens - 1) if rng.random() < 0.3 else rng.randrange(100)
                   for _ in range(30)]
            ids[rng.randrange(30)] = FIRST + number
            made.append(tuple(ids))
        records.append(record(number, *made))
    return records


def texts(records: list[TokenSnippets], count: int) -> set[tuple[int, ...]]:
    return {snippet for r in records for snippet in r.snippets[:count]}


def test_a_text_that_holds_several_tokens_serves_them_all() -> None:
    both = (1, 2, 3, 4, FIRST, FIRST + 1, 5, 6, 7, 8, 9)
    alone = [(5, 6, 7, 8, FIRST + i, 1, 2, 3, 4) for i in (0, 1)]
    found = share_texts([record(0, both), record(1, alone[1])], [FIRST, FIRST + 1], 10)
    assert [r.snippets for r in found] == [(both,), (both,)]
    assert [r.positions for r in found] == [(4,), (5,)]
    assert [(r.occurrences, r.num_generated, r.new_token.token) for r in found] == [(9, 1, "t0"), (9, 1, "t1")]
    found = share_texts([record(0, alone[0]), record(1, alone[1])], [FIRST, FIRST + 1], 10)
    assert [r.snippets for r in found] == [(alone[0],), (alone[1],)]


def test_only_a_token_with_text_around_it_learns_from_the_snippet_of_another() -> None:
    for before, behind in ((BEFORE, FROM - 1), (BEFORE - 1, FROM - 1), (BEFORE, FROM - 2)):
        snippet = (*range(before), FIRST + 1, *range(behind - 1), FIRST)
        own = (3, FIRST + 1, 3)  # an own snippet will do in any case
        found = share_texts([record(0, snippet), record(1, own)], [FIRST, FIRST + 1], 10)
        assert found[1].snippets == ((snippet,) if before >= BEFORE and behind >= FROM - 1 else (own,))


def test_every_token_keeps_its_number_of_snippets_and_gets_none_twice() -> None:
    records = random_group(40, 12)
    records[3] = record(3, *records[3].snippets[:2])
    records[4] = TokenSnippets(records[4].new_token)
    found = share_texts(records, range(FIRST, FIRST + 40), 4)
    assert [len(r.snippets) for r in found] == [len(r.snippets) for r in records]
    for number, shared in enumerate(found):
        assert len(set(shared.snippets)) == len(shared.snippets)
        assert all(s[at] == FIRST + number for s, at in zip(shared.snippets, shared.positions, strict=True))
    assert share_texts(records, range(FIRST, FIRST + 40), 4) == found


def test_few_texts_are_enough_and_those_of_the_first_round_are_the_fewest() -> None:
    records = random_group(40, 12)
    found = share_texts(records, range(FIRST, FIRST + 40), 4)
    assert len(texts(found, 12)) < len(texts(records, 12)) / 2
    assert len(texts(found, 4)) < len(texts(records, 4)) / 2
    at_once = share_texts(records, range(FIRST, FIRST + 40), 12)
    assert len(texts(found, 4)) <= len(texts(at_once, 4))


def test_a_snippet_that_a_token_has_twice_stays_twice() -> None:
    twice = (FIRST, 1, 2)
    assert share_texts([record(0, twice, twice)], [FIRST], 10)[0].snippets == (twice, twice)
