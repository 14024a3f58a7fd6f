"""A small base model and its expansion, for the gateway's benchmarks: real, and made in a few seconds.

The base is a stories model of the assets, with a plain chat template. The expansion has the mean of its pieces
as the row of each new token; `shuffle` gives the rows to the wrong tokens: the planted bad model.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.errors import TokenizerError
from vocabext.files.ranges import file_sha256
from vocabext.model.frozen import load_model
from vocabext.patch.stage import patch
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import NewToken

ASSETS = Path(os.environ.get("VOCABEXT_ASSETS") or Path(__file__).resolve().parents[1] / ".." / "shared" / "assets")
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
STORIES = ("Once upon a time, there was a little girl named Lily. She liked to play outside with her friends.",
           "One day, the brown dog wanted to help his friends find the beautiful butterfly behind the house.",
           "Tom and his mommy went to the forest together. They were excited to see the animals and the flowers there.",
           "The children laughed and shouted because the birthday party started and everybody wanted some cake.",
           "Suddenly, a small rabbit jumped over the fence and said hello to the surprised farmer and his tractor.")


def make_pair(folder: Path, *, model: str = "stories260K-hd32", tokens: int = 40, shuffle: bool = False,
              scale: float = 1.0) -> tuple[Path, Path]:
    """Make a base folder and an expanded one.

    Args:
        folder: Where to put both; created.
        model: Which of the assets' models.
        tokens: How many new tokens.
        shuffle: Whether to give each token the row of another one.
        scale: Makes the new rows so many times as long: the engine then wants to write them.
    """
    base = folder / "base"
    if not base.exists():
        shutil.copytree(ASSETS / "models" / model, base)
        (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    chosen = new_tokens(base, tokens)
    matrix_VD = load_model(base, device="cpu", dtype="float32").embedding_VD
    rows_ND = mean_rows(matrix_VD, chosen) * scale
    if shuffle:
        rows_ND = rows_ND[torch.roll(torch.arange(tokens), 7)]
    used = load_tokenizer(base).first_new_id
    header = {"base": {"model": str(base), "num_used_ids": used, "hidden_size": matrix_VD.shape[1],
                       "tokenizer_sha256": file_sha256(base / "tokenizer.json")}, "method": "mean", "options": {}}
    name = "shuffled" if shuffle else "expanded" if scale == 1.0 else f"scaled-{scale:g}"
    save_rows(folder / f"{name}.safetensors", chosen, Rows(rows_ND), header)
    patch(folder / f"{name}.safetensors", str(base), folder / name)
    return base, folder / name


def new_tokens(base: Path, count: int) -> list[NewToken]:
    """Return the words of the assets' list that the tokenizer cuts into several pieces."""
    tokenizer, found = load_tokenizer(base), []
    for line in (ASSETS / "new_tokens" / "tinystories_new_words.jsonl").read_text().splitlines():
        if len(found) == count:
            break
        try:
            token = tokenizer.new_token(json.loads(line)["token"])
        except TokenizerError:
            continue
        if token.run not in {other.run for other in found}:
            found.append(token)
    return found
