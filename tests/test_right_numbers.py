"""Whatever a model class does with windows, scales, positions and states: what is computed here is what it computes.

Texts are longer than windows and chunks. Every family is compared with plain runs of its own class, one text at a time.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_folder, tiny_tokenizer
from tiny_families import FAMILIES, READERS, UNREADABLE, WINDOW, tiny_family

from vocabext.checkpoint.rows import mean_rows
from vocabext.corpus import Document
from vocabext.distill import distill
from vocabext.distill.input_rows.contexts import sharing_is_exact
from vocabext.distill.input_rows.examples import build_examples
from vocabext.errors import CheckpointError, UsageError, VocabextError
from vocabext.evaluate.decode import write_on
from vocabext.evaluate.stage import RowSet, evaluate
from vocabext.model.frozen import (
    FrozenModel,
    check_folder_loads,
    check_folder_runs_on_rows,
    check_runs_on_rows,
    load_model,
)
from vocabext.model.logit_map import LogitMap
from vocabext.model.places import concatenate, find_places
from vocabext.model.run_tree import RunTree
from vocabext.options import DistillConfig, EvalConfig
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer
from vocabext.tokens import Expansion, Ids, NewToken, TokenSnippets

FIRST = 290
EVERY = {**FAMILIES, **READERS}
REFUSED = [name for name in FAMILIES if name.startswith(("gemma3n", "gemma4"))]
RIGHT = [name for name in EVERY if name not in REFUSED]
# They go by the order of positions, or keep other things than keys and values.
UNROLLED = ["falcon-h1", "recurrent-gemma", "lfm2", "gpt-neo", "bloom", "mpt", "falcon-alibi", "mamba", "rwkv"]
# Parts of them compute in float32 whatever is asked for.
NOISY = ["falcon-h1", "recurrent-gemma", "rwkv", "mamba", "xglm", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss",
         "granite-moe"]


def family(name: str, dtype: torch.dtype = torch.float64) -> FrozenModel:
    torch.manual_seed(0)
    model = EVERY[name](296).eval()
    with torch.no_grad():  # initial weights are so small that layers hardly do anything
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return FrozenModel(model, torch.device("cpu"), torch.float32 if name in NOISY else dtype)


def close(name: str) -> float:
    return 1e-3 if name in NOISY else 1e-5


def text(size: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(2, FIRST, size)


@torch.no_grad()
def plain_logits(model: FrozenModel, ids: list[int]) -> torch.Tensor:
    """The class's own."""
    own: torch.Tensor = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, :FIRST].float()
    return own


@torch.no_grad()
@pytest.mark.parametrize("name", RIGHT)
def test_logits_are_those_of_the_class(name: str) -> None:
    model, ids = family(name), text(4 * WINDOW)
    ours = model.logits(model.hidden(model.embed(torch.from_numpy(ids)[None]))[0], first_new_id=FIRST)
    assert torch.allclose(ours, plain_logits(model, ids.tolist()), atol=close(name), rtol=close(name))
    model.check_against_class()
    assert model.takes_branches == (name not in UNROLLED)
    new_ND = model.head_VD[[5, 9]].float()  # and so are those of new rows
    both = model.logits(model.hidden(model.embed(torch.from_numpy(ids)[None]))[0], first_new_id=FIRST,
                        new_rows_ND=new_ND, new_bias_N=None if model.head_bias_V is None else model.head_bias_V[[5, 9]])
    assert torch.allclose(both[:, FIRST:], ours[:, [5, 9]], atol=close(name), rtol=close(name))


@pytest.mark.parametrize("name", [*UNROLLED, "mistral-window", "mixtral", "llama4-chunks"])
def test_sixteen_bits_do_not_hide_that_a_class_goes_by_the_order_of_positions(name: str) -> None:
    torch.manual_seed(0)
    model = FrozenModel(EVERY[name](296), torch.device("cpu"), torch.bfloat16)  # as small as it is initialised
    before = {key: (value.dtype, value.clone()) for key, value in model.model.state_dict().items()}
    assert model.takes_branches == (name not in UNROLLED)
    after = model.model.state_dict()
    assert all(after[key].dtype == dtype and torch.equal(after[key], value) for key, (dtype, value) in before.items())


