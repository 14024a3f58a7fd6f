"""Which texts of a corpus `verify` encodes: all of a small corpus, a sample of a large one."""

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vocabext.corpus import Document

SAMPLE_BYTES = 64_000_000  # half a minute for one core that encodes with two tokenizers at 4 MB a second each
PART_CHARACTERS = 1_000_000  # a longer document is encoded in parts: an encoding takes 50 times the memory of its text


@dataclass
class Reading:
    """How much of a corpus was encoded.

    Attributes:
        documents: Documents of the corpus.
        bytes: Their size in UTF-8.
        encoded_documents: Documents of which at least one part was encoded.
        encoded_bytes: Size of what was encoded.
    """

    documents: int = 0
    bytes: int = 0
    encoded_documents: int = 0
    encoded_bytes: int = 0

    def describe(self) -> str:
        """Say how much was encoded, and how to have all of it encoded."""
        if self.encoded_bytes == self.bytes:
            return f"{self.documents:,} documents, {self.bytes:,} bytes"
        return (f"a sample, {self.encoded_documents:,} of {self.documents:,} documents, {self.encoded_bytes:,} of "
                f"{self.bytes:,} bytes (--full takes all)")


def texts_of(documents: Iterable[Document], reading: Reading, *, limit: int | None, seed: int) -> Iterator[str]:
    """Yield the texts to encode, in the order of the corpus; a document of more than `PART_CHARACTERS` in parts.

    The sample holds the parts that drew the smallest random numbers, as many as fit into `limit`: each part has the
    same chance, the corpus is read once, and memory holds the sample and no more.

    Args:
        documents: The corpus.
        reading: Counts what is read and what is encoded.
        limit: How many bytes are encoded at most; None encodes the whole corpus.
        seed: Seed of the sample: the same seed draws the same sample of the same corpus.
    """
    parts = _parts(documents, reading)
    last = -1
    for number, text, size in parts if limit is None else _sample(parts, limit, random.Random(seed)):
        reading.encoded_documents += number != last
        reading.encoded_bytes += size
        last = number
        yield text


def _parts(documents: Iterable[Document], reading: Reading) -> Iterator[tuple[int, str, int]]:
    """Yield the parts of all documents, each with the number of its document and its size."""
    for number, document in enumerate(documents):
        reading.documents += 1
        for start in range(0, len(document.text), PART_CHARACTERS):
            part = document.text[start : start + PART_CHARACTERS]
            size = len(part.encode())
            reading.bytes += size
            yield number, part, size


def _sample(parts: Iterator[tuple[int, str, int]], limit: int, rng: random.Random) -> list[tuple[int, str, int]]:
    drawn: list[tuple[float, int, tuple[int, str, int]]] = []  # a heap, the part with the largest number first
    total = 0
    for place, part in enumerate(parts):
        heapq.heappush(drawn, (-rng.random(), place, part))
        total += part[2]
        while total > limit and len(drawn) > 1:
            total -= heapq.heappop(drawn)[2][2]
    return [part for _, _, part in sorted(drawn, key=lambda entry: entry[1])]


def batches(texts: Iterable[str], count: int) -> Iterator[list[str]]:
    """Yield the texts in batches of at most `count`, and of at most `PART_CHARACTERS` where they are more than one."""
    batch: list[str] = []
    room = PART_CHARACTERS
    for text in texts:
        if batch and (len(batch) == count or len(text) > room):
            yield batch
            batch, room = [], PART_CHARACTERS
        batch.append(text)
        room -= len(text)
    if batch:
        yield batch
