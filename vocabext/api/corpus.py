"""What a caller may give as a corpus: paths, or texts that are in memory."""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext.api.voice import Voice
from vocabext.errors import UsageError

if TYPE_CHECKING:
    from vocabext.corpus import Documents

# Paths, folders, globs or hub datasets; or texts, documents or records that are in memory.
Corpus = str | Path | Iterable[Any]


def open_corpus(corpus: Corpus, text_field: str, voice: Voice) -> tuple["Documents", list[str]]:
    """Open a corpus; returns its documents, and the sources to be named in artifacts."""
    from vocabext.corpus import IN_MEMORY, documents_in_memory, read_documents

    sources = sources_of(corpus)
    if sources is not None:
        return read_documents(sources, text_field=text_field, say=voice.say), sources
    assert not isinstance(corpus, str | Path)  # that is a source
    return documents_in_memory(corpus, text_field=text_field, say=voice.say), [IN_MEMORY]


def sources_of(corpus: Corpus) -> list[str] | None:
    """Return a corpus as paths, folders, globs or hub datasets; None if it holds texts."""
    if isinstance(corpus, str | Path):
        return [str(corpus)]
    if isinstance(corpus, Mapping | Set | bytes) or not isinstance(corpus, Iterable):
        raise TypeError(f"the corpus is of type {type(corpus).__name__}; it must be a path, a list of paths, or an "
                        "iterable of texts, in order")
    if not isinstance(corpus, list | tuple):
        return None
    sources = [str(source) for source in corpus if isinstance(source, str | Path)]
    if 0 < len(sources) < len(corpus):
        raise TypeError(f"the corpus is a list with {len(sources):,} paths and {len(corpus) - len(sources):,} texts or "
                        "records; pass one kind, and a text as vocabext.Document(NAME, TEXT)")
    return sources if len(sources) == len(corpus) else None


def paths_of(corpus: Corpus) -> tuple[str, ...]:
    """Return a corpus that is not in memory.

    Raises:
        UsageError: If it is.
    """
    sources = sources_of(corpus)
    if sources is None:
        raise UsageError("expand reads a corpus several times, and this one is in memory; write it to a .jsonl file, "
                         "or call the stages one by one")
    return tuple(sources)
