"""General English from Debian packages, plus the mining side of the Python documents.

A language model needs text whose licence lets us use it and which anybody can fetch again.
Debian carries such text as ordinary packages:

* ``dict-gcide``, a dictionary of English (1913 Webster with later additions): full sentences,
  quotations, old and new words;
* ``dict-wn``, WordNet: short modern definitions with example sentences;
* ``dict-foldoc``, a dictionary of computing;
* ``postgresql-doc-15``, a manual: long technical prose.

Each package is unpacked with ``dpkg-deb -x``; the archives are never installed.  The dictionary
files are gzip-compatible, the manual is HTML.  Cleaning is deliberately simple: remove what no
person would say aloud (pronunciations, source marks, cross-reference braces), re-join lines that
were wrapped for an 80-column screen, and drop repeated text.

One document in four keeps its printed line layout, so that the tokenizer and the model know
indentation and line breaks; real language models do.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import python_docs

DOCUMENT_CHARS = 3_000
"""Dictionary entries are joined, and manual pages cut, to documents of about this length."""

HELDOUT_PER_MILLE = 10
"""How many general documents of a thousand are held out."""


class DataError(Exception):
    """A problem the user can act on; the message is one line."""


@dataclass(frozen=True)
class Source:
    """One Debian package of text.

    Attributes:
        package: Its Debian name.
        licence: Its licence, as its copyright file states it.
        reader: Reads the unpacked tree into documents.
        tokenizer: Whether the tokenizer is trained on it too.
    """

    package: str
    licence: str
    reader: Callable[[Path], list[str]]
    tokenizer: bool


@dataclass(frozen=True)
class Fetched:
    """A source with its version and documents.

    Attributes:
        source: Where the documents come from.
        version: The package's Debian version.
        train: Documents to train on.
        heldout: Documents to evaluate on.
    """

    source: Source
    version: str
    train: list[str]
    heldout: list[str]


# --- Packages -------------------------------------------------------------------------------


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a program and return its output.

    Args:
        command: Program and arguments.
        cwd: Folder to run in.

    Returns:
        What it wrote to standard output.

    Raises:
        DataError: When it is missing or fails.
    """
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise DataError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DataError(f"{' '.join(command)} failed: {reason[0]}") from error


def find_package(package: str, folder: Path) -> Path:
    """Find a package's archive in a folder, or download it there.

    Args:
        package: Debian package name.
        folder: Where archives are kept.

    Returns:
        The archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        run(["apt-get", "download", package], cwd=folder)
        found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise DataError(f"no archive of {package} in {folder}")
    return found[-1]


def fetch(source: Source, deb_dir: Path, work_dir: Path) -> Fetched:
    """Unpack a source and read its documents.

    Args:
        source: What to fetch.
        deb_dir: Where archives are kept.
        work_dir: Where they are unpacked.

    Returns:
        The documents, split by a hash of their text.
    """
    archive = find_package(source.package, deb_dir)
    tree = work_dir / source.package
    tree.mkdir(parents=True, exist_ok=True)
    run(["dpkg-deb", "-x", str(archive), str(tree)])
    version = run(["dpkg-deb", "-f", str(archive), "Version"]).strip()
    documents = list(dict.fromkeys(source.reader(tree)))
    train = [text for text in documents if not is_heldout(text)]
    heldout = [text for text in documents if is_heldout(text)]
    return Fetched(source, version, train, heldout)


def text_hash(text: str) -> int:
    """Hash a text to an integer that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_heldout(text: str) -> bool:
    """Say whether a general document is held out."""
    return text_hash(text) % 1000 < HELDOUT_PER_MILLE


# --- Dictionaries ---------------------------------------------------------------------------


def read_entries(tree: Path) -> Iterator[list[str]]:
    """Yield the entries of the one dictionary in an unpacked package.

    An entry starts at an unindented line that does not follow another one: headwords are
    unindented, definitions are indented.

    Args:
        tree: The unpacked package.

    Yields:
        The lines of each entry, the database's own description (``00-...``) left out.
    """
    [path] = tree.rglob("*.dict.dz")
    entry: list[str] = []
    previous_is_head = False
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in file:
            line = line.rstrip().expandtabs()
            is_head = bool(line) and not line.startswith(" ")
            if is_head and not previous_is_head and entry:
                if not entry[0].startswith("00-"):
                    yield entry
                entry = []
            if line or entry:
                entry.append(line)
            previous_is_head = is_head
    if entry:
        yield entry


def unwrap(lines: list[str]) -> str:
    """Join the lines of each paragraph; a blank line or a number ends a paragraph.

    Args:
        lines: Lines wrapped for a narrow screen.

    Returns:
        One line per paragraph.
    """
    paragraphs: list[str] = []
    fresh = True
    for line in lines:
        text = line.strip()
        if not text:
            fresh = True
        elif fresh or re.match(r"(?:\d+\.|\([a-z]\)|--) ", text):
            paragraphs.append(text)
            fresh = False
        else:
            paragraphs[-1] += f" {text}"
    return "\n".join(paragraphs)


def keeps_layout(number: int) -> bool:
    """Say whether an entry keeps its printed lines: one run of 64 in four does."""
    return number // 64 % 4 == 3


