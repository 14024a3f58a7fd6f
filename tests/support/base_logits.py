"""What a model computes for text without new tokens, comparable to the last bit."""

from pathlib import Path

import torch
import transformers

from vocabext.checkpoint.folder import open_checkpoint


@torch.no_grad()
def logits(folder: Path, ids: list[int], num_rows: int | None = None) -> torch.Tensor:
    """Load a folder by its own class and return its logits, one row per id.

    Args:
        folder: The model folder. Nothing in it may be missing or left over.
        ids: The prompt.
        num_rows: Rows that the output head is cut to. Products with heads of different lengths may go through
            different kernels, which round differently; cut to one length, equal rows give equal bits.
    """
    architecture = open_checkpoint(folder).names.architecture
    model, report = getattr(transformers, architecture).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # products may round by the address, too
    if num_rows is not None:
        for parameter in model.get_output_embeddings().parameters():
            parameter.data = parameter.data[:num_rows].clone()
    found: torch.Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return found


def same_over_base_rows(base: Path, new: Path, ids: list[int], num_ids: int) -> bool:
    """Tell whether two folders compute the same bits for base ids, by heads of the base's length.

    Args:
        base: The base.
        new: The expanded folder.
        ids: A prompt of base ids.
        num_ids: How many ids the base has; free rows behind them may have been taken.
    """
    num_rows = open_checkpoint(base).vocab_size
    before, after = (logits(folder, ids, num_rows)[:, :num_ids] for folder in (base, new))
    return before.shape == after.shape and torch.equal(before, after)
