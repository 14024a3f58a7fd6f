"""Live in vLLM: new tokens that are written save decode steps for the same text, and silent ones stay unwritten."""

import importlib.util
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.distill.output_rows.stage import silent_row
from vocabext.errors import TokenizerError
from vocabext.evaluate.decode import write_on
from vocabext.files.ranges import file_sha256
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.model.places import find_places
from vocabext.model.run_tree import RunTree
from vocabext.patch.stage import patch
from vocabext.serve.engine import vllm_server, wait_until_ready
from vocabext.tokenizer import BaseTokenizer, load_tokenizer
from vocabext.tokens import Expansion, NewToken

MODEL = Path(__file__).resolve().parents[1] / "examples" / "model"
PROMPT = "The function returns the number of"
SILENT = " the function returns"
BEFORE, LONG = 8, 4

pytestmark = [
    pytest.mark.vllm, pytest.mark.fuzz,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def planned(base: BaseTokenizer, model: FrozenModel) -> tuple[list[int], NewToken, int]:
    """Base's greedy text as ids, a new token that it ends with, and where that begins."""
    prompt = np.asarray([*base.prefix_ids, *base.encode(PROMPT)], np.int64)
    (written,) = write_on(model, [prompt], Expansion([base.new_token(SILENT)], base.first_new_id), None, num_pieces=40)
    for start in range(BEFORE, 36):
        for length in range(LONG + 2, LONG - 1, -1):
            text = base.decode(written.pieces[start : start + length])
            if not text.startswith(" ") or not text[-1].isalpha():
                continue
            try:
                token = base.new_token(text)
            except TokenizerError:
                continue
            if list(token.run) == written.pieces[start : start + length] and token.run not in [
                    tuple(written.pieces[at : at + length]) for at in range(start)]:
                return written.pieces[: start + length], token, start
    raise AssertionError("base's text holds no phrase")


@torch.no_grad()
def planted_row(model: FrozenModel, base: BaseTokenizer, pieces: list[int], start: int) -> torch.Tensor:
    """A row that is on top where the run begins, and nowhere before."""
    prompt = [*base.prefix_ids, *base.encode(PROMPT)]
    states = model.hidden(model.embed(torch.tensor([[*prompt, *pieces]])))[0, len(prompt) - 1 : len(prompt) + start]
    wanted = model.logits(states, first_new_id=base.first_new_id).amax(1) - 10
    wanted[-1] += 15
    return torch.linalg.lstsq(states.double(), wanted.double()[:, None]).solution[:, 0].float()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[int], int, BaseTokenizer]]:
    folder = tmp_path_factory.mktemp("writing")
    base, model = load_tokenizer(MODEL), load_model(MODEL, device="cpu", dtype="float32")
    pieces, token, start = planned(base, model)
    tokens = [token, base.new_token(SILENT)]
    prompt = np.asarray([*base.prefix_ids, *base.encode(PROMPT), *pieces], np.int64)
    places = find_places(model, [prompt], RunTree.of(tokens), first_new_id=base.first_new_id)
    silent_D, _, _ = silent_row(model.head_VD, [places], base.first_new_id, model.logit_map)
    rows = Rows(mean_rows(model.embedding_VD, tokens), torch.stack([planted_row(model, base, pieces, start), silent_D]))
    header = {"base": {"model": str(MODEL), "num_used_ids": base.first_new_id, "hidden_size": len(silent_D),
                       "tokenizer_sha256": file_sha256(MODEL / "tokenizer.json")}, "method": "distill", "options": {}}
    save_rows(folder / "rows.safetensors", tokens, rows, header)
    assert patch(folder / "rows.safetensors", str(MODEL), folder / "expanded").untied_bytes > 0
    with vllm_server(folder / "expanded", folder / "server.log", served_name="expanded") as server:
        wait_until_ready([server])
        yield server.url, pieces, start, base


def complete(url: str, **options: Any) -> dict[str, Any]:
    body = json.dumps({"model": "expanded", "prompt": PROMPT, **options}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_same_text_takes_fewer_steps(served: tuple[str, list[int], int, BaseTokenizer]) -> None:
    url, pieces, start, base = served
    steps = start + 1
    assert steps <= len(pieces) - LONG + 1
    answer = complete(url, max_tokens=steps, temperature=0)
    assert answer["usage"]["completion_tokens"] == steps
    assert answer["choices"][0]["text"] == base.decode(pieces)


def test_a_silent_token_is_not_sampled(served: tuple[str, list[int], int, BaseTokenizer]) -> None:
    url, *_, base = served
    answer = complete(url, max_tokens=8, temperature=1, n=32, seed=0, logprobs=5, return_token_ids=True)
    ids = [token_id for choice in answer["choices"] for token_id in choice["token_ids"]]
    assert len(ids) == 32 * 8
    assert base.first_new_id + 1 not in ids