def read_gcide(tree: Path) -> list[str]:
    """Read the 1913 Webster, without pronunciations, source marks and WordNet's own entries."""
    entries = []
    for number, lines in enumerate(read_entries(tree)):
        text = "\n".join(lines)
        if "[WordNet" in text:
            continue  # dict-wn has them
        text = re.sub(r" *\\[^\\\n]*\\", "", text)  # Bathe \Bathe\
        text = re.sub(r" ?\((?=[^()]*[\[\"'`*])[^()\s]*(?: [^()\s]*)?\)", "", text, count=1)
        text = re.sub(r"\n *\[(?:1913 Webster|PJC|Webster[^\]]*)[^\]]*\]", "", text)
        text = re.sub(r" *\[(?:1913 Webster|PJC)[^\]]*\]", "", text)
        text = re.sub(r"\s*\[(?=[^\[\]]*\.)[^\[\]]*\]", "", text)  # [OE. trusten.], [Obs.]
        text = text.replace("{", "").replace("}", "")
        lines = re.sub(r"\n{3,}", "\n\n", text).strip("\n").split("\n")
        entries.append("\n".join(lines) if keeps_layout(number) else unwrap(lines))
    return python_docs.pack(entries, DOCUMENT_CHARS)


def read_wordnet(tree: Path) -> list[str]:
    """Read WordNet, every definition once (it repeats under each of its synonyms)."""
    seen: set[str] = set()
    entries = []
    for number, lines in enumerate(read_entries(tree)):
        senses: list[str] = []
        for line in lines[1:]:
            starts = re.match(r" +(?:(?:n|v|adj|adv) )?\d+: ", line)
            if starts or not senses:
                senses.append(line.strip())
            else:
                senses[-1] += ("\n         " if keeps_layout(number) else " ") + line.strip()
        kept = []
        for sense in senses:
            sense = re.sub(r"\s*\[(?:syn|ant|also):[^\]]*\]", "", sense)
            sense = sense.replace("{", "").replace("}", "")
            key = " ".join(re.sub(r"^(?:(?:n|v|adj|adv) )?\d+: ", "", sense).split())
            if key not in seen:
                seen.add(key)
                kept.append(sense)
        if kept:
            margin = "    " if keeps_layout(number) else ""
            entries.append("\n".join([lines[0], *(margin + sense for sense in kept)]))
    return python_docs.pack(entries, DOCUMENT_CHARS)


def read_foldoc(tree: Path) -> list[str]:
    """Read the dictionary of computing."""
    entries = []
    for number, lines in enumerate(read_entries(tree)):
        text = "\n".join(lines).replace("{", "").replace("}", "")
        text = re.sub(r"\n *\(\d{4}-\d\d-\d\d\)", "", text)
        lines = text.strip("\n").split("\n")
        entries.append("\n".join(lines) if keeps_layout(number) else unwrap(lines))
    return python_docs.pack(entries, DOCUMENT_CHARS)


# --- Manuals --------------------------------------------------------------------------------


class PageText(HTMLParser):
    """Collects the readable text of one HTML page of a manual."""

    BLOCKS = frozenset("p div h1 h2 h3 h4 h5 li dt dd tr pre table ul ol dl br".split())
    SKIPPED_TAGS = frozenset({"head", "script", "style"})
    SKIPPED_CLASSES = frozenset({"navheader", "navfooter", "toc"})

    def __init__(self) -> None:
        """Start with an empty page."""
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.pre = 0
        self.skipping: list[str] = []  # the open tags inside a skipped element

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        classes = set((dict(attrs).get("class") or "").split())
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.append(tag)
        elif tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES:
            self.skipping.append(tag)
        else:
            self.pre += tag == "pre"
            self.parts.append("\n\n" if tag in self.BLOCKS else " " if tag == "td" else "")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.pop()
        else:
            self.pre -= tag == "pre" and self.pre > 0
            self.parts.append("\n\n" if tag in self.BLOCKS else "")

    def handle_data(self, data: str) -> None:
        """Take text, with its white space only inside ``pre``."""
        if not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """Return the page's text."""
        text = re.sub(r" *\n *\n\s*\n|\n\n +(?=\S)", "\n\n", "".join(self.parts))
        return re.sub(r"\n\n (?=\S)", "\n\n", text.replace("\xa0", " ")).strip()


def read_manual(tree: Path) -> list[str]:
    """Read an HTML manual page by page."""
    documents = []
    for path in sorted(tree.rglob("*.html")):
        if path.stem not in {"bookindex", "biblio", "index"}:
            page = PageText()
            page.feed(path.read_text(encoding="utf-8", errors="replace"))
            documents.extend(python_docs.pack([page.text()], DOCUMENT_CHARS))
    return documents


SOURCES = (
    Source("dict-gcide", "GPL-2+", read_gcide, tokenizer=True),
    Source("dict-wn", "WordNet 3.0 licence", read_wordnet, tokenizer=True),
    Source("dict-foldoc", "GFDL 1.1+", read_foldoc, tokenizer=False),
    Source("postgresql-doc-15", "PostgreSQL licence", read_manual, tokenizer=False),
)


def fetch_all(deb_dir: Path, work_dir: Path) -> list[Fetched]:
    """Fetch every source.

    Args:
        deb_dir: Where archives are kept or downloaded to.
        work_dir: Where they are unpacked.

    Returns:
        The sources with their documents, in the order of ``SOURCES``.
    """
    return [fetch(source, deb_dir, work_dir) for source in SOURCES]


def shuffled(documents: list[str], seed: int) -> list[str]:
    """Return the documents in a random order that depends only on the seed."""
    result = list(documents)
    random.Random(seed).shuffle(result)
    return result