@torch.no_grad()
def test_a_loaded_model_keeps_the_digits_of_its_positions(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, ids = tiny_family(tmp_path / "model", "llama"), torch.from_numpy(text(120))[None]
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(input_ids=ids).logits[0, :, :FIRST]
    model = load_model(folder, device="cpu", dtype="bfloat16")
    assert torch.equal(model.logits(model.hidden(model.embed(ids))[0], first_new_id=FIRST), own.float())


@torch.no_grad()
@pytest.mark.parametrize("name", RIGHT)
def test_the_states_of_a_layer_are_those_of_the_class(name: str) -> None:
    model, ids = family(name), torch.from_numpy(text(3 * WINDOW))[None]
    own = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    # Mamba and RWKV list the states behind each layer, the others those before the first as well.
    at = 0 if name in ("mamba", "rwkv") else 1
    assert torch.allclose(model.hidden(model.embed(ids), layer=1), own[at], atol=close(name), rtol=close(name))


def tokens_of(ids: Ids) -> list[NewToken]:
    """Runs that the text holds."""
    runs = [tuple(ids[at : at + size].tolist()) for at, size in ((3, 2), (20, 3), (26, 2), (40, 4))]
    return [NewToken(str(run), str(run), run) for run in runs]


def merged(ids: Ids, tokens: list[NewToken]) -> list[int]:
    """Replace the runs by their tokens."""
    left, found = ids.tolist(), list[int]()
    while left:
        match = next((i for i, token in enumerate(tokens) if tuple(left[: len(token.run)]) == token.run), None)
        found.append(left[0] if match is None else FIRST + match)
        left = left[1 if match is None else len(tokens[match].run) :]
    return found


class Spelled:
    """As much of an extended tokenizer as `evaluate` needs: texts are lists of ids."""

    def __init__(self, tokens: list[NewToken], merge: bool) -> None:
        self.expansion, self.merge = Expansion(tokens, FIRST), merge
        self.first_new_id = self.first_new_id = FIRST
        self.prefix_ids = (0,)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids = [np.asarray(text.split(), np.int64) for text in texts]
        return [merged(some, list(self.expansion.tokens)) if self.merge else some.tolist() for some in ids]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, self.expansion.unmerge(ids)))


def measured(model: FrozenModel, ids: Ids, tokens: list[NewToken], **options: int) -> dict[str, dict[str, float]]:
    """Evaluate new tokens that are read like their mean and never written."""
    rows = mean_rows(model.embedding_VD, tokens).to(model.dtype)
    silent = RowSet("mean", rows, torch.zeros_like(rows), torch.full((len(rows),), -1e4, dtype=model.dtype))
    documents = [Document("d", " ".join(map(str, ids)))]
    found = evaluate(documents, model, Spelled(tokens, False), Spelled(tokens, True), [silent],  # type: ignore[arg-type]
                     EvalConfig(**{"prompts": 0, **options}))
    return {row["name"]: row for row in found["rows"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RIGHT)
def test_text_without_new_tokens_measures_the_same_for_base_and_expanded(name: str) -> None:
    model, ids = family(name), text(5 * WINDOW)
    rows = measured(model, ids, [NewToken("x", "x", (0, 1, 0))])
    assert rows["mean"]["target_nll_nats"] == pytest.approx(rows["base"]["target_nll_nats"], rel=close(name))
    if model.logit_map.cap is None:  # where logits are bounded no row is silent
        assert rows["mean"]["bits_per_byte_writing"] == pytest.approx(rows["base"]["bits_per_byte_writing"],
                                                                      rel=close(name))
    logits = plain_logits(model, [0, *ids.tolist()])[:-1]
    own = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids)))
    assert rows["base"]["target_nll_nats"] == pytest.approx(own, rel=close(name))


@torch.no_grad()
@pytest.mark.parametrize("name", RIGHT)
def test_pieces_of_new_tokens_are_measured_as_in_texts_of_their_own(name: str) -> None:
    model, ids = family(name), text(3 * WINDOW)
    tokens = tokens_of(ids)
    found = measured(model, ids, tokens)["mean"]["target_nll_nats"]
    rows_ND, expanded, total = mean_rows(model.embedding_VD, tokens), [0, *merged(ids, tokens)], 0.0
    for at in range(1, len(expanded)):
        run = Expansion(tokens, FIRST).unmerge([expanded[at]]).tolist()
        whole = model.embed(torch.tensor([[*expanded[:at], *run]]), rows_ND, FIRST)
        logs = model.log_probabilities(model.hidden(whole)[0, at - 1 : -1], first_new_id=FIRST)
        total -= float(logs.gather(1, torch.tensor(run)[:, None]).sum())
    assert len(expanded) < len(ids)
    assert found == pytest.approx(total / len(ids), rel=close(name))


@torch.no_grad()
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_written_on_is_what_generate_writes(name: str) -> None:
    model, prompts = family(name), [text(size, size) for size in (2 * WINDOW, WINDOW + 5, 3)]
    expansion = Expansion([NewToken("x", "x", (5, 6))], FIRST)
    found = write_on(model, prompts, expansion, None, num_pieces=WINDOW)
    for prompt, written in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt)[None]
        own = model.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=WINDOW,
                                   do_sample=False, suppress_tokens=[*range(FIRST, 296)], pad_token_id=0)
        assert written.ids == own[0, len(prompt) :].tolist()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", RIGHT)
