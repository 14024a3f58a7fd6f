"""A whole `run` on a tiny model."""

import json
from pathlib import Path

from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS

from vocabext.corpus import Document
from vocabext.options import CollectConfig, DistillConfig, EvalConfig, MineConfig
from vocabext.run import RunConfig


def write_corpus(path: Path, documents: list[Document]) -> Path:
    """Write documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    return path


def tiny_run(tmp_path: Path) -> RunConfig:
    """A run on a tiny base, with documents to mine and others to measure on; nothing is done yet."""
    base = tiny_folder(tmp_path / "base")
    return RunConfig(
        model=str(base),
        corpus=(str(write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS[:2])),),
        heldout=(str(write_corpus(tmp_path / "heldout.jsonl", DOCUMENTS[2:])),),
        output=tmp_path / "new",
        mine=MineConfig(dedup=False, budget=5, min_count=4),
        collect=CollectConfig(snippets=6, window=24, min_snippets=2),
        distill=DistillConfig(epochs=2, dtype="float32", device="cpu"),
        evaluate=EvalConfig(prompts=1, continuation=2, context=48, dtype="float32", device="cpu"),
    )
