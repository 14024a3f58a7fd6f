"""Merge and unmerge against slow loops that are plainly right, and against each other."""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabext.tokens import Expansion, NewToken

FIRST = 50
RUNS = st.lists(st.lists(st.integers(0, FIRST - 1), min_size=2, max_size=6).map(tuple), max_size=8)
Runs = list[tuple[int, ...]]


def make(runs: Runs) -> Expansion:
    return Expansion([NewToken(str(i), str(i), run) for i, run in enumerate(runs)], FIRST)


def slow_unmerge(runs: Runs, ids: list[int], keep: set[int] | frozenset[int] = frozenset()) -> list[int]:
    return [base for i in ids for base in (runs[i - FIRST] if i >= FIRST and i not in keep else (i,))]


@st.composite
def runs_and_ids(draw: st.DrawFn, rows: int = 1) -> tuple[Runs, list[list[int]], set[int]]:
    """The runs of some new tokens, sequences of expanded ids, and new ids to keep."""
    runs = draw(RUNS)
    # Every other id is a new one, if there are any: neighbours and repetitions are where mistakes hide.
    ids = st.integers(0, FIRST - 1) | st.integers(FIRST, FIRST + len(runs) - 1) if runs else st.integers(0, FIRST - 1)
    sequences = draw(st.lists(st.lists(ids, max_size=30), min_size=rows, max_size=rows))
    keep = draw(st.sets(st.integers(FIRST, FIRST + len(runs) - 1))) if runs else set()
    return runs, sequences, keep


@given(runs_and_ids())
def test_unmerge_is_what_a_loop_would_do(case: tuple[Runs, list[list[int]], set[int]]) -> None:
    runs, (ids,), _ = case
    expansion = make(runs)
    assert (expansion.num_new, expansion.end_id) == (len(runs), FIRST + len(runs))
    expected = slow_unmerge(runs, ids)
    assert expansion.unmerge(ids).tolist() == expected
    lengths = expansion.run_lengths(ids).tolist()
    assert lengths == [len(runs[i - FIRST]) if i >= FIRST else 1 for i in ids]
    assert expansion.is_new(ids).tolist() == [i >= FIRST for i in ids]
    assert expansion.counts(ids).tolist() == [ids.count(FIRST + i) for i in range(len(runs))]
    assert expansion.edges(ids).tolist() == [0, *accumulate(lengths)]
    last = expansion.last_positions(ids).tolist()
    assert last == [sum(lengths[: k + 1]) - 1 for k in range(len(ids))]
    assert [expected[at] for at in last] == [runs[i - FIRST][-1] if i >= FIRST else i for i in ids]


@given(runs_and_ids())
def test_new_ids_that_are_kept_stay_and_all_others_go(case: tuple[Runs, list[list[int]], set[int]]) -> None:
    runs, (ids,), keep = case
    expansion, kept = make(runs), sorted(keep)
    found = expansion.unmerge(ids, keep=kept)
    assert found.tolist() == slow_unmerge(runs, ids, keep)
    edges = expansion.edges(ids, keep=kept)
    assert np.diff(edges).tolist() == expansion.run_lengths(ids, keep=kept).tolist()
    for i, start, stop in zip(ids, edges, edges[1:], strict=False):
        assert found[start:stop].tolist() == slow_unmerge(runs, [i], keep)
    assert expansion.unmerge(found).tolist() == slow_unmerge(runs, ids)


@pytest.mark.slow
@given(runs_and_ids(rows=4))
def test_a_batch_is_unmerged_as_its_sequences_are(case: tuple[Runs, list[list[int]], set[int]]) -> None:
    runs, rows, keep = case
    expansion = make(runs)
    expected = [slow_unmerge(runs, ids, keep) for ids in rows]
    assert [r.tolist() for r in expansion.unmerge_batch(rows, keep=sorted(keep))] == expected
    arrays = [np.asarray(ids, np.int32) for ids in rows]
    assert [r.tolist() for r in expansion.unmerge_batch(arrays, keep=sorted(keep))] == expected
    assert expansion.unmerge_batch([]) == []


@given(runs_and_ids())
def test_merge_undoes_unmerge(case: tuple[Runs, list[list[int]], set[int]]) -> None:
    runs, (ids,), keep = case
    expansion, expanded = make(runs), np.asarray(ids, np.int64)
    at = np.flatnonzero(expansion.is_new(expanded))
    merged = expansion.merge(expansion.unmerge(expanded), expansion.edges(expanded)[at], expanded[at])
    assert merged.tolist() == ids
    # New ids that are there already stay: some of the tokens can be merged, or all in two steps.
    kept = sorted(keep)
    at = np.flatnonzero(expansion.is_new(expanded) & ~np.isin(expanded, kept))
    partly = expansion.unmerge(expanded, keep=kept)
    assert expansion.merge(partly, expansion.edges(expanded, keep=kept)[at], expanded[at]).tolist() == ids