def test_what_the_base_would_write_is_found_as_in_texts_of_their_own(name: str) -> None:
    model, window = family(name), text(2 * WINDOW)
    logits = plain_logits(model, window.tolist())
    top = logits.topk(2, 1).indices
    starts = range(0, len(window), 7)
    runs = {(int(piece), int(logits[(at + 9) % len(window)].argmax()), 7) for at in starts for piece in top[at]}
    tokens = [NewToken(str(run), str(run), run) for run in sorted({*runs, *(run[:2] for run in runs)})]
    places = find_places(model, [window, window[:5]], RunTree.of(tokens), first_new_id=FIRST, likely=1e-5)
    found = {(int(places.window_P[p]), int(places.position_P[p]), t): (log_p, greedy) for p, t, log_p, greedy in zip(
        places.place_R.tolist(), places.token_R.tolist(), places.log_p_R.tolist(), places.greedy_R.tolist(),
        strict=True)}
    assert len(places) == len(window) + 5
    assert found
    for at in starts:
        for number, token in enumerate(tokens):
            ids = [*window[: at + 1].tolist(), *token.run]
            logs = torch.log_softmax(plain_logits(model, ids), 1)[at:-1]
            log_p = float(logs.gather(1, torch.tensor(token.run)[:, None]).sum())
            greedy = logs.argmax(1).tolist() == list(token.run)
            if (0, at, number) in found:
                assert found[0, at, number] == (pytest.approx(log_p, abs=100 * close(name)), greedy)
            else:
                assert log_p < math.log(1e-5) + 0.01
                assert not greedy


@pytest.mark.parametrize("name", [*UNROLLED, "mistral-window", "granite", "cohere2", "gpt2", "opt"])
def test_a_token_is_distilled(name: str) -> None:
    model, ids = family(name, torch.float32), text(3 * WINDOW)
    token = NewToken("x", "x", (7, 8))
    snippets = tuple(tuple(np.concatenate((text(20 + at, at), [FIRST], ids[:20])).tolist()) for at in range(9))
    record = TokenSnippets(token, snippets, tuple(20 + at for at in range(9)))
    for layer in ("last", "1"):
        result = distill([record], model, DistillConfig(epochs=1, target_layer=layer, output_rows="none"),
                         first_new_id=FIRST, prefix_ids=(0,))
        (report,) = result.reports
        assert report.start_error is not None
        assert report.end_error is not None
        assert 0 < report.end_error <= report.start_error


@pytest.mark.parametrize("name", ["mistral-window", "gemma3-window", "llama4-chunks", "cohere2"])
def test_a_window_shorter_than_a_snippet_shares_the_text_before_the_token(name: str) -> None:
    model, ids = family(name), text(3 * WINDOW)
    record = TokenSnippets(NewToken("x", "x", (7, 8)), ((*ids.tolist(), FIRST, *ids.tolist()),), (len(ids),))
    examples = build_examples([record], Expansion([record.new_token], FIRST), [0])
    assert sharing_is_exact(model, examples, 1)
    assert sharing_is_exact(model, examples, 2)


# -- what cannot be right is refused ------------------------------------------------------------------------------

def test_a_class_that_does_more_with_its_logits_is_refused_by_name() -> None:
    model = family("llama")
    model.model.forward = _with_logits(model.model.forward, lambda logits: logits.abs().sqrt() * logits.sign())
    with pytest.raises(UsageError, match=r"logits of LlamaForCausalLM.*differ from its own by .*%") as error:
        model.check_against_class()
    assert "\n" not in str(error.value)


def _with_logits(forward: Callable[..., Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        found = forward(*inputs, **options)
        found.logits = change(found.logits)
        return found

    return run


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_class_that_does_more_with_its_states_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "model", name, noise=0.1)
    with pytest.raises(UsageError, match=r"^the logits of \w+, put together from its rows, differ from its own by"):
        load_model(folder, device="cpu", dtype="float32")


def test_a_class_that_cannot_be_run_on_embeddings_is_refused_by_name() -> None:
    model = family("llama")
    model._body.forward = lambda input_ids, **_: None
    with pytest.raises(UsageError, match="LlamaForCausalLM cannot be run on embeddings"):
        model.check_against_class()


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_look_up_ids_themselves_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="hidden_size_per_layer_input"):
        check_runs_on_rows(EVERY[name](296).config)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.125, None), (0.0625, 30.0), (6.0, None), (1.0, 2.0)])
