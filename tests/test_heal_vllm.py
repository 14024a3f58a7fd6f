"""A real vLLM server with a healed folder: with its adapter, and without."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_expanded import DOCUMENTS, expanded_pair
from tiny_run import write_corpus

from vocabext.api.model import Expanded
from vocabext.model.adapter import load_adapter
from vocabext.model.frozen import load_model
from vocabext.serve.engine import ask_local

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.vllm, pytest.mark.fuzz,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def greedy(folder: Path, adapter: Path | None, ids: list[int], count: int) -> list[int]:
    model = load_model(folder, device="cpu", dtype="float32")
    if adapter is not None:
        load_adapter(model, adapter)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_requests_choose_the_adapter_by_the_models_name(tmp_path: Path) -> None:
    base, new = expanded_pair(tmp_path, dtype=torch.float32)
    corpus = write_corpus(tmp_path / "corpus.jsonl", list(DOCUMENTS) * 8)
    healed = Expanded.load(new, base).heal(str(corpus), tmp_path / "healed", text=3_200, window=40, held_out=2, rank=8,
                                           learning_rate=0.02, device="cpu").folder
    command = [sys.executable, "-m", "vocabext", "serve", "start", str(healed), "--port", "0", "--json", "--adapter",
               "--unverified", "--", "--max-num-seqs", "4", "--max-model-len", "64", "--dtype", "float32"]
    prompt, count = [0, 40, 291, 45, 50, 292, 60], 8
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
                          ) as process:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line.rstrip() == "}":
                break
        try:
            found = json.loads(text)
            answers = [ask_local(f"{found['url']}/completions", {
                "model": name, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}).json()["choices"][0]["token_ids"]
                for name in (found["model"], found["adapter"])]
        finally:
            process.terminate()
    wanted = [greedy(healed, adapter, prompt, count) for adapter in (None, healed / "adapter")]
    assert wanted[0] != wanted[1]
    assert answers == wanted
