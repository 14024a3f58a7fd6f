"""A running vLLM server cuts and joins text exactly as the expanded folder does, for each kind of tokenizer."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny_checkpoints import tiny_model
from tiny_expanded import patched
from tiny_tokenizers import KINDS, as_hf
from transformers import AutoTokenizer

from serve.engine import vllm_server, wait_until_ready
from vocabext.checks.adversarial import Adversary
from vocabext.expansion import Expansion
from vocabext.manifest import read_manifest
from vocabext.tokenizer import load_tokenizer

NUM_TEXTS = 1_000
WANTED = [" cardiac", "cardiac", " ureter", " heart rate", " signs and symptoms", " naïve cafés", "mg/dL",
          " of a heart"]  # fmt: skip

pytestmark = [
    pytest.mark.vllm, pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]  # fmt: skip


@pytest.fixture(scope="module", params=["llama3", "metaspace"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base with a tokenizer of one kind, and its expansion."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = as_hf(KINDS[request.param]())
    tiny_model(num_rows=len(hf) + 3).save_pretrained(folder / "base")
    hf.save_pretrained(folder / "base")
    return folder / "base", patched(folder / "base", folder, WANTED)


@pytest.fixture(scope="module")
def client(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with the expanded folder."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with vllm_server(folders[1], log, served_name="expanded") as server:
        wait_until_ready([server])
        with httpx.Client(base_url=server.url, timeout=60) as client:
            yield client


def test_tokenize_and_detokenize_agree_with_the_folder(folders: tuple[Path, Path], client: httpx.Client) -> None:
    base_folder, folder = folders
    base, here = load_tokenizer(base_folder), AutoTokenizer.from_pretrained(folder)
    manifest = read_manifest(folder)
    expansion = Expansion([record.new_token for record in manifest.tokens], manifest.first_new_id)
    texts = [text for text in Adversary(base, expansion).texts(2 * NUM_TEXTS, seed=0) if 0 < len(text) < 80]
    texts = list(itertools.islice(texts, NUM_TEXTS))
    assert len(texts) == NUM_TEXTS
    num_new = 0
    for text in texts:
        answer = client.post("/tokenize", json={"model": "expanded", "prompt": text}).raise_for_status().json()
        ids = answer["tokens"]
        assert ids == here(text).input_ids, text
        assert expansion.unmerge(ids).tolist() == [*base.prefix_ids, *base.encode(text)], text
        answer = client.post("/detokenize", json={"model": "expanded", "tokens": ids}).raise_for_status().json()
        assert answer["prompt"] == here.decode(ids), text
        num_new += int(expansion.is_new(ids).sum())
    assert num_new > NUM_TEXTS / 4
