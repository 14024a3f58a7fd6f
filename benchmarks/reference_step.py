"""The training step of the reference implementation of Token Distillation, from its description.

What it does, none of which our engine shares: a float32 model; 16 snippets of any tokens in a step; the
teacher in every step; the merged text padded to the length of the original; logits at every position of
both; mean squared error of last hidden states over all aligned positions; AdamW with its defaults and a
constant step size of 1e-4 over whole embedding matrices; one epoch over all snippets, shuffled.

Where the description leaves room, what is cheaper or better for the reference was chosen:

- Gradients of base rows are set to zero after each backward pass, so that only new rows learn. AdamW still
  decays base rows, by 1e-6 per step; measurements use the rows as they were.
- Evaluation mode, no attention mask (padding is on the right), no tokenization or search within the clock.
- With one matrix for input and output, logits are computed and not used. With two, output rows learn by
  next-token prediction from detached hidden states, and input rows by the hidden states alone.
- All new tokens are merged in every snippet, as a tokenizer with added tokens gives it; `merged="own"`
  merges the snippet's own token only.

Shape suffixes: B snippets of a step, T positions, D hidden size, N new rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from machine import Clock
from torch.nn import functional as F

from vocabext.checkpoint.rows import mean_rows
from vocabext.model.frozen import FrozenModel
from vocabext.tokens import Expansion, Ids, TokenSnippets

SHARES = (0.125, 0.25, 0.5, 1.0)
PAD = 0


@dataclass(frozen=True)
class ReferenceConfig:
    """Options of the reference.

    Attributes:
        batch_snippets: Snippets per step.
        learning_rate: Step size, constant.
        merged: `all` new tokens of a snippet are merged, or its `own` alone.
        autocast: Compute matrix products in bfloat16; the description says float32.
        seed: Decides the order of snippets.
    """

    batch_snippets: int = 16
    learning_rate: float = 1e-4
    merged: str = "all"
    autocast: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The new rows at some point of the epoch.

    Attributes:
        share: Which share of the steps was done.
        seconds: Time until then, without the time for taking snapshots.
        cpu_seconds: Processor time until then, of all threads; what neighbours take does not count.
        input_ND: Input rows.
        output_ND: Output rows; the input rows where there is one matrix.
    """

    share: float
    seconds: float
    cpu_seconds: float
    input_ND: torch.Tensor
    output_ND: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """One snippet for student and teacher; student position t must match teacher position aligned[t]."""

    student: Ids
    teacher: Ids
    aligned: Ids


def lay_out(
    records: Sequence[TokenSnippets], expansion: Expansion, prefix_ids: Sequence[int], merged: str
) -> list[Pair]:
    """Return every snippet of every token, in the order of the records."""
    prefix = np.asarray(prefix_ids, np.int64)
    pairs = []
    for index, record in enumerate(records):
        for snippet in record.snippets:
            ids = np.asarray(snippet, np.int64)
            if merged == "own":
                ids = expansion.unmerge(ids, keep=[expansion.first_new_id + index])
            framed = np.concatenate((prefix, ids))
            pairs.append(Pair(framed, expansion.unmerge(framed), expansion.last_positions(framed)))
    return pairs


def schedule(pairs: Sequence[Pair], config: ReferenceConfig) -> list[list[Pair]]:
    """Return the snippets of every step of the epoch."""
    order = np.random.default_rng(config.seed).permutation(len(pairs)).tolist()
    return [[pairs[i] for i in order[at : at + config.batch_snippets]]
            for at in range(0, len(order), config.batch_snippets)]


class ReferenceTrainer:
    """The model with its new rows in place, and the optimizer over its embedding matrices."""

    def __init__(self, model: FrozenModel, expansion: Expansion, config: ReferenceConfig) -> None:
        """Grow the matrices, put mean-of-pieces rows in, and make the matrices trainable.

        Args:
            model: The float32 model; it is changed.
            expansion: The new tokens.
            config: Options.
        """
        self.frozen, self.config = model, config
        self.first_new_id, self.num_new = expansion.first_new_id, expansion.num_new
        self.tied, hf = model.tied, model.model
        means = [mean_rows(matrix_VD, expansion.tokens) for matrix_VD in (model.embedding_VD, model.head_VD)]
        hf.resize_token_embeddings(max(len(model.embedding_VD), expansion.end_id), mean_resizing=False)
        self.matrices = [model.embedding_VD] if self.tied else [model.embedding_VD, model.head_VD]
        with torch.no_grad():
            for matrix_VD, mean_ND in zip(self.matrices, means, strict=False):
                matrix_VD[self.first_new_id : expansion.end_id] = mean_ND.to(matrix_VD.device)
        for matrix_VD in self.matrices:
            matrix_VD.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.matrices, lr=config.learning_rate)

    def step(self, batch: Sequence[Pair]) -> None:
        """Take one training step."""
        device = self.frozen.device
        width = max(len(pair.teacher) for pair in batch)
        teacher_BT, student_BT, aligned_BT = (
            torch.from_numpy(np.stack([np.pad(getattr(pair, side), (0, width - len(getattr(pair, side))),
                                              constant_values=PAD) for pair in batch])).to(device)
            for side in ("teacher", "student", "aligned"))
        lengths_B = torch.tensor([len(pair.student) for pair in batch], device=device)
        real_BT = torch.arange(width, device=device) < lengths_B[:, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
            with torch.no_grad():
                target_BTD, _ = self._run(teacher_BT)
            target_BTD = target_BTD.gather(1, aligned_BT.unsqueeze(-1).expand_as(target_BTD))
            hidden_BTD, logits_BTV = self._run(student_BT)
            loss = F.mse_loss(hidden_BTD[real_BT].float(), target_BTD[real_BT].float())
            if not self.tied:
                after_BT = real_BT[:, 1:]
                loss = loss + F.cross_entropy(logits_BTV[:, :-1][after_BT].float(), student_BT[:, 1:][after_BT])
        loss.backward()  # type: ignore[no-untyped-call]
        for matrix_VD in self.matrices:
            assert matrix_VD.grad is not None
            matrix_VD.grad[: self.first_new_id] = 0
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the new input and output rows."""
        new = slice(self.first_new_id, self.first_new_id + self.num_new)
        input_ND, output_ND = (m[new].detach().clone().cpu() for m in (self.matrices[0], self.matrices[-1]))
        return input_ND, output_ND

    def _run(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hf = self.frozen.model
        hidden_BTD: torch.Tensor = hf.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
        logits: torch.Tensor = hf.get_output_embeddings()(hidden_BTD if self.tied else hidden_BTD.detach())
        return hidden_BTD, logits


def run_reference(
    pairs: Sequence[Pair], model: FrozenModel, expansion: Expansion, config: ReferenceConfig,
    shares: Sequence[float] = SHARES,
) -> list[Snapshot]:
    """Train for one epoch.

    Args:
        pairs: Snippets from `lay_out`.
        model: The float32 model; it is changed.
        expansion: The new tokens.
        config: Options.
        shares: At which shares of the epoch rows are kept; the clock stands still meanwhile.

    Returns:
        The rows at each share, in order; shares that fall on the same step are one.
    """
    clock = Clock(model.device)
    trainer = ReferenceTrainer(model, expansion, config)
    batches = schedule(pairs, config)
    stops = {max(1, round(share * len(batches))): share for share in shares}
    snapshots = []
    for number, batch in enumerate(batches, 1):
        trainer.step(batch)
        if number in stops:
            with clock.stopped() as (seconds, cpu_seconds):
                snapshots.append(Snapshot(number / len(batches), seconds, cpu_seconds, *trainer.rows()))
    return snapshots
