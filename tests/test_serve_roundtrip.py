"""A running vLLM server cuts and joins text exactly as the expanded folder does, for each kind of tokenizer."""

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tiny_checkpoints import tiny_model
from tiny_expanded import patched
from tiny_tokenizers import KINDS, as_hf
from transformers import AutoTokenizer

from vocabext.checkpoint.manifest import read_manifest
from vocabext.serve.engine import vllm_server, wait_until_ready
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import Expansion
from vocabext.verify.adversarial import Adversary

NUM_TEXTS = 1_000
SERVED = ("llama3", "metaspace")
WANTED = [" cardiac", "cardiac", " ureter", " heart rate", " signs and symptoms", " naïve cafés", "mg/dL",
          " of a heart"]

pytestmark = [
    pytest.mark.vllm, pytest.mark.fuzz,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@dataclass(frozen=True)
class Served:
    """A tiny base with a tokenizer of one kind, its expansion, and a client of a server with that."""

    base: Path
    folder: Path
    client: httpx.Client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """One server for each kind; they start side by side, which takes as long as one."""
    places = {kind: tmp_path_factory.mktemp(kind) for kind in SERVED}
    folders = {kind: make(kind, place) for kind, place in places.items()}
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(vllm_server(folder, places[kind] / "server.log", served_name="expanded"))
                   for kind, (_, folder) in folders.items()}
        wait_until_ready(list(servers.values()))
        yield {kind: Served(*folders[kind], stack.enter_context(httpx.Client(base_url=server.url, timeout=60)))
               for kind, server in servers.items()}


def make(kind: str, place: Path) -> tuple[Path, Path]:
    """Make the base and its expansion."""
    hf = as_hf(KINDS[kind]())
    tiny_model(num_rows=len(hf) + 3).save_pretrained(place / "base")
    hf.save_pretrained(place / "base")
    return place / "base", patched(place / "base", place, WANTED)


@pytest.mark.parametrize("kind", SERVED)
def test_tokenize_and_detokenize_agree_with_the_folder(kind: str, served: dict[str, Served]) -> None:
    base_folder, folder, client = served[kind].base, served[kind].folder, served[kind].client
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
