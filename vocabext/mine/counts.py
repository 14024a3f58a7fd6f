"""A corpus as the miner sees it: base ids, and the units (words, strings of punctuation) that they make."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vocabext.errors import TokenizerError
from vocabext.mine.repeats import NO_REPEATS, Repeats, find_repeats
from vocabext.options import MineConfig
from vocabext.progress import Progress
from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import NewToken

Array = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
BATCH = 512
# Long documents are cut into sections, none of which holds more than one part in so many of the corpus.
MIN_SECTIONS = 20


@dataclass(frozen=True)
class Encoded:
    """All documents under the base tokenizer.

    Attributes:
        ids: Their base ids, with a -1 behind each document, shape (T,).
        ends: Where these -1 are, shape (D,).
        counted: Which ids count: none that the corpus says again, shape (T,).
        section_starts: Where sections begin, shape (S,).
        repeats: What is not counted.
    """

    ids: Array
    ends: Array
    counted: Flags
    section_starts: Array
    repeats: Repeats

    @property
    def starts(self) -> Array:
        """Where documents begin, shape (D,)."""
        return np.append(0, self.ends[:-1] + 1)


@dataclass(frozen=True)
class Corpus:
    """What counts of a corpus, as units. Arrays of shape (U,) have one entry per unit.

    A barrier, a unit that no token may hold, stands behind each document and for each stretch that does not count.
    """

    encoded: Encoded
    ids: Array  # the token ids that count, flat, and a -1 for each barrier (T,)
    starts: Array  # index into `ids` of each unit's first token
    pieces: Array  # tokens per unit
    codes: npt.NDArray[np.uint64]  # hash of each unit's ids
    inside: Flags  # may stand in a token at all
    closable: Flags  # a phrase may end with this unit, given the unit that follows it
    sections: Array  # the section that each unit belongs to, counted upwards

    @property
    def num_tokens(self) -> int:
        """How many base tokens count."""
        return int((self.ids >= 0).sum())

    def run(self, unit: int, units: int) -> tuple[int, ...]:
        """Return the base ids of some units in a row."""
        first, last = unit, unit + units - 1
        return tuple(int(i) for i in self.ids[self.starts[first] : self.starts[last] + self.pieces[last]])


def read_corpus(texts: Sequence[str], base: BaseTokenizer, progress: Progress, *, dedup: bool = True) -> Corpus:
    """Encode texts and cut them into units.

    Args:
        texts: The documents.
        base: The tokenizer to extend.
        progress: Where to report.
        dedup: Count once what the corpus says several times.
    """
    flat, first = _encode(texts, base, progress)
    out, repeats = find_repeats(flat, first) if dedup else (np.zeros(len(first), np.bool_), NO_REPEATS)
    sections = _sections(flat[first])
    # A stretch of repeated units becomes one barrier, where its first id was.
    pieces = np.diff(np.append(first, len(flat)))
    counted = np.repeat(~out, pieces)
    begins = first[out & ~np.append(False, out[:-1])]
    stays = counted.copy()
    stays[begins] = True
    ids = np.where(counted, flat, -1)[stays]
    units = stays[first]
    is_start = np.zeros(len(flat), np.bool_)
    is_start[first] = True
    starts = np.flatnonzero(is_start[stays])
    pieces = np.diff(np.append(starts, len(ids)))
    following = np.append(ids[starts[1:]], -1)
    section_starts = first[np.append(True, sections[1:] != sections[:-1])]
    return Corpus(
        Encoded(flat, np.flatnonzero(flat < 0), counted & (flat >= 0), section_starts, repeats), ids, starts, pieces,
        codes=_unit_codes(ids, starts, pieces), inside=_allowed(ids, starts, base),
        closable=base.scheme.phrase_may_end(ids[starts + pieces - 1], following), sections=sections[units])


def _encode(texts: Sequence[str], base: BaseTokenizer, progress: Progress) -> tuple[Array, Array]:
    """Return the base ids of all texts, with a -1 behind each, and where units begin; a -1 is one."""
    ids: list[Array] = []
    starts: list[Flags] = []
    barrier, edge = np.full(1, -1, np.int64), np.ones(1, np.bool_)
    with progress("reading the corpus", len(texts), "documents") as task:
        for at in range(0, len(texts), BATCH):
            for units in base.scheme.encode_units(texts[at : at + BATCH]):
                ids += [units.ids, barrier]
                starts += [units.starts, edge]
                task.advance()
    return np.concatenate(ids), np.flatnonzero(np.concatenate(starts))


def _sections(first_ids: Array) -> Array:
    """Number the sections of a corpus, given the first id of each unit."""
    begins = np.append(True, first_ids[:-1] < 0)
    begins[:: -(-len(first_ids) // MIN_SECTIONS)] = True
    return np.cumsum(begins)


def _allowed(ids: Array, starts: Array, base: BaseTokenizer) -> Flags:
    """Tell for each unit whether it may be (part of) a token."""
    broken = np.zeros(base.first_new_id + 1, np.bool_)
    broken[base.scheme.barrier_ids] = True
    broken[-1] = True  # index -1: the barrier between documents
    return ~np.logical_or.reduceat(broken[ids], starts)


def _unit_codes(ids: Array, starts: Array, pieces: Array) -> npt.NDArray[np.uint64]:
    """Hash the ids of each unit; the place inside the unit counts, so that order does."""
    rng = np.random.default_rng(0)
    values = rng.integers(1, 2**63, int(ids.max()) + 2, np.uint64) | np.uint64(1)
    place = np.arange(len(ids)) - np.repeat(starts, pieces)
    factors = np.cumprod(np.full(int(pieces.max()), np.uint64(0x9E3779B97F4A7C15)), dtype=np.uint64)
    return np.add.reduceat(values[ids] * factors[place], starts)


def outside_best(sections: Array, saved: Array) -> int:
    """Return what is saved outside the section that saves most.

    Args:
        sections: The section of each place, rising, shape (P,), at least one.
        saved: What is saved there.
    """
    edges = np.flatnonzero(np.append(True, sections[1:] != sections[:-1]))
    by_section = np.add.reduceat(saved, edges)
    return int(by_section.sum() - by_section.max())


def apart(at: Array, ends: Array) -> slice | Flags:
    """Select the places that do not begin inside the one before (`"ha ha ha"`), from left to right."""
    if (at[1:] >= ends[:-1]).all():
        return slice(None)
    keep, end = np.zeros(len(at), np.bool_), -1
    for index, (position, stop) in enumerate(zip(at.tolist(), ends.tolist(), strict=True)):
        if position >= end:
            keep[index], end = True, stop
    return keep


@dataclass(frozen=True)
class Choice:
    """Tokens that are chosen when they are asked for.

    Attributes:
        tokens: The tokens, best first, each with what it saves outside the section that uses it most.
        rejected: Texts that would have been chosen so far but cannot be tokens, with the reason.
        candidates: Returns how many there were to choose from so far.
    """

    tokens: Iterator[tuple[int, NewToken]]
    rejected: MutableMapping[str, str]
    candidates: Callable[[], int]


def text_of(run: Sequence[int], base: BaseTokenizer) -> str:
    """Return the text that base ids stand for."""
    return base.scheme.key_text(base.scheme.spelling(run).decode(errors="replace"))


def as_token(run: tuple[int, ...], base: BaseTokenizer, config: MineConfig) -> NewToken:
    """Return the new token for base ids.

    Raises:
        TokenizerError: If their text cannot be one, is too long, or has other ids on its own.
    """
    text = text_of(run, base)
    if len(text) > config.max_characters:
        raise TokenizerError(f"{text!r} is longer than {config.max_characters} characters")
    token = base.new_token(text)
    if token.run != run:
        raise TokenizerError(f"{text!r} is cut differently on its own")
    return token
