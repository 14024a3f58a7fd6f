"""Tiny random models and a tiny tokenizer, built in code, for tests of model folders."""

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from real_assets import ASSETS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = ["the heart muscle and the heart rate", "a muscle of the heart", "rates of the muscles are rated", "so the rest"]
NUM_ROWS = 300


def asset_model(name: str) -> Path:
    """A real model of the assets; skips the test where it is absent."""
    folder = ASSETS / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set VOCABEXT_ASSETS to run this test")
    return folder


def tiny_tokenizer(num_ids: int = 290) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with two special tokens, trained on four lines."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=num_ids, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_model(*, tied: bool = True, num_rows: int = NUM_ROWS, layers: int = 1, **config: Any) -> LlamaForCausalLM:
    """A random Llama of hidden size 64."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=num_rows, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
        **config)).eval()


def tiny_folder(folder: Path, *, tied: bool = True, sharded: bool = False, num_rows: int = NUM_ROWS,
                dtype: torch.dtype = torch.float32, num_ids: int = 290) -> Path:
    """Save a tiny model, its tokenizer, and the files that real folders carry along."""
    model = tiny_model(tied=tied, num_rows=num_rows, layers=2 if sharded else 1).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    tiny_tokenizer(num_ids).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "README.md").write_text("# tiny\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept\n")
    return folder


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let the process have another default dtype, as transformers does while it builds a model."""
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(earlier)


def hub_cache(folder: Path, repository: Path) -> Path:
    """Lay a folder out as the hub's cache does, as links to `blobs`; return the snapshot."""
    shutil.copytree(folder, repository / "blobs")
    snapshot = repository / "snapshots" / "0123"
    for path in sorted((repository / "blobs").rglob("*")):
        link = snapshot / path.relative_to(repository / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            link.symlink_to(path)
    return snapshot


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def edit_header(path: Path, change: Any) -> None:
    """Apply a function to the header of a safetensors file, leaving the data as it is."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length:])
