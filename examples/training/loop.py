"""The training loop: which text, how fast, for how long.

Everything is driven by one number, the fraction of the wall-clock budget that has passed:

* the learning rate warms up, stays, and falls to zero exactly when the time is over, so the run
  always ends annealed, however fast the machine is;
* the share of domain text rises from ``DOMAIN_START`` to ``DOMAIN_END``;
* rows are short (cheap) at first, and as long as the context for the last part.

Text is packed: documents are joined as ``begin text end begin text end ...`` and cut into rows,
so no position is wasted on padding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.model import Trainee
from training.optim import Optimizer
from training.tokenizer import CONTEXT, special_ids

log = logging.getLogger("train_model")

Tokens = NDArray[np.uint16]

TOKENS_PER_STEP = 4_096
SHORT_ROW = 512
LONG_ROWS_FROM = 0.85
"""Fraction of the budget after which rows are as long as the context."""

DOMAIN_START, DOMAIN_END = 0.15, 0.45
WARM_UP, DECAY_FROM = 0.02, 0.40
SMOOTHING = 0.98


@dataclass
class Corpus:
    """Documents as tokens.

    Attributes:
        tokens_N: All documents in a row, each as begin, text, end.
        starts: Where each document starts; one more entry for the end of the last.
    """

    tokens_N: Tokens
    starts: NDArray[np.int64]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, documents: list[str]) -> Corpus:
        """Tokenize documents.

        Args:
            tokenizer: Puts the begin token in front itself.
            documents: Texts.

        Returns:
            The corpus.
        """
        _, end = special_ids(tokenizer)
        rows = [
            np.array([*encoding.ids, end], np.uint16)
            for start in range(0, len(documents), 1_000)
            for encoding in tokenizer.encode_batch(documents[start : start + 1_000])
        ]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate(rows), starts)

    def shuffled_order(self, seed: int) -> NDArray[np.int64]:
        """Return the documents' numbers in a random order that depends on the seed."""
        return np.random.default_rng(seed).permutation(len(self.starts) - 1)

    def select(self, order: NDArray[np.int64]) -> Corpus:
        """Return some documents, in the order given."""
        spans = list(pairwise(self.starts.tolist()))
        rows = [self.tokens_N[slice(*spans[i])] for i in order]
        return Corpus(np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def joined(self, other: Corpus) -> Corpus:
        """Return the documents of both."""
        starts = np.concatenate([self.starts, self.starts[-1] + other.starts[1:]])
        return Corpus(np.concatenate([self.tokens_N, other.tokens_N]), starts)


@dataclass
class Stream:
    """Rows of a corpus, epoch after epoch, every epoch in a new order.

    Attributes:
        corpus: Where the rows come from.
        taken: Tokens handed out so far.
    """

    corpus: Corpus
    taken: int = 0
    epoch: int = 0
    buffer: Tokens = field(default_factory=lambda: np.empty(0, np.uint16))

    def row(self, length: int) -> Tokens:
        """Return the next ``length`` tokens and one more, which the next row starts with."""
        while len(self.buffer) <= length:
            order = self.corpus.shuffled_order(self.epoch)
            epoch = self.corpus.select(order).tokens_N
            self.buffer = np.concatenate([self.buffer, epoch])
            self.epoch += 1
        row, self.buffer = self.buffer[: length + 1], self.buffer[length:]
        self.taken += length
        return row


class ThreadChooser:
    """Chooses between one thread and all, whichever is faster at present.

    On a machine that other programs use, a matrix product on all cores waits for the busiest of
    them, and may be slower than on one core.  So from time to time both are tried.
    """

    def __init__(self, every: int = 100, tries: int = 3) -> None:
        """Start with all threads.

        Args:
            every: Steps between two comparisons.
            tries: Steps per candidate in a comparison.
        """
        self.candidates = [torch.get_num_threads(), 1]
        self.every, self.tries = every, tries
        self.fastest = {threads: float("inf") for threads in self.candidates}
        self.used = 0.0

    def before(self, step: int) -> None:
        """Set the number of threads for a step."""
        phase = step % self.every
        if phase == 0:
            self.fastest = dict.fromkeys(self.candidates, float("inf"))
        if phase < self.tries * len(self.candidates):
            torch.set_num_threads(self.candidates[phase // self.tries])
        elif phase == self.tries * len(self.candidates):
            torch.set_num_threads(min(self.fastest, key=lambda threads: self.fastest[threads]))

    def after(self, seconds: float) -> None:
        """Take note of how long the step took."""
        threads = torch.get_num_threads()
        self.fastest[threads] = min(self.fastest[threads], seconds)


def learning_rate(progress: float) -> float:
    """Return the learning rate as a fraction of its peak: a trapezoid.

    Args:
        progress: Fraction of the budget that has passed.

    Returns:
        A number from 0 to 1.
    """
    return max(0.0, min(1.0, progress / WARM_UP, (1 - progress) / (1 - DECAY_FROM)))


def batches(general: Stream, domain: Stream, seed: int, progress: Callable[[], float]) -> Iterator[torch.Tensor]:
    """Yield batches, each row from the general or the domain stream.

    Args:
        general: General text.
        domain: Domain text.
        seed: Of the choice between the two.
        progress: Returns the fraction of the budget that has passed.

    Yields:
        Tokens (B, T + 1).
    """
    random = np.random.default_rng(seed)
    while True:
        done = progress()
        length = SHORT_ROW if done < LONG_ROWS_FROM else CONTEXT
        share = DOMAIN_START + (DOMAIN_END - DOMAIN_START) * done
        choices = random.random(TOKENS_PER_STEP // length) < share
        rows = [(domain if choice else general).row(length) for choice in choices]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def train(
    trainee: Trainee,
    optimizer: Optimizer,
    general: Stream,
    domain: Stream,
    *,
    minutes: float,
    checkpoint_minutes: float,
    checkpoint: Callable[[], None],
    seed: int,
) -> dict[str, object]:
    """Train until the time is over.

    Args:
        trainee: The model.
        optimizer: Its optimizer.
        general: General text.
        domain: Domain text.
        minutes: Wall-clock budget, compilation included.
        checkpoint_minutes: Time between two checkpoints.
        checkpoint: Saves the model.
        seed: Of the order of the text.

    Returns:
        What happened, ready for JSON.
    """
    began = saved = time.monotonic()

    def progress() -> float:
        return min(1.0, (time.monotonic() - began) / (60 * minutes))

    threads = ThreadChooser()
    smooth = 0.0
    curve: list[dict[str, float]] = []
    for step, tokens_BT in enumerate(batches(general, domain, seed, progress)):
        done = progress()
        if done >= 1.0:
            break
        threads.before(step)
        step_began = time.monotonic()
        loss = trainee(tokens_BT)
        loss.backward()
        norm = optimizer.step(learning_rate(done))
        threads.after(time.monotonic() - step_began)
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss.item()
        mean = smooth / (1 - SMOOTHING ** (step + 1))
        if step % 50 == 0:
            seen = general.taken + domain.taken
            rate = seen / (time.monotonic() - began)
            log.info(
                "step %d  %.1f %%  loss %.3f  norm %.2f  %.2fM tokens  %.0f tokens/s  %d threads",
                *(step, 100 * done, mean, norm, seen / 1e6, rate, torch.get_num_threads()),
            )
            curve.append({"step": step, "tokens": seen, "loss": round(mean, 4)})
        if time.monotonic() - saved > 60 * checkpoint_minutes:
            checkpoint()
            saved = time.monotonic()
    seconds = time.monotonic() - began
    seen = general.taken + domain.taken
    return {
        "minutes": minutes,
        "steps": step,
        "tokens_seen": seen,
        "domain_tokens_seen": domain.taken,
        "domain_epochs": round(domain.taken / len(domain.corpus.tokens_N), 2),
        "general_tokens_seen": general.taken,
        "general_epochs": round(general.taken / len(general.corpus.tokens_N), 2),
        "wall_seconds": round(seconds),
        "tokens_per_second": round(seen / seconds),
        "final_training_loss": round(mean, 4),
        "curve": curve,
    }
