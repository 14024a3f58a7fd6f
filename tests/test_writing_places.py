"""What the base would write at every place, against one forward pass per run and place."""

import math

import numpy as np
import pytest
import torch
from tiny_writing import NUM_BASE, sharp_model, some_tokens

from vocabext.model import places as module
from vocabext.model.frozen import FrozenModel
from vocabext.model.places import Places, concatenate, find_places
from vocabext.model.run_tree import RunTree
from vocabext.tokens import NewToken


@torch.no_grad()
def run_at(model: FrozenModel, context: list[int], run: tuple[int, ...]) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *run]])
    logs = model.log_probabilities(model.hidden(model.embed(ids))[0], first_new_id=NUM_BASE)
    at = range(len(context) - 1, len(context) - 1 + len(run))
    total = sum(float(logs[i, piece]) for i, piece in zip(at, run, strict=True))
    return total, all(int(logs[i].argmax()) == piece for i, piece in zip(at, run, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_runs_are_found_with_their_probability(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:  # many batches, and several sets of branches for a window
        monkeypatch.setattr(module, "WINDOW_POSITIONS", 12)
        monkeypatch.setattr(module, "BRANCH_POSITIONS", 4)
        monkeypatch.setattr(module, "HEAD_PLACES", 3)
    model, rng = sharp_model(), np.random.default_rng(0)
    tokens = some_tokens(rng, 60)
    windows = [rng.integers(0, NUM_BASE, length) for length in (5, 9, 3, 14)]
    found = find_places(model, windows, RunTree.of(tokens), first_new_id=NUM_BASE, likely=1e-3)
    got = {(int(found.window_P[p]), int(found.position_P[p]), t): (log_p, greedy) for p, t, log_p, greedy in zip(
        found.place_R.tolist(), found.token_R.tolist(), found.log_p_R.tolist(), found.greedy_R.tolist(),
        strict=True)}
    seen_likely = seen_greedy = 0
    for number, window in enumerate(windows):
        for position in range(len(window)):
            for index, token in enumerate(tokens):
                log_p, greedy = run_at(model, window[: position + 1].tolist(), token.run)
                have = got.pop((number, position, index), None)
                if have is None:
                    assert not greedy
                    assert log_p < math.log(1e-3) + 1e-4
                else:
                    assert have == (pytest.approx(log_p, abs=1e-3), greedy)
                    seen_likely, seen_greedy = seen_likely + 1, seen_greedy + greedy
    assert not got
    assert seen_likely > 10
    assert seen_greedy > 2


def test_places_say_what_the_base_predicts_there() -> None:
    model, rng = sharp_model(), np.random.default_rng(1)
    windows = [rng.integers(0, NUM_BASE, length) for length in (6, 4)]
    found = find_places(model, windows, RunTree.of(some_tokens(rng, 5)), first_new_id=NUM_BASE, first=2)
    assert sorted(zip(found.window_P.tolist(), found.position_P.tolist(), strict=True)) == [
        (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]
    for place in range(len(found)):
        window, position = windows[int(found.window_P[place])], int(found.position_P[place])
        hidden_TD = model.hidden(model.embed(torch.from_numpy(window[: position + 1])[None]))[0]
        logits_V = model.logits(hidden_TD[-1:], first_new_id=NUM_BASE)[0]
        assert torch.allclose(found.hidden_PD[place], hidden_TD[-1])
        assert float(found.top_P[place]) == pytest.approx(float(logits_V.max()), abs=1e-5)
        assert int(found.top_id_P[place]) == int(logits_V.argmax())
        assert float(found.normaliser_P[place]) == pytest.approx(float(torch.logsumexp(logits_V, 0)), abs=1e-5)
        following = int(window[position + 1]) if position + 1 < len(window) else -1
        assert int(found.next_P[place]) == following


def test_places_of_batches_are_numbered_on() -> None:
    model, rng = sharp_model(), np.random.default_rng(2)
    tree = RunTree.of(some_tokens(rng, 400))
    windows = [rng.integers(0, NUM_BASE, 12) for _ in range(4)]
    whole = find_places(model, windows, tree, first_new_id=NUM_BASE)
    parts: list[Places] = [find_places(model, windows[at : at + 2], tree, first_new_id=NUM_BASE) for at in (0, 2)]
    both = concatenate(parts)
    assert sorted(both.window_P.tolist()) == sorted(whole.window_P.tolist())

    def runs(places: Places) -> list[tuple[int, ...]]:
        where = zip(places.window_P[places.place_R].tolist(), places.position_P[places.place_R].tolist(), strict=True)
        return sorted((*at, token) for at, token in zip(where, places.token_R.tolist(), strict=True))

    assert runs(both) == runs(whole) != []


def test_a_tree_lists_the_children_of_nodes() -> None:
    tree = RunTree.of([NewToken("a", "a", (1, 2)), NewToken("b", "b", (1, 2, 3)), NewToken("c", "c", (4, 2))])
    parents, pieces, nodes = tree.children(torch.tensor([0]))
    assert (parents.tolist(), pieces.tolist()) == ([0, 0], [1, 4])
    parents, pieces, below = tree.children(nodes)
    assert (parents.tolist(), pieces.tolist()) == ([0, 1], [2, 2])
    assert tree.token_of[below].tolist() == [0, 2]
    assert tree.has_children(below).tolist() == [True, False]
