"""Free writing and the shift of the distribution, against plain ways of computing them."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_writing import NUM_BASE, random_rows, sharp_model, some_tokens

from vocabext.checkpoint.folder import Rows
from vocabext.evaluate import decode as module
from vocabext.evaluate.decode import Begun, Written, fewest_steps, matches, write_on
from vocabext.evaluate.shift import lost_nats
from vocabext.model.frozen import FrozenModel
from vocabext.model.run_tree import RunTree
from vocabext.tokens import Expansion, NewToken


@torch.no_grad()
def plainly(model: FrozenModel, prompt: list[int], expansion: Expansion, rows: Rows | None, pieces: int) -> list[int]:
    """One whole forward pass per step."""
    ids, written = list(prompt), list[int]()
    while len(expansion.unmerge(written)) < pieces:
        hidden = model.hidden(model.embed(torch.tensor([ids]), rows and rows.input_ND, expansion.first_new_id))[0, -1:]
        logits = model.logits(hidden, first_new_id=NUM_BASE, new_rows_ND=rows.output_ND if rows else None)[0]
        written.append(int(logits.argmax()))
        ids.append(written[-1])
        if written[-1] in model.stop_ids:
            break
    return written


def read(model: FrozenModel, texts: list[Any], start: int, tokens: list[NewToken], first_new_id: int) -> list[Written]:
    """What the base makes of texts that all have a prompt of so many ids."""
    begun = Begun(model, [text[:start] for text in texts], Expansion(tokens, first_new_id), None)
    return begun.read([text[start:].tolist() for text in texts], range(len(texts)))


@pytest.mark.parametrize("at_once", [64, 2])
def test_many_prompts_are_continued_as_each_alone(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    model, rng = sharp_model(), np.random.default_rng(0)
    expansion = Expansion(some_tokens(rng, 5), NUM_BASE)
    rows = random_rows(model, expansion.num_new)
    prompts = [rng.integers(0, expansion.end_id, size) for size in (3, 9, 5)]
    found = write_on(model, prompts, expansion, rows, num_pieces=12)
    assert [some.ids for some in found] == [plainly(model, p.tolist(), expansion, rows, 12) for p in prompts]
    assert any(i >= NUM_BASE for some in found for i in some.ids)
    assert all(some.pieces == expansion.unmerge(some.ids).tolist() for some in found)
    base_prompts = expansion.unmerge_batch(prompts)
    found = write_on(model, base_prompts, expansion, None, num_pieces=12)
    assert [some.ids for some in found] == [plainly(model, p.tolist(), expansion, None, 12) for p in base_prompts]
    assert all(len(some.ids) == 12 for some in found)


def test_writing_ends_where_the_model_says_so() -> None:
    model, rng = sharp_model(), np.random.default_rng(0)
    expansion = Expansion(some_tokens(rng, 2), NUM_BASE)
    prompts = [rng.integers(0, NUM_BASE, 4) for _ in range(3)]
    free = write_on(model, prompts, expansion, None, num_pieces=8)
    model.model.generation_config.eos_token_id = free[0].ids[3]
    found = write_on(model, prompts, expansion, None, num_pieces=8)
    assert [some.ids for some in found] == [plainly(model, p.tolist(), expansion, None, 8) for p in prompts]
    assert len(found[0].ids) <= 4


def test_samples_follow_the_distribution() -> None:
    model, rng = sharp_model(), np.random.default_rng(0)
    expansion = Expansion(some_tokens(rng, 2), NUM_BASE)
    rows, prompt = random_rows(model, expansion.num_new, 0.5), rng.integers(0, NUM_BASE, 4)
    generator = torch.Generator().manual_seed(0)
    found = write_on(model, [prompt] * 2_000, expansion, rows, num_pieces=1, generator=generator)
    counts = np.bincount([some.ids[0] for some in found], minlength=expansion.end_id) / len(found)
    with torch.no_grad():
        hidden = model.hidden(model.embed(torch.from_numpy(prompt)[None]))[0, -1:]
        shares = torch.softmax(model.logits(hidden, first_new_id=NUM_BASE, new_rows_ND=rows.output_ND)[0], 0).numpy()
    assert np.abs(counts - shares).max() < 0.04


def test_what_was_written_is_as_likely_as_when_it_is_read() -> None:
    model, rng = sharp_model(), np.random.default_rng(0)
    expansion = Expansion(some_tokens(rng, 3), NUM_BASE)
    begun = Begun(model, [rng.integers(0, NUM_BASE, size) for size in (3, 7, 5)], expansion, None)
    written = begun.write(9)
    for some, again in zip(written, begun.read([some.ids for some in written], range(3)), strict=True):
        assert again.nats == pytest.approx(some.nats, rel=1e-6)
        assert torch.allclose(again.hidden_SD, some.hidden_SD, atol=1e-6)
    (alone,) = begun.read([written[2].ids[:4]], [2])
    assert alone.log_p_S.tolist() == pytest.approx(written[2].log_p_S[:4].tolist(), rel=1e-6)


def test_the_fewest_steps_take_the_longest_run_each_time() -> None:
    tree = RunTree.of([NewToken(str(run), str(run), run) for run in ((1, 2), (1, 2, 3), (3, 4))])
    assert matches([1, 2, 3, 4], 0, tree) == [(0, 2), (1, 3)]
    assert fewest_steps([1, 2, 3, 4, 3, 4, 5], tree) == 4
    assert fewest_steps([], tree) == 0
    assert fewest_steps([5, 1], tree) == 2


@torch.no_grad()
def spelled(model: FrozenModel, prompt: Any, text: tuple[int, ...], tokens: list[NewToken], rows: Rows) -> float:
    """Probability that expanded text begins with some pieces: all spellings one by one, states of the base's."""
    total = 0.0
    ids = torch.tensor([[*prompt, *text]])
    hidden = model.hidden(model.embed(ids))[0][len(prompt) - 1 :]
    shares = torch.softmax(model.logits(hidden, first_new_id=NUM_BASE, new_rows_ND=rows.output_ND), 1)
    runs = [(run, NUM_BASE + i) for i, run in enumerate(token.run for token in tokens)]

    def walk(at: int, share: float) -> None:
        nonlocal total
        if at >= len(text):
            total += share
            return
        for run, column in [((text[at],), text[at]), *runs]:
            rest = text[at:]
            if run[: len(rest)] == rest[: len(run)]:
                walk(at + len(run), share * float(shares[at, column]))

    walk(0, 1.0)
    return total


