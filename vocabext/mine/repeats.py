"""What a corpus says again: near-duplicate documents and repeated passages, which `mine` counts once.

Boilerplate that 2,000 documents share is read once by its users, if at all, and would fill a vocabulary. Two rules
find it, both on base ids, so that they hold for any script:

- *A document is left out if it is nearly the same as one that is kept*: the estimated Jaccard similarity of their
  sets of `SHINGLE` ids in a row is at least `SIMILARITY` (MinHash, Broder 1997). The longest document is kept. Equal
  lengths go by their ids, so the order of the corpus plays no part. Documents of fewer than `PASSAGE` ids all count.
- *An id is left out if it lies in a passage of `PASSAGE` ids that the corpus has further in front* (exact substrings,
  Lee et al., arXiv 2107.06499). So a template counts once, whatever its documents put into its middle. The first
  occurrence is the one that counts; the order of the corpus decides which document that is.

Neither applies to fewer than `PASSAGE_UNITS` units (words) in a row: a long word of a script that the tokenizer hardly
knows may have more ids than a passage, and is what `mine` looks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

# Shorter passages are also phrases, longer ones miss templates (measured in docs/benchmarks.md).
PASSAGE = 16
PASSAGE_UNITS = 8
SHINGLE = 5
SIMILARITY = 0.8
NUM_PERMUTATIONS = 128
SEED = 0
# Hashes that are sorted at once: bounds the memory beside the corpus to about a quarter of a gigabyte.
MAX_SORTED = 1 << 24


@dataclass(frozen=True)
class Repeats:
    """What was counted once.

    Attributes:
        documents: Documents left out, as each is nearly the same as another.
        passage_ids: Base ids of the other documents left out, as they stand in a passage that was there before.
    """

    documents: int = 0
    passage_ids: int = 0

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return bool(self.documents or self.passage_ids)

    def describe(self) -> str:
        """Say what was counted once; nothing if there is nothing to say."""
        parts = {"near-duplicate documents": self.documents, "tokens of repeated passages": self.passage_ids}
        return " and ".join(f"{number:,} {what}" for what, number in parts.items() if number)


NO_REPEATS = Repeats()


def find_repeats(ids: Ids, first: Ids, passage: int = PASSAGE) -> tuple[Flags, Repeats]:
    """Find the units of a corpus that say something again.

    Args:
        ids: The base ids of all documents, with a -1 behind each, shape (T,).
        first: Where units begin, shape (U,); a -1 is a unit.
        passage: The length of a passage, in base ids.

    Returns:
        Which units are repeated, shape (U,), never a -1; and how much that is.
    """
    ends = np.flatnonzero(ids < 0)
    near = _near_duplicates(ids, ends, passage)
    near &= np.diff(np.searchsorted(first, ends), prepend=-1) > PASSAGE_UNITS
    in_near = np.repeat(near, np.diff(ends, prepend=-1)) & (ids >= 0)
    units = _long_stretches(np.logical_and.reduceat(repeated_passages(np.where(in_near, -1, ids), passage), first))
    sizes = np.diff(np.append(first, len(ids)))
    return units | in_near[first], Repeats(int(near.sum()), int(sizes[units].sum()))


def _long_stretches(flags: Flags) -> Flags:
    """Keep the flags that stand in stretches of at least `PASSAGE_UNITS`."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    begins, stops = edges[::2], edges[1::2]
    long = stops - begins >= PASSAGE_UNITS
    change = np.zeros(len(flags) + 1, np.int64)
    change[begins[long]], change[stops[long]] = 1, -1
    return np.cumsum(change[:-1]) > 0


def _near_duplicates(ids: Ids, ends: Ids, passage: int) -> Flags:
    """Tell which documents are nearly the same as a longer or equally long one that is kept, shape (D,)."""
    from rensa import RMinHashDeduplicator

    near = np.zeros(len(ends), np.bool_)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts
    candidates = np.flatnonzero(lengths >= max(passage, SHINGLE)).tolist()
    # Longest first; equal ones by their content.
    candidates.sort(key=lambda i: (-int(lengths[i]), ids[starts[i] : ends[i]].tobytes()))
    if candidates:
        codes = _window_codes(ids, SHINGLE)
        kept = RMinHashDeduplicator(SIMILARITY, NUM_PERMUTATIONS, True, seed=SEED)
        shingles = ((str(i), codes[starts[i] : ends[i] - SHINGLE + 1].view("V8").tolist()) for i in candidates)
        near[candidates] = ~np.asarray(kept.add_pairs(shingles))
    return near


def repeated_passages(ids: Ids, width: int) -> Flags:
    """Tell which ids lie in a window of `width` ids that stands further in front as well.

    Args:
        ids: Base ids, with a -1 between documents, which no window holds, shape (T,).
        width: The length of a window.

    Returns:
        A flag for each id, shape (T,).
    """
    covered = np.zeros(len(ids) + 1, np.int64)
    if len(ids) < width:
        return np.zeros(len(ids), np.bool_)
    breaks = np.append(0, np.cumsum(ids < 0))
    whole = np.flatnonzero(breaks[width:] == breaks[:-width])
    codes = _window_codes(ids, width)[whole]
    for part in _parts(codes):
        again = whole[part[_seen_before(codes[part])]]
        covered[again] += 1
        covered[again + width] -= 1
    return np.cumsum(covered[:-1]) > 0


def _parts(codes: Codes) -> Iterator[Ids]:
    """Divide the places of hashes into parts of about `MAX_SORTED`; equal hashes are in the same part."""
    number = np.uint64(-(-len(codes) // MAX_SORTED))
    for part in range(int(number)):
        yield np.flatnonzero(codes % number == part)


def _seen_before(codes: Codes) -> Flags:
    """Tell which hashes stand further in front as well."""
    order = np.argsort(codes, kind="stable")
    seen = np.zeros(len(codes), np.bool_)
    seen[order[1:]] = codes[order[1:]] == codes[order[:-1]]
    return seen


def _window_codes(ids: Ids, width: int) -> Codes:
    """Hash each window of `width` ids, shape (T - width + 1,)."""
    values = np.random.default_rng(SEED).integers(0, 2**64, int(ids.max()) + 2, np.uint64)[ids]
    codes = values[: len(ids) - width + 1].copy()
    for offset in range(1, width):
        codes *= np.uint64(0x9E3779B97F4A7C15)
        codes += values[offset : offset + len(codes)]
    return codes
