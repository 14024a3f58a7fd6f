"""A tiny base model and its expansion, made by our own stages, for tests of what comes after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_checkpoints import tiny_folder
from tiny_tokenizers import KINDS, as_hf, family_base

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.checkpoint.served import record_files
from vocabext.corpus import Document
from vocabext.files.atomic import write_json
from vocabext.files.ranges import file_sha256
from vocabext.model.frozen import load_model
from vocabext.patch.stage import patch
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import NewToken

TOKENS = [" muscle of", " the heart", " are rated"]
DOCUMENTS = [Document(f"d{i}", text) for i, text in enumerate((
    "the heart of the muscles, a muscle of the heart; the rate of the rest is the rate of the muscles and so on. " * 4,
    "so the muscles are rated, and the heart is rated: a muscle of the heart rates the rest of the muscle. " * 4,
    "a rest for the heart, the muscles of the heart and a muscle of the rest. the heart! the heart? so. " * 4,
))]


def new_tokens(folder: Path, texts: Sequence[str] = TOKENS) -> list[NewToken]:
    """The new tokens, for the tokenizer of a folder."""
    base = load_tokenizer(folder)
    return [base.new_token(text) for text in texts]


def expanded_pair(
    tmp_path: Path, *, texts: Sequence[str] = TOKENS, kind: str | None = None, link: str = "auto", untie: bool = False,
    **options: object,
) -> tuple[Path, Path]:
    """Make a base folder and an expanded one with mean-of-pieces rows; `kind` (or family) chooses another tokenizer."""
    base = tiny_folder(tmp_path / "base", **options)  # type: ignore[arg-type]
    if kind is not None:
        (as_hf(KINDS[kind]()) if kind in KINDS else family_base(kind).hf).save_pretrained(base)
    return base, patched(base, tmp_path, texts, link=link, untie=untie)


def patched(base: Path, folder: Path, texts: Sequence[str] = TOKENS, **options: Any) -> Path:
    """Expand a base folder by tokens with mean-of-pieces rows; returns the new folder."""
    tokens = new_tokens(base, texts)
    model = load_model(base, device="cpu", dtype="float32")
    base_facts = {"model": str(base), "num_used_ids": load_tokenizer(base).first_new_id,
                  "hidden_size": model.embedding_VD.shape[1], "tokenizer_sha256": file_sha256(base / "tokenizer.json")}
    header = {"base": base_facts, "method": "mean", "options": {}}
    save_rows(folder / "rows.safetensors", tokens, Rows(mean_rows(model.embedding_VD, tokens)), header)
    patch(folder / "rows.safetensors", str(base), folder / "expanded", **options)
    return folder / "expanded"


def mark_verified(folder: Path) -> None:
    """Write the verify.json of a folder that passed as it is now."""
    write_json(folder / "verify.json", {"artifact": "verify", "version": 1, "passed": True, "checks": [],
                                        "files": record_files(folder, {})})
