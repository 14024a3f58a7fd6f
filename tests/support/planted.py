"""Faults to plant into expanded checkpoints, and what `verify` says about them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.verdicts import FAIL, SKIPPED, Verification
from vocabext.verify import behaviour
from vocabext.verify.pair import Pair

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Json = dict[str, Any]


def draw_fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the checks on text faster; for a fixture."""
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 500)
    monkeypatch.setattr(behaviour, "STREAMED", 300)
    monkeypatch.setattr(behaviour, "RANDOM_ROWS", 200)


# -- verdicts -----------------------------------------------------------------------------------------------------

def failed(result: Verification) -> list[str]:
    return [check.name for check in result.checks if check.verdict == FAIL]


def skipped(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if check.verdict == SKIPPED}


def detail(result: Verification, name: str) -> str:
    return next(check.detail for check in result.checks if check.name == name)


def opened(base: Path, folder: Path) -> Pair:
    return Pair(folder, str(base), read_manifest(folder))


# -- weights ------------------------------------------------------------------------------------------------------

def shard_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    index = folder / "model.safetensors.index.json"
    return folder / (json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors")


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a safetensors file anew; a hard link to it keeps the old one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata)


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change a tensor in place."""
    edit_tensors(shard_of(folder, name), lambda tensors: change(tensors[name]))


def flip_last_bit(row: int) -> Callable[[torch.Tensor], None]:
    def change(matrix: torch.Tensor) -> None:
        matrix.view(torch.uint8)[row, 0] ^= 1

    return change


def overwrite_last_byte(path: Path) -> None:
    """Change the last byte of a file, which keeps its size."""
    data = path.read_bytes()
    path.unlink()  # it may be linked
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def set_row(row: int, value: float) -> Callable[[torch.Tensor], None]:
    def change(matrix: torch.Tensor) -> None:
        matrix[row] = value

    return change


# -- tokenizer ----------------------------------------------------------------------------------------------------

def edit_tokenizer(folder: Path, change: Callable[[Json], object]) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def token_id(folder: Path, text: str) -> int:
    tokens = json.loads((folder / "vocabext.json").read_text())["tokens"]
    return next(int(token["token_id"]) for token in tokens if token["token"] == text)


def added_token(content: str, token_id: int) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": token_id, "content": content, **flags}


def key_of(folder: Path, text: str) -> str:
    tokens = json.loads((folder / "vocabext.json").read_text())["tokens"]
    return next(str(token["key"]) for token in tokens if token["token"] == text)
