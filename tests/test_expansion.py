import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabext.expansion import Expansion
from vocabext.records import NewToken

FIRST = 50
RUNS = st.lists(st.lists(st.integers(0, FIRST - 1), min_size=2, max_size=6).map(tuple), max_size=8)


def make(runs: list[tuple[int, ...]]) -> Expansion:
    return Expansion([NewToken(str(i), str(i), run) for i, run in enumerate(runs)], FIRST)


def slow_unmerge(runs: list[tuple[int, ...]], ids: list[int]) -> list[int]:
    return [base for i in ids for base in (runs[i - FIRST] if i >= FIRST else (i,))]


@given(runs=RUNS, data=st.data())
def test_unmerge_is_what_a_loop_would_do(runs: list[tuple[int, ...]], data: st.DataObject) -> None:
    expansion = make(runs)
    assert expansion.num_new == len(runs)
    ids = data.draw(st.lists(st.integers(0, FIRST + len(runs) - 1), max_size=30))
    expected = slow_unmerge(runs, ids)
    assert expansion.unmerge(ids).tolist() == expected
    lengths = expansion.run_lengths(ids).tolist()
    assert lengths == [len(runs[i - FIRST]) if i >= FIRST else 1 for i in ids]
    assert expansion.is_new(ids).tolist() == [i >= FIRST for i in ids]
    last = expansion.last_positions(ids).tolist()
    assert last == [sum(lengths[: k + 1]) - 1 for k in range(len(ids))]
    assert [expected[at] for at in last] == [runs[i - FIRST][-1] if i >= FIRST else i for i in ids]


def test_arrays_are_not_changed() -> None:
    ids = np.array([1, 50, 2])
    assert make([(7, 8)]).unmerge(ids).tolist() == [1, 7, 8, 2]
    assert ids.tolist() == [1, 50, 2]


def test_nothing_comes_from_nothing() -> None:
    for expansion in (make([]), make([(1, 2)])):
        assert expansion.unmerge([]).tolist() == []
        assert expansion.last_positions([]).tolist() == []
    assert make([]).unmerge([3, 4]).tolist() == [3, 4]


def test_an_id_that_is_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="id 52 is beyond the last new token 51"):
        make([(1, 2), (3, 4)]).unmerge([0, 52])