@given(runs_and_ids(), st.data())
def test_merge_takes_the_places_where_the_runs_stand_and_no_others(
    case: tuple[Runs, list[list[int]], set[int]], data: st.DataObject
) -> None:
    runs, (ids,), _ = case
    base = slow_unmerge(runs, ids)
    pairs = st.tuples(st.integers(-1, len(base)), st.integers(FIRST, FIRST + len(runs) - 1))
    chosen = data.draw(st.lists(pairs, max_size=3)) if runs else []
    right, end, out = True, 0, []
    for position, new_id in chosen:
        run = list(runs[new_id - FIRST])
        right &= position >= end and base[position : position + len(run)] == run
        out += [*base[end:position], new_id]
        end = position + len(run)
    positions, new_ids = [p for p, _ in chosen], [i for _, i in chosen]
    if right:
        assert make(runs).merge(base, positions, new_ids).tolist() == [*out, *base[end:]]
    else:
        with pytest.raises(ValueError, match=r"position"):
            make(runs).merge(base, positions, new_ids)


@pytest.mark.parametrize(("positions", "new_ids", "words"), [
    ([1], [50], r"the ids at position 1 are \[8, 9\], but the run of the new id 50 is \[7, 8\]"),
    ([0, 3], [50, 51], r"the ids at position 3 are \[7, 8\], but the run of the new id 51 is \[8, 9\]"),
    ([0, 1], [50, 51], "position 1 comes before the end 2 of the run at position 0"),
    ([3, 0], [50, 50], "position 0 comes before the end 5 of the run at position 3"),
    ([0, 0], [50, 50], "position 0 comes before the end 2 of the run at position 0"),
    ([-2], [50], "the runs go from position -2 to 0, but there are 5 ids"),
    ([4], [50], "the runs go from position 4 to 6, but there are 5 ids"),
    ([0], [50, 51], "there are 1 positions for 2 new ids"),
    ([0], [7], "id 7 is a base id, the first new one is 50"),
    ([0], [52], "id 52 is beyond the last new token 51"),
])
def test_a_merge_that_is_none_names_both_sides(positions: list[int], new_ids: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make([(7, 8), (8, 9)]).merge([7, 8, 9, 7, 8], positions, new_ids)


def test_what_overlaps_and_repeats_is_merged_where_it_was_asked_for() -> None:
    expansion = make([(7, 7), (7, 7, 7)])
    assert expansion.merge([7] * 6, [0, 2], [50, 51]).tolist() == [50, 51, 7]
    assert expansion.merge([7] * 6, [1, 4], [51, 50]).tolist() == [7, 51, 50]
    assert expansion.merge([7] * 6, [], []).tolist() == [7] * 6


@pytest.mark.parametrize("operation", [
    lambda e, ids: e.unmerge(ids), lambda e, ids: e.unmerge(ids, keep=[50]), lambda e, ids: e.unmerge_batch([ids])[0],
    lambda e, ids: e.merge(ids, [0], [51]),
])
def test_arrays_are_neither_changed_nor_returned(operation: Callable[[Expansion, np.ndarray], np.ndarray]) -> None:
    ids = np.array([7, 9, 50, 2])
    found = operation(make([(7, 8), (7, 9)]), ids)
    assert ids.tolist() == [7, 9, 50, 2]
    assert found.dtype == np.int64
    assert not np.shares_memory(found, ids)


def test_nothing_comes_from_nothing() -> None:
    for expansion in (make([]), make([(1, 2)])):
        assert expansion.unmerge([]).tolist() == []
        assert expansion.last_positions([]).tolist() == []
        assert expansion.edges([]).tolist() == [0]
        assert expansion.merge([], [], []).tolist() == []
    assert make([]).unmerge([3, 4]).tolist() == [3, 4]
    assert make([]).counts([3, 4]).tolist() == []


def test_an_id_that_is_no_token_is_an_error() -> None:
    expansion = make([(1, 2), (3, 4)])
    with pytest.raises(ValueError, match="id 52 is beyond the last new token 51"):
        expansion.unmerge([0, 52])
    with pytest.raises(ValueError, match="id 52 is beyond the last new token 51"):
        expansion.counts([52])
    for odd in (49, 52):
        with pytest.raises(ValueError, match=f"id {odd} cannot be kept merged; the new tokens are 50 to 51"):
            expansion.unmerge([0, 50], keep=[50, odd])
