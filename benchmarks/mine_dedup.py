"""What is counting repeated text once worth? Savings on held-out text, of tokens mined with and without it.

    python benchmarks/mine_dedup.py MODEL --assets PATH [--passages 8 16 32] [--output FILE]

MODEL is mined for twice, on MedQuAD, for each rule: `all` is all text that is not held out; `other topics` is that
without the documents that name cancer or tumours, or the institute NINDS (MedQuAD as it lies there does not say which
of its twelve web sites a document is from; those two have templates of their own). Savings are measured on

- held out: documents of the same sites, with the same templates;
- held out, unshared: those of them that share no eight words in a row with the mined text;
- cancer, NINDS: the documents that `other topics` leaves out;
- general: WikiText-2, which is of no domain.

The rules are `no dedup`, and dedup with passages of so many base ids. The first 500 of 2,000 tokens are the smaller
budget. Results of other models stay in the output file.
"""

import argparse
import functools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from sections import DOCS, put_section

from vocabext.corpus import Document, read_documents
from vocabext.files.atomic import read_object, write_json
from vocabext.mine import counts
from vocabext.mine.repeats import PASSAGE, find_repeats
from vocabext.mine.stage import mine
from vocabext.options import MineConfig
from vocabext.serve.provenance import provenance
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer

BUDGETS = (500, 2000)
TOPICS = {"cancer": r"cancer|tumou?r", "NINDS": r"NINDS|National Institute of Neurological"}
SHARED_WORDS = 8
OUTPUT = Path(__file__).with_suffix(".json")
TEXT = """## Mining

What counting repeated text once brings (`--dedup`, the default) and costs (`benchmarks/mine_dedup.py`): by which share
text gets shorter with 500 / 2,000 tokens mined from MedQuAD. *Held out* are documents of the same web sites, with the
same templates; *unshared* are those of them without eight words in a row that the mined text has; *cancer* and *NINDS*
are kept out of *other topics*; *general* is WikiText-2. Where the served text has the templates of the mined text,
`--no-dedup` saves more.
"""


def main() -> None:
    """Mine with each rule and write what is saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="under which MODEL stands in the output")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--passages", type=int, nargs="*", default=[PASSAGE])
    parser.add_argument("--every", type=int, default=1, help="mine one document in so many")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    name, corpora = arguments.name or arguments.model.name, arguments.assets / "corpora"
    base = load_tokenizer(arguments.model)
    documents = list(read_documents([str(corpora / "medquad.jsonl.gz")]))
    held_out = texts_of(corpora / "medquad.heldout.jsonl.gz")
    topics = {topic: [d.text for d in documents if re.search(pattern, d.text, re.IGNORECASE)]
              for topic, pattern in TOPICS.items()}
    other = [d for d in documents if not re.search("|".join(TOPICS.values()), d.text, re.IGNORECASE)]
    general = {"general": texts_of(corpora / "wikitext2_valid_test.jsonl.gz")}
    mined = {
        "all": (documents, {"held out": held_out, "held out, unshared": unshared(held_out, documents), **general}),
        "other topics": (other, {**topics, **general}),
    }
    for corpus, (source, measured) in mined.items():
        for passage in (None, *arguments.passages):
            entry = measure(base, source[:: arguments.every], measured, passage)
            document = read_object(arguments.output) or {}
            document.setdefault(name, {}).setdefault(corpus, {})[rule_of(passage)] = entry
            write_json(arguments.output, {**document, "provenance": provenance()})
            print(name, corpus, rule_of(passage), entry["shorter_share"], flush=True)
    if arguments.output == OUTPUT:
        put_section(DOCS, section())


def section() -> str:
    """Return the section of docs/benchmarks.md."""
    found = {name: corpora for name, corpora in (read_object(OUTPUT) or {}).items() if name != "provenance"}
    parts = [TEXT]
    for corpus in ("all", "other topics"):
        rows = [(name, rule, entry["shorter_share"]) for name, corpora in found.items()
                for rule, entry in corpora.get(corpus, {}).items()]
        if rows:
            texts = list(rows[0][2])
            parts.append(f"Mined from {corpus}:\n")
            parts.append(f"| tokenizer | rule | {' | '.join(texts)} |\n|{'---|' * (len(texts) + 2)}")
            for name, rule, shorter in rows:
                cells = (" / ".join(f"{share:.1%}" for share in shorter[text].values()) for text in texts)
                parts.append(f"| {name} | {rule} | {' | '.join(cells)} |")
            parts[-1] += "\n"
    return "\n".join(parts).rstrip() + "\n"


def rule_of(passage: int | None) -> str:
    """Return the name of a rule."""
    return "no dedup" if passage is None else f"passages of {passage}"


def texts_of(path: Path) -> list[str]:
    """Return the texts of a corpus."""
    return [document.text for document in read_documents([str(path)])]


def unshared(texts: list[str], documents: list[Document]) -> list[str]:
    """Return those texts that share no few words in a row with the documents."""
    known = {window for document in documents for window in windows(document.text)}
    return [text for text in texts if known.isdisjoint(windows(text))]


def windows(text: str) -> Iterator[int]:
    """Hash each few words in a row."""
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1))


@contextmanager
def passages_of(passage: int | None) -> Iterator[None]:
    """Let passages be so long."""
    rule = functools.partial(find_repeats, passage=passage or PASSAGE)
    with mock.patch.object(counts, "find_repeats", rule):
        yield


def measure(base: BaseTokenizer, documents: list[Document], measured: dict[str, list[str]],
            passage: int | None) -> dict[str, Any]:
    """Mine with one rule, and measure by how much each text gets shorter."""
    began = time.process_time()
    with passages_of(passage):
        result = mine(documents, base, MineConfig(budget=max(BUDGETS), dedup=passage is not None))
    seconds = time.process_time() - began
    lengths = {name: length(base, texts) for name, texts in measured.items()}
    shorter: dict[str, dict[str, float]] = {name: {} for name in measured}
    for budget in BUDGETS:
        expanded = extend(base, result.tokens[:budget])
        for name, texts in measured.items():
            shorter[name][str(budget)] = 1 - length(expanded, texts) / lengths[name]
    return {
        "documents": result.documents, "counted_tokens": result.base_tokens, "counted_once": asdict(result.repeats),
        "texts": {name: len(texts) for name, texts in measured.items()}, "base_tokens": lengths,
        "shorter_share": shorter, "best": [token.token for token in result.tokens[:20]], "cpu_seconds": seconds,
        "in_fewer_than_5_sections": sum(token.sections < 5 for token in result.tokens),
    }


def length(tokenizer: Any, texts: list[str]) -> int:
    """Return how many tokens texts have."""
    return sum(map(len, tokenizer.encode_batch(texts)))


if __name__ == "__main__":
    main()
