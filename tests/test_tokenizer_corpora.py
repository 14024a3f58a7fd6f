"""Real tokenizers, extended by what is mined from real text, on that text. benchmarks/ has the full size."""

import sysconfig
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from real_assets import ASSETS

from vocabext.corpus import Document, read_documents
from vocabext.errors import TokenizerError
from vocabext.mine.stage import mine
from vocabext.options import MineConfig
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, extend, load_tokenizer
from vocabext.tokens import Expansion

# Whatever is there: nothing below knows their names.
TOKENIZERS = sorted((ASSETS / "tokenizers").glob("*"))
CORPORA = sorted((ASSETS / "corpora").glob("*.jsonl*"))
NUM_TOKENS = 2000
# Text to mine, and text to check, of each corpus: all of it takes many minutes.
MINING_CHARACTERS, CHECKED_CHARACTERS = 120_000, 300_000


def spread(documents: Sequence[Document], characters: int) -> list[str]:
    """About so many characters, in documents from all over the corpus."""
    step = max(1, round(sum(len(d.text) for d in documents) / characters))
    return [document.text for document in documents[::step]]


def real_texts() -> dict[str, list[Document]]:
    """The corpora, and Python's standard library for code with its indentation."""
    corpora = {path.name: list(read_documents([str(path)])) for path in CORPORA}
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    corpora["standard library"] = [Document(p.name, p.read_text(encoding="utf-8")) for p in sources]
    return corpora


@pytest.fixture(scope="module")
def corpora(assets: Path) -> dict[str, list[Document]]:
    return real_texts()


@pytest.fixture(scope="module")
def load(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], BaseTokenizer]:
    def load_one(path: Path) -> BaseTokenizer:
        if path.is_file():
            folder = tmp_path_factory.mktemp("tokenizer")
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
            path = next(folder.rglob("tokenizer_config.json")).parent
        return load_tokenizer(path)

    return load_one


def broken_promises(base: BaseTokenizer, new: ExpandedTokenizer, texts: Sequence[str], before: Sequence[list[int]],
                    after: Sequence[list[int]]) -> list[str]:
    """Say for each text what the extension broke, given its ids under both tokenizers."""
    found = []
    for text, old_ids, new_ids in zip(texts, before, after, strict=True):
        if new.expansion.unmerge(new_ids).tolist() != old_ids:
            found.append(f"other base ids: {text[:80]!r}")
        if new.decode(new_ids) != base.decode(old_ids):
            found.append(f"other decoded text: {text[:80]!r}")
        if len(new_ids) > len(old_ids):
            found.append(f"longer: {text[:80]!r}")
    return found


@pytest.mark.assets
@pytest.mark.fuzz
@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.name.split(".")[0])
def test_mined_tokens_change_nothing_else(path: Path, corpora: dict[str, list[Document]],
                                          load: Callable[[Path], BaseTokenizer]) -> None:
    try:
        base = load(path)
    except TokenizerError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        # One of a kind that cannot be extended: the refusal says what it is and what there could be.
        assert "supported are" in refusal
        pytest.skip(f"refused: {refusal}")
    mining = [Document("", text) for documents in corpora.values() for text in spread(documents, MINING_CHARACTERS)]
    new = extend(base, mine(mining, base, MineConfig(budget=NUM_TOKENS, min_count=3)).tokens)
    for name, documents in corpora.items():
        texts = spread(documents, CHECKED_CHARACTERS)
        before, after = base.encode_batch(texts), new.encode_batch(texts)
        assert broken_promises(base, new, texts, before, after) == [], name
        assert sum(map(len, after)) < 0.95 * sum(map(len, before)), name


@pytest.mark.slow
@pytest.mark.assets
def test_a_broken_promise_is_found(load: Callable[[Path], BaseTokenizer]) -> None:
    """The check above can fail: give two tokens each other's ids."""
    for path in TOKENIZERS:
        try:
            base = load(path)
            tokens = [base.new_token(text) for text in (" signs and symptoms", " dermatomyositis")]
        except TokenizerError:
            continue
        new = extend(base, tokens)
        texts = [" signs and symptoms of dermatomyositis", "nothing new here"]
        before, after = base.encode_batch(texts), new.encode_batch(texts)
        assert broken_promises(base, new, texts, before, after) == []
        swapped = ExpandedTokenizer(new.backend, new.hf, Expansion(tokens[::-1], base.first_new_id))
        assert broken_promises(base, swapped, texts, before, after) == [f"other base ids: {texts[0]!r}"]
        assert broken_promises(base, new, texts, before, [after[0], [*before[1], *before[1]]]) == [
            f"{what}: {texts[1]!r}" for what in ("other base ids", "other decoded text", "longer")]
        return
    pytest.skip("no tokenizer there can be extended")