def test_the_scale_and_the_bound_of_logits_are_measured(scale: float, cap: float | None) -> None:
    model, expected = family("llama"), LogitMap(scale, cap)
    model.model.forward = _with_logits(model.model.forward, expected)
    assert model.logit_map.scale == pytest.approx(scale, rel=1e-4)
    assert model.logit_map.cap == (None if cap is None else pytest.approx(cap, rel=1e-4))


@pytest.mark.parametrize("change", ["prefixed", "missing", "unknown"])
def test_weights_whose_names_do_not_match_are_refused_and_the_cure_is_named(tmp_path: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change == "prefixed":
        tensors = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    elif change == "missing":
        del tensors["model.layers.0.self_attn.q_proj.weight"]
    else:
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(32)
    save_file(tensors, path, metadata={"format": "pt"})
    said = {"prefixed": "12 missing .*, \\.\\.\\.\\).*torch.compile",
            "missing": "1 missing \\(model.layers.0.self_attn.q_proj.weight\\).*save_pretrained",
            "unknown": "1 unknown to it \\(model.layers.0.self_attn.q_norm.weight\\).*names another model"}[change]
    for check in (check_folder_loads, lambda path: load_model(path, device="cpu", dtype="float32")):
        with pytest.raises(CheckpointError, match=said) as error:
            check(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RIGHT)
def test_whole_folders_are_not_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    EVERY[name](296).save_pretrained(folder)
    check_folder_runs_on_rows(folder)
    load_model(folder, device="cpu", dtype="bfloat16")


def test_what_cannot_be_run_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "model", "gemma3n")
    with pytest.raises(VocabextError, match="hidden_size_per_layer_input"):
        check_folder_runs_on_rows(folder)


# -- lengths ------------------------------------------------------------------------------------------------------

def base_of(tmp_path: Path) -> BaseTokenizer:
    tiny_tokenizer().save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "xglm", "mpt"])
def test_learned_positions_shorter_than_a_window_are_measured_in_windows_of_their_length(
    name: str, tmp_path: Path
) -> None:
    model, base = family(name, torch.float32), base_of(tmp_path)
    assert model.max_positions == 128
    tokens = [base.new_token(word) for word in (" rated muscle", " heart rate")]
    rows = mean_rows(model.embedding_VD, tokens)
    words = "the heart rate of a rated muscle and the rest " * 40
    found = evaluate([Document("d", words)], model, base, extend(base, tokens), [RowSet("mean", rows, rows)],
                     EvalConfig(prompts=2, continuation=100))
    assert found["context"] == 128 - len(base.prefix_ids)
    assert found["writing"]["base"]["prompts"] == 1  # type: ignore[index]
    ids, room = base.encode(words), int(found["context"])  # type: ignore[call-overload]
    (row,) = [row for row in found["rows"] if row["name"] == "base"]  # type: ignore[attr-defined]
    assert row["tokens"] == len(ids) > 2 * room


def test_a_table_of_positions_bounds_the_length_whatever_the_config_says() -> None:
    model = family("gpt2", torch.float32)
    model.model.config.n_positions = 1024
    assert model.max_positions == 128
    assert family("opt").max_positions == 128  # its table has two rows more
    assert family("mamba").max_positions > 1_000_000


def test_a_model_that_takes_next_to_nothing_is_refused(tmp_path: Path) -> None:
    model, base = family("gpt2", torch.float32), base_of(tmp_path)
    model.model.transformer.wpe = torch.nn.Embedding(16, 64)
    tokens = [base.new_token(" rated muscle")]
    rows = mean_rows(model.embedding_VD, tokens)
    with pytest.raises(UsageError, match="takes 16 positions"):
        evaluate([Document("d", "the muscle")], model, base, extend(base, tokens), [RowSet("mean", rows, rows)],
                 EvalConfig())


def test_snippets_longer_than_the_model_takes_are_refused() -> None:
    model = family("gpt2", torch.float32)
    record = TokenSnippets(NewToken("x", "x", (7, 8)), ((*text(130).tolist(), FIRST),) * 3, (130,) * 3)
    with pytest.raises(UsageError, match="longest snippet has 133 base ids, and the model takes 128"):
        distill([record], model, DistillConfig(), first_new_id=FIRST, prefix_ids=(0,))


# -- windows of places --------------------------------------------------------------------------------------------

def test_windows_without_a_place_are_counted() -> None:
    model, tree = family("llama"), RunTree.of([NewToken("x", "x", (7, 8))])
    long, short = text(9), text(2)
    parts = [find_places(model, windows, tree, first_new_id=FIRST, first=3) for windows in ([long, short], [long])]
    assert sorted(set(concatenate(parts).window_P.tolist())) == [0, 2]
    none = find_places(model, [short], tree, first_new_id=FIRST, first=3)
    assert sorted(set(concatenate([none, *parts]).window_P.tolist())) == [1, 3]