def test_lost_nats_add_up_all_spellings() -> None:
    model, rng = sharp_model(), np.random.default_rng(0)
    tokens = [NewToken(str(run), str(run), run) for run in ((4, 4), (4, 4, 7), (7, 4), (7, 4, 9, 9))]
    rows, prompt = random_rows(model, len(tokens)), rng.integers(0, NUM_BASE, 5)
    for text in ((4, 4, 7, 4), (7, 4, 4, 4, 7), (4, 7, 7), (9, 9, 7, 4), (4, 4)):
        ids = torch.tensor([[*prompt, *text]])
        with torch.no_grad():
            logs = model.log_probabilities(model.hidden(model.embed(ids))[0][4:-1], first_new_id=NUM_BASE)
        base = float(logs.gather(1, ids[0, 5:, None]).sum())
        texts = read(model, [ids[0].numpy()], 5, tokens, NUM_BASE)
        (lost,) = lost_nats(model, texts, RunTree.of(tokens), rows.output_ND)
        assert base - lost == pytest.approx(math.log(spelled(model, prompt, text, tokens, rows)), abs=1e-5)


def test_the_texts_of_the_expanded_model_add_up_to_one() -> None:
    first_new_id = 4
    model, prompt = sharp_model(first_new_id), [1, 2]
    tokens = [NewToken(str(run), str(run), run) for run in ((1, 1), (1, 2, 3), (3, 3, 3))]
    rows = random_rows(model, len(tokens))
    texts = [np.asarray([*prompt, *text]) for text in itertools.product(range(first_new_id), repeat=3)]
    lost = lost_nats(model, read(model, texts, 2, tokens, first_new_id), RunTree.of(tokens), rows.output_ND)
    total = divergence = 0.0
    for text, nats in zip(texts, lost, strict=True):
        ids = torch.from_numpy(text)[None]
        with torch.no_grad():
            logs = model.log_probabilities(model.hidden(model.embed(ids))[0][1:-1], first_new_id=first_new_id)
        base = math.exp(float(logs.gather(1, ids[0, 2:, None]).sum()))
        total, divergence = total + base * math.exp(-nats), divergence + base * nats
    assert total == pytest.approx(1.0, abs=1e-5)
    assert divergence > 0.01


def test_silent_rows_lose_nothing() -> None:
    model, rng = sharp_model(), np.random.default_rng(0)
    tokens = some_tokens(rng, 5)
    text = rng.integers(0, NUM_BASE, 12)
    with torch.no_grad():
        states = model.hidden(model.embed(torch.from_numpy(text)[None]))[0]
    quiet_ND = -1e4 * states.mean(0, keepdim=True).expand(len(tokens), -1)
    if bool((states @ quiet_ND[0] > -1e3).any()):
        quiet_ND = torch.linalg.lstsq(states, torch.full((len(states), 1), -1e4, dtype=states.dtype)).solution.T.expand(
            len(tokens), -1)
    (lost,) = lost_nats(model, read(model, [text], 4, tokens, NUM_BASE), RunTree.of(tokens), quiet_ND)
    assert lost == pytest.approx(0.0, abs=1e-9)
