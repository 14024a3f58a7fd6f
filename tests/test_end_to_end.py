"""From a corpus to a live vLLM server that answers with the expanded model: the embedded example, small."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from vocabext.checkpoint.folder import load_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.serve.engine import vllm_server, wait_until_ready
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import Expansion

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = EXAMPLES / "model"
NUM_TOKENS = 40

pytestmark = [
    pytest.mark.vllm, pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract the corpus, cut it down, and run every stage through the command line."""
    folder = tmp_path_factory.mktemp("whole-way")
    subprocess.run([sys.executable, EXAMPLES / "python_docs.py", "-o", folder / "corpus"], check=True)
    for name, lines in (("mining", 400), ("heldout", 20)):
        text = (folder / "corpus" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
    subprocess.run([
        sys.executable, "-m", "vocabext", "run", folder / "mining.jsonl", "--heldout", folder / "heldout.jsonl",
        "--model", MODEL, "--budget", str(NUM_TOKENS), "--snippets", "8", "--epochs", "1", "--max-bytes", "20000",
        "--prompts", "2", "-o", folder / "expanded",
    ], check=True)
    return folder / "expanded"


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_expanded_model_is_verified_and_answers_in_vllm(expanded: Path, tmp_path: Path) -> None:
    assert json.loads((expanded / "verify.json").read_text())["passed"] is True
    manifest = read_manifest(expanded)
    expansion = Expansion([record.new_token for record in manifest.tokens], manifest.first_new_id)
    _, _, header = load_rows(expanded.parent / f"{expanded.name}-work" / "rows.safetensors")
    assert expansion.num_new == NUM_TOKENS - len(header["left_out"]) > NUM_TOKENS / 2
    base = load_tokenizer(MODEL)
    text = " then x".join(token.token for token in expansion.tokens[:20])
    with vllm_server(expanded, tmp_path / "server.log", served_name="expanded") as server:
        wait_until_ready([server])
        ids = post(f"{server.url}/tokenize", {"model": "expanded", "prompt": text})["tokens"]
        assert expansion.is_new(ids).sum() >= 4
        assert expansion.unmerge(ids).tolist() == [*base.prefix_ids, *base.encode(text)]
        answer = post(f"{server.url}/v1/completions",
                      {"model": "expanded", "prompt": text, "max_tokens": 12, "temperature": 0})
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["text"].strip()
