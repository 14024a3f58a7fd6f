"""Encode the same text with a tokenizer and with its extensions, in turns; print how much slower they are.

    python benchmarks/tokenizer_speed.py [--tokenizers PATH...] [--corpora PATH...] [--tokens 1000 10000]
                                         [-o FILE [--keep]]

A tokenizer is a folder or a .tar.gz of one; the default is all tokenizers of $VOCABEXT_ASSETS (../shared/assets), and
those of two models there, of which one has 2,048 entries. Tokens are
mined once per tokenizer from all corpora, and each corpus is then encoded by every tokenizer in turns, text by
text and as one batch. Besides the corpora there is generated text of other scripts, `scripts`, words drawn from
Unicode blocks. A ratio is the median over the turns of seconds of the extension over seconds of the base; above
1 is slower. Each tokenizer is also measured with a splitting step that never matches, tried at every place or at
none, with one that cuts at every space (what cutting costs without a search), with the same tokens cut out by an
expression where they are merges otherwise, and with AddedTokens; also with the share of documents in which these ways
break the invariant. With --keep, rows of other tokenizers stay in FILE.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tokenizer_lengths import ASSETS, _short, _unpacked, circumstances, joined, write
from tokenizers import Regex, Tokenizer, pre_tokenizers

from vocabext.corpus import Document, read_documents
from vocabext.errors import TokenizerError
from vocabext.files.atomic import read_object, write_json
from vocabext.mine.stage import mine
from vocabext.options import MineConfig
from vocabext.tokenizer import SPACE_MARK, BaseTokenizer, ExpandedTokenizer, MergeChain, extend, load_tokenizer
from vocabext.tokens import NewToken

HEADER = ("tokenizer", "new tokens", "text", "single: base MB/s", "ratio", "batch: base MB/s", "ratio", "new share")
NOWHERE = r"\x{1}\x{2}"  # the engine looks for these two, and finds them in no text
# First and last letter of scripts that are written with spaces, and of two that are not.
BLOCKS = ((0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939), (0xAC00, 0xB000),
          (0x4E00, 0x5200), (0x30A2, 0x30ED))


def main() -> None:
    """Measure every tokenizer."""
    arguments = _parse()
    corpora = {_short(path): _texts(path, arguments.bytes) for path in arguments.corpora}
    corpora["scripts"] = other_scripts(arguments.bytes)
    rows: list[dict[str, Any]] = []
    write("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for path in arguments.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            try:
                base = load_tokenizer(_unpacked(path, Path(folder)))
            except TokenizerError as error:
                write(f"| {_short(path)} | refused: {error} |")
                continue
        tokens = _mined(base, corpora, max(arguments.tokens))
        for count in arguments.tokens:
            new = extend(base, tokens[:count])
            for name, texts in corpora.items():
                rows.append({"tokenizer": _short(path), "tokens": len(new.tokens), "text": name,
                             **compare(base, new.backend, texts, arguments.turns),
                             "new_share": _new_share(new, texts)})
                write(_line(rows[-1]))
            rows.append({"tokenizer": _short(path), "tokens": len(new.tokens), "text": "loading", **loading(base, new)})
            write(f"| {_short(path)} | {len(new.tokens):,} | loading | {rows[-1]['base_seconds']:.2f} s "
                  f"| {rows[-1]['ratio']:.2f} | | | |")
        rows += alternatives(_short(path), base, tokens[: min(arguments.tokens)], corpora, arguments.turns)
    if arguments.output:
        kept = (read_object(arguments.output) or {}).get("rows", []) if arguments.keep else []
        write_json(arguments.output, {"turns": arguments.turns, "bytes": arguments.bytes, **circumstances(),
                                      "rows": joined(kept, rows)})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, nargs="+", help="folders or .tar.gz archives")
    parser.add_argument("--corpora", type=Path, nargs="+", help="files with text")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000], help="how many new tokens")
    parser.add_argument("--bytes", type=int, default=300_000, help="how much of each corpus")
    parser.add_argument("--turns", type=int, default=5, help="how often each tokenizer encodes it")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the rows of other tokenizers in that file")
    arguments = parser.parse_args()
    arguments.tokenizers = arguments.tokenizers or [
        *sorted((ASSETS / "tokenizers").glob("*")), *sorted((ASSETS / "models").glob("biomed-13m")),
        *sorted((ASSETS / "models").glob("tinystories-656k"))]
    arguments.corpora = arguments.corpora or sorted((ASSETS / "corpora").glob("*.jsonl.gz"))
    if not arguments.tokenizers:
        parser.error(f"there is nothing to measure in {ASSETS}; give --tokenizers")
    return arguments


def _texts(path: Path, num_bytes: int) -> list[str]:
    lengths = itertools.accumulate(len(d.text.encode()) for d in read_documents([str(path)]))
    count = sum(1 for _ in itertools.takewhile(lambda length: length < num_bytes, lengths)) + 1
    return [document.text for document in itertools.islice(read_documents([str(path)]), count)]


def other_scripts(num_bytes: int) -> list[str]:
    """Generate texts of words from a small vocabulary per script, frequent ones more often."""
    rng = random.Random(0)
    texts = []
    while sum(len(text.encode()) for text in texts) < num_bytes:
        first, last = BLOCKS[len(texts) % len(BLOCKS)]
        words = ["".join(chr(rng.randint(first, last)) for _ in range(rng.randint(2, 8))) for _ in range(200)]
        space = "" if first in (0x4E00, 0x30A2) else " "
        texts.append(space.join(words[int(200 * rng.random() ** 3)] for _ in range(300)))
    return texts


def _mined(base: BaseTokenizer, corpora: dict[str, list[str]], count: int) -> Sequence[NewToken]:
    documents = [Document(f"{name} {i}", text) for name, texts in corpora.items() for i, text in enumerate(texts)]
    return mine(documents, base, MineConfig(budget=count, min_count=2), at_most=True).tokens


def compare(base: BaseTokenizer, other: Tokenizer, texts: Sequence[str], turns: int) -> dict[str, float]:
    """Encode in turns; returns speeds of the base in bytes per second, and median ratios of seconds."""
    def single(backend: Tokenizer) -> None:
        for text in texts:
            backend.encode(text, add_special_tokens=False)

    def batch(backend: Tokenizer) -> None:
        backend.encode_batch_fast(list(texts), add_special_tokens=False)

    found: dict[str, float] = {}
    num_bytes = sum(len(text.encode()) for text in texts)
    for name, encode in (("single", single), ("batch", batch)):
        encode(base.backend), encode(other)  # both have seen the words once
        pairs = [(_seconds(encode, base.backend), _seconds(encode, other)) for _ in range(turns)]
        found[f"{name}_bytes_per_second"] = num_bytes / statistics.median(old for old, _ in pairs)
        found[f"{name}_ratio"] = statistics.median(new / old for old, new in pairs)
    return found


def _seconds(function: Callable[[Tokenizer], None], backend: Tokenizer) -> float:
    began = time.perf_counter()
    function(backend)
    return time.perf_counter() - began


def _new_share(new: ExpandedTokenizer, texts: Sequence[str]) -> float:
    ids = [i for row in new.encode_batch(texts) for i in row]
    return float(new.expansion.is_new(ids).mean())


def loading(base: BaseTokenizer, new: ExpandedTokenizer) -> dict[str, float]:
    """Time the reading of both specifications, in turns."""
    old_text, new_text = base.backend.to_str(), new.backend.to_str()
    pairs = []
    for _ in range(3):
        began = time.perf_counter()
        Tokenizer.from_str(old_text)
        middle = time.perf_counter()
        Tokenizer.from_str(new_text)
        pairs.append((middle - began, time.perf_counter() - middle))
    return {"base_seconds": statistics.median(old for old, _ in pairs),
            "ratio": statistics.median(new / old for old, new in pairs)}


def alternatives(
    tokenizer: str, base: BaseTokenizer, tokens: Sequence[NewToken], corpora: dict[str, list[str]], turns: int
) -> list[dict[str, Any]]:
    """Measure what bounds the speed, and other ways to add the same tokens with how often they change other text."""
    added = Tokenizer.from_str(base.backend.to_str())
    added.add_tokens([token.token for token in tokens])
    ways = {"AddedTokens": added, "a step tried everywhere": _with_step(base, "(?!)"),
            "a step tried nowhere": _with_step(base, NOWHERE),
            "a step at every space": _with_step(base, f"[ {SPACE_MARK}]")}
    if base.scheme.only_merges:
        with patch.object(MergeChain, "add", return_value=False):
            ways["cut out by an expression"] = extend(base, tokens).backend
    expansion = extend(base, tokens).expansion
    rows = []
    for way, backend in ways.items():
        new = ExpandedTokenizer(backend, base.hf, expansion)
        for text, texts in corpora.items():
            broken = sum(not _holds(base, new, document) for document in texts) / len(texts)
            rows.append({"tokenizer": tokenizer, "way": way, "tokens": 0 if way.startswith("a step") else len(tokens),
                         "text": text, **compare(base, backend, texts, turns), "broken_documents": broken})
            write(_line(rows[-1]) + f" {way}; broken in {broken:.0%} of the documents |")
    return rows


def _with_step(base: BaseTokenizer, expression: str) -> Tokenizer:
    """Give a tokenizer one more splitting step, where an extension would put it."""
    backend = Tokenizer.from_str(base.backend.to_str())
    step, old = pre_tokenizers.Split(Regex(expression), "isolated"), backend.pre_tokenizer
    steps = [step] if old is None else [old, step] if base.kind == "whole text" else [step, old]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend


def _holds(base: BaseTokenizer, new: ExpandedTokenizer, text: str) -> bool:
    try:
        return bool(new.expansion.unmerge(new.encode(text)).tolist() == base.encode(text))
    except ValueError:
        return False


def _line(row: dict[str, Any]) -> str:
    share = f"{row['new_share']:.0%}" if "new_share" in row else ""
    return (f"| {row['tokenizer']} | {row['tokens']:,} | {row['text']} | {row['single_bytes_per_second'] / 1e6:.2f} "
            f"| {row['single_ratio']:.2f} | {row['batch_bytes_per_second'] / 1e6:.2f} | {row['batch_ratio']:.2f} "
            f"| {share} |")


if __name__ == "__main__":
    main()
