"""Extend real tokenizers by tokens mined from real text; print how much shorter other text gets, and what breaks.

    python benchmarks/tokenizer_lengths.py [--tokenizers PATH...] [--corpora PATH...] [-o FILE [--keep]]

A tokenizer is a folder or a .tar.gz of one, a corpus any file that `vocabext mine` reads; the default is all of
$VOCABEXT_ASSETS (../shared/assets). Tokens are mined from every document but each fifth, once words only and
once with phrases. "Shorter" is measured on each fifth document. The invariant, equal decoded text and "never
longer" are checked on all documents, and every breach counts as a violation. With --keep, rows of other
tokenizers stay in FILE, so that one can be measured at a time.
"""

import argparse
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import describe

from vocabext.corpus import Document, read_documents
from vocabext.errors import TokenizerError
from vocabext.files.atomic import read_object, write_json
from vocabext.mine.stage import mine
from vocabext.options import MineConfig
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend, load_tokenizer

ASSETS = Path(os.environ.get("VOCABEXT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
HEADER = ("tokenizer", "corpus", "documents", "characters", "words", "words and phrases", "violations", "seconds")
FIFTH = 5
BATCH = 256


@dataclass(frozen=True)
class Row:
    """What happened to one tokenizer on one corpus.

    Attributes:
        tokenizer: Its file or folder.
        corpus: Its file.
        documents: How many documents were checked.
        characters: How many characters they have.
        tokens: How many new tokens there are, words only and with phrases.
        shorter_shares: By which share they make held-out documents shorter.
        violations: Broken promises to how many documents broke them, over both sets of tokens.
        seconds: Time for everything, mining included.
    """

    tokenizer: str
    corpus: str
    documents: int
    characters: int
    tokens: tuple[int, int]
    shorter_shares: tuple[float, float]
    violations: dict[str, int]
    seconds: float


def main() -> None:
    """Measure every tokenizer on every corpus."""
    arguments = _parse()
    rows: list[Row] = []
    refused: dict[str, str] = {}
    write("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for path in arguments.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            try:
                base = load_tokenizer(_unpacked(path, Path(folder)))
            except TokenizerError as error:
                refused[path.name] = str(error)
                write(f"| {_short(path)} | refused: {error} |" + " |" * (len(HEADER) - 2))
                continue
        for corpus in arguments.corpora:
            rows.append(measure(base, path, corpus, arguments.tokens, arguments.min_count))
            write(_line(rows[-1], arguments.tokens))
    if arguments.output:
        found = {"tokens": arguments.tokens, "min_count": arguments.min_count, **circumstances()}
        kept = (read_object(arguments.output) or {}) if arguments.keep else {}
        write_json(arguments.output, {**found, "refused": {**kept.get("refused", {}), **refused},
                                      "rows": joined(kept.get("rows", []), [asdict(row) for row in rows])})
    if any(row.violations for row in rows):
        sys.exit(3)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, nargs="+", help="folders or .tar.gz archives")
    parser.add_argument("--corpora", type=Path, nargs="+", help="files with text")
    parser.add_argument("--tokens", type=int, default=1000, help="how many new tokens to mine, if there are as many")
    parser.add_argument("--min-count", type=int, default=3, help="how often a token must occur in the mining text")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the rows of other tokenizers in that file")
    arguments = parser.parse_args()
    arguments.tokenizers = arguments.tokenizers or sorted((ASSETS / "tokenizers").glob("*"))
    arguments.corpora = arguments.corpora or sorted((ASSETS / "corpora").glob("*.jsonl.gz"))
    if not arguments.tokenizers or not arguments.corpora:
        parser.error(f"there is nothing to measure in {ASSETS}; give --tokenizers and --corpora")
    return arguments


def _unpacked(path: Path, folder: Path) -> Path:
    """Return the folder that holds a tokenizer, unpacking an archive first."""
    if path.is_dir():
        return path
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob("tokenizer_config.json"), folder / "nothing").parent


def measure(base: BaseTokenizer, tokenizer: Path, corpus: Path, num_tokens: int, min_count: int) -> Row:
    """Mine on four fifths of a corpus, measure on the others, check on all."""
    began = time.monotonic()
    documents = list(read_documents([str(corpus)]))
    mining = [document for i, document in enumerate(documents) if i % FIFTH]
    words, phrases = (_extended(base, mining, num_tokens, min_count, words_only=only) for only in (True, False))
    violations: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for at in range(0, len(documents), BATCH):
        texts = [document.text for document in documents[at : at + BATCH]]
        before, *after = (t.encode_batch(texts) for t in (base, words, phrases))
        held_out = [(at + i) % FIFTH == 0 for i in range(len(texts))]
        lengths["base"] += sum(len(ids) for ids, counts in zip(before, held_out, strict=True) if counts)
        for name, expanded, found in zip(("words", "phrases"), (words, phrases), after, strict=True):
            lengths[name] += sum(len(ids) for ids, counts in zip(found, held_out, strict=True) if counts)
            violations += _violations(base, expanded, before, found)
    shares = tuple(1 - lengths[name] / lengths["base"] for name in ("words", "phrases"))
    return Row(_short(tokenizer), _short(corpus), len(documents), sum(len(d.text) for d in documents),
               (len(words.tokens), len(phrases.tokens)), (shares[0], shares[1]), dict(violations),
               time.monotonic() - began)


def _extended(base: BaseTokenizer, mining: Sequence[Document], num_tokens: int, min_count: int, *,
              words_only: bool) -> ExpandedTokenizer:
    """Mine tokens, all there are if there are fewer than asked for."""
    config = MineConfig(budget=num_tokens, min_count=min_count, words_only=words_only)
    return extend(base, mine(mining, base, config, at_most=True).tokens)


def _violations(base: BaseTokenizer, expanded: ExpandedTokenizer, before: Sequence[list[int]],
                after: Sequence[list[int]]) -> Counter[str]:
    """Count the documents that break a promise."""
    found: Counter[str] = Counter()
    for old, new in zip(before, after, strict=True):
        found["other base ids"] += expanded.expansion.unmerge(new).tolist() != old
        found["other decoded text"] += expanded.decode(new) != base.decode(old)
        found["longer"] += len(new) > len(old)
    return +found


def _line(row: Row, wanted: int) -> str:
    words, phrases = (f"{share:.1%}" + f" ({count:,} tokens)" * (count < wanted)
                      for share, count in zip(row.shorter_shares, row.tokens, strict=True))
    broken = ", ".join(f"{count}: {what}" for what, count in row.violations.items()) or "0"
    return (f"| {row.tokenizer} | {row.corpus} | {row.documents:,} | {row.characters:,} | {words} | {phrases} | "
            f"{broken} | {row.seconds:.0f} |")


def circumstances() -> dict[str, Any]:
    """Return when, on which machine and with which libraries something was measured."""
    return {"machine": describe(torch.device("cpu")),
            "libraries": {name: version(name) for name in ("tokenizers", "transformers")}}


def joined(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of an earlier run, but for those of tokenizers that were measured again, and the new ones."""
    names = {row["tokenizer"] for row in new}
    return [*(row for row in old if row["tokenizer"] not in names), *new]


def _short(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".jsonl")


def write(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
