"""A tiny base and a rows file made for it: what tests of patched folders begin with."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_folder

from vocabext.checkpoint.folder import Rows, open_checkpoint, save_rows
from vocabext.files.ranges import file_sha256
from vocabext.patch import stage as module
from vocabext.patch.stage import patch
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import NewToken

EMBEDDING, HEAD, WEIGHTS = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors"
TEXTS = (" cardiac", " myocardium", " heart rate")


class Case(NamedTuple):
    """A base, a rows file made for it, and where the result goes."""

    base: Path
    rows: Path
    output: Path

    def patch(self, **options: Any) -> module.PatchResult:
        return patch(self.rows, str(self.base), self.output, **options)


def make_rows(folder: Path, path: Path, texts: tuple[str, ...] = TEXTS, *, output: bool = False,
              **header: Any) -> tuple[NewToken, ...]:
    """Write mean-of-pieces rows for a base model."""
    tokenizer, checkpoint = load_tokenizer(str(folder)), open_checkpoint(folder)
    tokens = tuple(tokenizer.new_token(text) for text in texts)
    embed_VD = checkpoint.read(checkpoint.vocab_tensors[0]).float()
    input_ND = torch.stack([embed_VD[list(token.run)].mean(dim=0) for token in tokens])
    output_ND = torch.rand(len(tokens), checkpoint.hidden_size) if output else None
    recorded = {"model": str(folder), "num_used_ids": tokenizer.first_new_id, "hidden_size": checkpoint.hidden_size,
                "tokenizer_sha256": file_sha256(folder / "tokenizer.json")}
    save_rows(path, tokens, Rows(input_ND, output_ND),
              {"base": recorded, "method": "mean", "options": {"seed": 0}, **header})
    return tokens


def make_case(tmp_path: Path, **options: Any) -> Case:
    case = Case(tiny_folder(tmp_path / "base", **options), tmp_path / "rows.safetensors", tmp_path / "new")
    make_rows(case.base, case.rows)
    return case


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
