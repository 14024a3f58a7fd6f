"""Which texts of a corpus `verify` encodes, and how it says so."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planted import detail, draw_fewer_texts
from tiny_expanded import expanded_pair

from vocabext.cli.verify import verify as command
from vocabext.corpus import Document
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer
from vocabext.verify import sample
from vocabext.verify.sample import Reading, batches, texts_of
from vocabext.verify.stage import verify

CORPUS = "invariant on the corpus"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return expanded_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_fewer_texts(monkeypatch)


def numbered(count: int) -> list[Document]:
    """Documents of eight bytes each."""
    return [Document(str(i), f"doc {i:04}") for i in range(count)]


def drawn(documents: Iterable[Document], limit: int | None, seed: int = 0) -> tuple[list[str], Reading]:
    reading = Reading()
    return list(texts_of(documents, reading, limit=limit, seed=seed)), reading


def test_each_document_is_encoded_once_with_each_tokenizer(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[tuple[type, str]] = Counter()

    def counting(encode: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, texts: Any) -> Any:
            counts.update((type(self), text) for text in ([texts] if isinstance(texts, str) else texts))
            return encode(self, texts)

        return counted

    for kind in (BaseTokenizer, ExpandedTokenizer):
        for name in ("encode", "encode_batch"):
            monkeypatch.setattr(kind, name, counting(getattr(kind, name)))
    assert verify(pair[1], str(pair[0]), numbered(20), load_weights=False).passed
    for kind in (BaseTokenizer, ExpandedTokenizer):
        assert [counts[kind, document.text] for document in numbered(20)] == [1] * 20


@pytest.mark.slow
def test_of_a_large_corpus_a_sample_is_encoded_and_full_takes_all(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vocabext.verify.stage.SAMPLE_BYTES", 100)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in numbered(50)))
    arguments = [str(pair[1]), "--against", str(pair[0]), "--corpus", str(corpus), "--skip-weights"]
    done = CliRunner().invoke(command, arguments)
    assert "a sample, 12 of 50 documents, 96 of 400 bytes (--full takes all)" in " ".join(done.stdout.split())
    assert json.loads((pair[1] / "verify.json").read_text())["corpus"] == {
        "documents": 50, "bytes": 400, "encoded_documents": 12, "encoded_bytes": 96}
    done = CliRunner().invoke(command, [*arguments, "--full"])
    assert "50 documents, 400 bytes, " in " ".join(done.stdout.split())
    assert json.loads((pair[1] / "verify.json").read_text())["corpus"]["encoded_documents"] == 50


def test_a_corpus_within_the_limit_is_encoded_whole(pair: tuple[Path, Path]) -> None:
    result = verify(pair[1], str(pair[0]), numbered(5), load_weights=False)
    assert detail(result, CORPUS).startswith("5 documents, 40 bytes, ")
    assert verify(pair[1], str(pair[0]), load_weights=False).corpus is None


def test_the_same_seed_draws_the_same_sample_in_the_order_of_the_corpus() -> None:
    texts, _ = drawn(numbered(1_000), 800)
    assert len(texts) == 100
    assert texts == sorted(texts)
    assert texts == drawn(numbered(1_000), 800)[0]
    assert texts != drawn(numbered(1_000), 800, seed=1)[0]
    assert any(text > "doc 0900" for text in texts)  # not only the beginning


def test_memory_holds_no_more_than_the_sample() -> None:
    corpus = (Document(str(i), f"{i:05}" * 2_000) for i in range(300))  # 3 MB
    tracemalloc.start()
    try:
        texts, reading = drawn(corpus, 100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(texts), reading.bytes) == (10, 3_000_000)
    assert peak < 500_000


def test_a_long_document_is_encoded_in_parts_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PART_CHARACTERS", 10)
    texts, reading = drawn([Document("a", "é" * 25), Document("b", "b" * 5)], None)
    assert texts == ["é" * 10, "é" * 10, "é" * 5, "b" * 5]
    assert reading == Reading(2, 55, 2, 55)


def test_a_batch_holds_no_more_text_than_one_long_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PART_CHARACTERS", 10)
    assert list(batches(["a" * 4, "b" * 4, "c" * 4, "d" * 10, "e", "f", "g"], 2)) == [
        ["a" * 4, "b" * 4], ["c" * 4], ["d" * 10], ["e", "f"], ["g"]]
    assert list(batches([], 2)) == []
