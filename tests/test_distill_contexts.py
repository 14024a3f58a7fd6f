"""The past that teacher and student share: the same numbers as the plain way, on several kinds of models."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from vocabext.distill.input_rows.contexts import chunks, sharing_is_exact, teach
from vocabext.distill.input_rows.engine import Objective, Taught, fit_rows, held_out_errors, snippet_errors
from vocabext.distill.input_rows.examples import Examples, build_examples
from vocabext.model.frozen import FrozenModel
from vocabext.tokens import Expansion, NewToken, TokenSnippets

FIRST = 90
EXPANSION = Expansion([NewToken("ab", "ab", (1, 2)), NewToken("cde", "cde", (3, 4, 5)), NewToken("fg", "fg", (6, 7))],
                      FIRST)
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0,
         "eos_token_id": 0}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0,
                                      eos_token_id=0))


def gemma(window: int = 64) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SIZES, "head_dim": 16}, sliding_window=window, layer_types=kinds))


def mistral(window: int) -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=3, n_head=2, bos_token_id=0,
                                        eos_token_id=0))


def frozen(make: Any, dtype: torch.dtype = torch.float64, **options: Any) -> FrozenModel:
    torch.manual_seed(0)
    model = make(**options)
    for parameter in model.parameters():  # initial weights are so small that layers hardly do anything
        parameter.data += 0.1 * torch.randn_like(parameter)
    return FrozenModel(model, torch.device("cpu"), dtype)


def snippets(count: int = 5) -> list[TokenSnippets]:
    """Snippets of random ids: tokens first, in the middle, last, and twice."""
    rng = np.random.default_rng(0)
    records = []
    for index, token in enumerate(EXPANSION.tokens):
        made = []
        for number in range(count):
            ids = rng.integers(8, 90, 5 + 3 * number).tolist()
            at = [0, 2, len(ids) - 1][number % 3]
            ids[at] = FIRST + index
            made.append((tuple(ids), at))
        records.append(TokenSnippets(token, tuple(ids for ids, _ in made), tuple(at for _, at in made)))
    return records


def laid_out(**options: Any) -> Examples:
    return build_examples(snippets(), EXPANSION, [0, 1, 2], prefix_ids=[0], **options)


@pytest.mark.parametrize("make", [llama, gpt2, gemma])
@pytest.mark.parametrize("layer", [2, 3])
def test_the_shared_past_gives_the_losses_and_gradients_of_the_plain_way(make: Any, layer: int) -> None:
    model, examples = frozen(make), laid_out(reach=4)
    assert sharing_is_exact(model, examples, layer)
    rows_GD = model.embedding_VD[[1, 3, 6]].clone().requires_grad_()
    found = []
    for keep_past in (True, False):
        contexts = teach(model, examples, layer, keep_past=keep_past)
        assert (contexts.past is not None) == keep_past
        errors_S = snippet_errors(model, examples, contexts, rows_GD, layer)
        found.append((errors_S, torch.autograd.grad(errors_S.sum(), rows_GD)[0]))
    assert float(found[0][1].abs().min(1).values.max()) > 0
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_shared_past_gives_the_rows_of_the_plain_way(dtype: torch.dtype, tolerance: float) -> None:
    model = frozen(llama, dtype)
    train = [laid_out()]
    start_GD = model.embedding_VD[[1, 3, 6]].to(torch.promote_types(dtype, torch.float32))
    fits = []
    for keep_past in (True, False):
        objective = Objective(3, ((5, 6),), 0.01, positions=40, keep_past=keep_past)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        fits.append(fit_rows(model, train, train[0], start_GD, objective, generators))
    assert torch.allclose(fits[0].rows_GD, fits[1].rows_GD, atol=tolerance)
    assert torch.allclose(fits[0].end_error_G, fits[1].end_error_G, atol=tolerance)
    assert not torch.allclose(fits[0].rows_GD, start_GD.to(fits[0].rows_GD.dtype), atol=tolerance)
    assert bool((fits[0].end_error_G < fits[0].start_error_G).all())


def test_a_body_in_bfloat16_shares_and_trains_rows_in_float32() -> None:
    examples, fits = laid_out(), []
    for dtype in (torch.bfloat16, torch.float32):
        model = frozen(llama, dtype)
        assert sharing_is_exact(model, examples, 3)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        start_GD = model.embedding_VD[[1, 3, 6]].float()
        fits.append(fit_rows(model, [examples], examples, start_GD, Objective(3, ((5, 20),), 0.02), generators))
    half, full = fits
    assert half.rows_GD.dtype == torch.float32
    assert torch.allclose(half.end_error_G, full.end_error_G, atol=0.03)
    assert bool((half.end_error_G < 0.9 * half.start_error_G).all())


@pytest.mark.parametrize("make", [gemma, mistral])
@pytest.mark.parametrize("window", [4, 64])
def test_a_window_shares_whether_it_is_shorter_than_a_snippet_or_not(make: Any, window: int) -> None:
    examples = laid_out()
    assert 4 < int((examples.before_S + examples.length_S).max()) < 64
    model = frozen(make, window=window)
    for layer in (1, 2, 3):
        assert sharing_is_exact(model, examples, layer)


def test_a_model_that_goes_by_the_order_of_positions_takes_the_plain_way() -> None:
    model, examples = frozen(bloom), laid_out()
    assert not sharing_is_exact(model, examples, 3)
    contexts = teach(model, examples, 3, keep_past=False)
    errors_S = snippet_errors(model, examples, contexts, model.embedding_VD[[1, 3, 6]], 3)
    assert bool(errors_S.isfinite().all())


def test_sharing_that_gives_other_states_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = frozen(llama), laid_out()
    right = model.hidden_and_past

    def wrong(*inputs: Any, **options: Any) -> Any:
        hidden, past = right(*inputs, **options)
        return hidden, tuple((keys, values * 1.001) for keys, values in past)

    monkeypatch.setattr(model, "hidden_and_past", wrong)
    assert not sharing_is_exact(model, examples, 3)


def test_chunks_hold_every_snippet_once_and_are_bounded() -> None:
    lengths = torch.tensor([5, 1, 9, 3, 3, 30, 2])
    parts = list(chunks(lengths, torch.tensor([0, 1, 2, 3, 4, 5, 6]), 12))
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    assert all(len(part) * int(lengths[part].max()) <= 12 or len(part) == 1 for part in parts)
    assert len(parts) == 4
    assert list(chunks(lengths, torch.tensor([], dtype=torch.long), 12)) == []


@pytest.mark.parametrize("keep_past", [False, True])
def test_no_pass_of_the_student_is_longer_than_planned(
    keep_past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shorter passes give the same rows; the teacher has a bound of its own."""
    model, parts = frozen(llama), [laid_out(reach=2)]
    sizes, run = list[int](), FrozenModel._run

    def noted(self: FrozenModel, inputs_BTD: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        sizes.append(inputs_BTD.shape[0] * inputs_BTD.shape[1])
        return run(self, inputs_BTD, *rest, **options)

    rows = []
    for positions in (30, 4_000):
        taught = Taught()
        start_GD = model.embedding_VD[[1, 3, 6]].clone()
        objective = Objective(3, ((5, 6),), 0.01, positions=positions, keep_past=keep_past)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        rows.append(fit_rows(model, parts, parts[0], start_GD, objective, generators).rows_GD)
        taught.add(model, parts[0], objective)
        with monkeypatch.context() as patched:
            patched.setattr(FrozenModel, "_run", noted)
            sizes.clear()
            held_out_errors(model, taught, start_GD, objective)
            assert sizes
            assert max(sizes) <= positions
    assert torch.allclose(rows[0], rows[1], rtol=1e-7, atol=1e-10)
