"""From a corpus to a live vLLM engine behind the gateway, under load: the embedded example, small."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gateway_rig import Running, gateway

from vocabext.checkpoint.folder import load_rows
from vocabext.checkpoint.manifest import read_manifest
from vocabext.serve.bench.client import Job, LoadClient, write_prompts
from vocabext.serve.engine import Server, group_members
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


def complete(client: httpx.Client, arm: str, **more: Any) -> dict[str, Any]:
    """Ask one arm of the gateway for an answer of twelve tokens; returns it with the ids that were read and written."""
    body = {"model": "m", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
    answer = client.post("/v1/completions", json=body, headers={"x-vocabext-arm": arm})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def test_the_expanded_model_is_verified_and_one_engine_serves_and_measures_both_arms(
    expanded: Path, tmp_path: Path
) -> None:
    assert json.loads((expanded / "verify.json").read_text())["passed"] is True
    manifest = read_manifest(expanded)
    expansion = Expansion([record.new_token for record in manifest.tokens], manifest.first_new_id)
    _, _, header = load_rows(expanded.parent / f"{expanded.name}-work" / "rows.safetensors")
    assert expansion.num_new == NUM_TOKENS - len(header["left_out"]) > NUM_TOKENS / 2
    with gateway(tmp_path, str(MODEL), str(expanded), "--one-engine", "--model-name", "m", "--logs",
                 str(tmp_path / "logs"), "--", "--max-num-seqs", "8", timeout_seconds=240,
                 real_engines=True) as running:
        with running.client() as client:
            check_arms(client, expansion)
        check_load(running, tmp_path)
        group = running.document["process_ids"]["expanded"]
        running.process.terminate()
        assert running.process.wait(timeout=60) == 128 + signal.SIGTERM
        assert not group_members(group)


def check_arms(client: httpx.Client, expansion: Expansion) -> None:
    """Each arm reads its own ids of the same text, and the base arm writes no new token, however likely it is."""
    base = load_tokenizer(MODEL)
    text = " then x".join(token.token for token in expansion.tokens[:20])
    wanted = [*base.prefix_ids, *base.encode(text)]
    ids = complete(client, "expanded", prompt=text)["prompt_token_ids"]
    assert expansion.is_new(ids).sum() >= 4
    assert expansion.unmerge(ids).tolist() == wanted
    assert complete(client, "base", prompt=text)["prompt_token_ids"] == wanted
    first = expansion.first_new_id
    written = complete(client, "expanded", prompt=text, logit_bias={str(first): 100})
    assert written["token_ids"] == [first] * 12
    assert written["text"] == expansion.tokens[0].token * 12
    assert max(complete(client, "base", prompt=text, temperature=1.9, n=1)["token_ids"]) < first


def check_load(running: Running, folder: Path) -> None:
    """The load generator that `serve bench` uses gets the answers that it asks for."""
    url = running.document["engines"]["expanded"]["url"]
    name = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    server = Server([], url, folder / "logs" / "expanded.log")
    server._process = SimpleNamespace(poll=running.process.poll)  # type: ignore[assignment]
    prompts = write_prompts(["def f(", "import os", "The function"], folder, "decode")
    with LoadClient(folder / "client.log") as client:
        client.wait_until_ready()
        load = client.run(Job(url, name, str(prompts), 3, (6, 5, 4), 2), server)
    assert (load.num_failed, load.output_tokens) == (0, (6, 5, 4))
