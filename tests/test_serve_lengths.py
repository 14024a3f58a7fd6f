import json
from pathlib import Path

import numpy as np
import pytest
import torch
from base_folders import CASES, base_folder, tekken
from tiny_checkpoints import TEXT, tiny_folder

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.corpus import Document
from vocabext.errors import CorpusError, TokenizerError
from vocabext.patch.stage import patch
from vocabext.serve import lengths, model
from vocabext.serve.model import load_encoder
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import Expansion, NewToken

WORDS = (" muscle", " heart", " rates")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base and its expansion by up to three words, one of which no text here contains."""
    base = tiny_folder(tmp_path_factory.mktemp("models") / "base", num_ids=262)
    tokenizer = load_tokenizer(base)
    tokens = [tokenizer.new_token(word) for word in (" muscle", " heart", " zebra")]
    rows_path = base.parent / "rows.safetensors"
    save_rows(rows_path, tokens, Rows(torch.zeros(len(tokens), 64)), {"method": "mean"})
    expanded = base.parent / "expanded"
    patch(rows_path, str(base), expanded)
    return base, expanded


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*TEXT, "größe 42 \U0001f600")))
    return str(path)


def test_counts_agree_with_the_tokenizers(folders: tuple[Path, Path], corpus: str) -> None:
    base, expanded = map(load_tokenizer, map(str, folders))
    texts = [*TEXT, "größe 42 \U0001f600"]
    found = lengths.measure_lengths(str(folders[0]), str(folders[1]), [corpus])
    assert found["documents"] == 5
    assert found["characters"] == sum(map(len, texts))
    assert found["base_tokens"] == sum(len(base.encode(t)) for t in texts)
    assert found["expanded_tokens"] == sum(len(expanded.encode(t)) for t in texts)
    assert found["saved_share"] == 1 - found["expanded_tokens"] / found["base_tokens"] > 0
    low, high = found["saved_share_interval"]
    assert low <= found["saved_share"] <= high
    assert found["invariant"] == {"documents": 5, "differing": 0, "first": ""}
    assert sum(found["saved_share_histogram"]["documents"]) == 5
    assert (found["documents_longer"], found["saved_share_percentiles"]["0"]) == (0, 0.0)


def test_what_is_not_read_of_a_corpus_is_said_and_recorded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, text in {"a.txt": "the heart", "b.md": "# heart", "c.csv": "id,text\n1,the muscle\n2,\n"}.items():
        (tmp_path / name).write_text(text)
    said: list[str] = []
    found = lengths.measure_lengths(str(folders[0]), str(folders[1]), [str(tmp_path)], say=said.append)
    assert found["documents"] == 2
    assert found["left_out"] == {"unknown format .md": {"count": 1, "names": [f"{tmp_path}/b.md"]},
                                 "empty record": {"count": 1, "names": [f"{tmp_path}/c.csv:3"]}}
    assert [line.partition(":")[0] for line in said] == ["not read of the corpus",
                                                         "passed over in the corpus of 2 documents"]


def test_tokens_that_earn_and_tokens_that_never_fire(folders: tuple[Path, Path], corpus: str) -> None:
    new = lengths.measure_lengths(str(folders[0]), str(folders[1]), [corpus])["new_tokens"]
    assert (new["total"], new["used"], new["never_used"]) == (3, 2, [" zebra"])
    by_token = {row["token"]: row for row in new["most_saving"]}
    assert by_token[" heart"]["count"] == 3
    for row in by_token.values():
        assert row["saved_tokens"] == row["count"] * (row["base_tokens"] - 1)
    saved = [row["saved_tokens"] for row in new["most_saving"]]
    assert saved == sorted(saved, reverse=True)
    assert 0 < new["share_of_characters"] < 1


def test_passages_are_the_text_cut_in_tokens(folders: tuple[Path, Path], corpus: str) -> None:
    passages = lengths.measure_lengths(str(folders[0]), str(folders[1]), [corpus])["passages"]
    assert passages
    for passage in passages:
        before, after = ("".join(text for text, _ in passage[f"{role}_pieces"]) for role in ("base", "expanded"))
        assert before == after
        assert not any(new for _, new in passage["base_pieces"])
        assert all((text in WORDS) == new for text, new in passage["expanded_pieces"])


def test_a_model_against_itself_saves_nothing(folders: tuple[Path, Path], corpus: str) -> None:
    found = lengths.measure_lengths(str(folders[0]), str(folders[0]), [corpus])
    assert found["saved_share"] == 0
    assert found["documents_not_shorter"] == 5
    assert found["new_tokens"]["total"] == 0


def test_a_tokenizer_that_breaks_the_invariant_is_found(folders: tuple[Path, Path]) -> None:
    base, expanded = map(load_encoder, folders)
    tokenizer = load_tokenizer(folders[0])
    wrong = [NewToken(w, w, (5, 6)) for w in (" muscle", " heart", " zebra")]  # runs of another tokenizer
    tally = lengths.Tally(np.zeros(3, np.int64))
    batch = [Document("a", "the rest"), Document("b", "the heart")]
    for _, *rows in lengths.encode_ahead([batch], base, expanded):
        lengths.count_batch(tally, batch, *rows, Expansion(wrong, tokenizer.first_new_id))
    assert (tally.num_differing, tally.first_differing) == (1, "b")


def test_a_corpus_of_empty_lines_is_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(CorpusError):
        lengths.measure_lengths(str(folders[0]), str(folders[1]), [str(path)])


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerError, match="has no tokenizer that transformers can load"):
        load_encoder(tmp_path)


@pytest.mark.slow
def test_a_folder_with_both_of_mistrals_tokenizers_is_counted_as_it_is_mined(tmp_path: Path, corpus: str) -> None:
    pytest.importorskip("mistral_common")
    folder = base_folder(tmp_path / "both", CASES["tekken json"], **{"tekken.json": tekken()})
    mined = load_tokenizer(folder)
    encoder = load_encoder(folder)
    assert [encoder.encode(text) for text in TEXT] == [mined.encode(text) for text in TEXT]
    assert lengths.measure_lengths(str(folder), str(folder), [corpus])["saved_share"] == 0


def test_one_place_loads_the_tokenizers_of_all_packages() -> None:
    root = Path(lengths.__file__).resolve().parents[1]
    loaders = ("AutoTokenizer.from_pretrained", "Tokenizer.from_pretrained", "Tokenizer.from_file", "get_tokenizer(")
    found = {str(path.relative_to(root)) for package in ("vocabext", "serve") for path in (root / package).rglob("*.py")
             if any(loader in line.partition("#")[0] and "`" not in line
                    for line in path.read_text().splitlines() for loader in loaders)}
    assert found == {"vocabext/tokenizer/loading.py"}


def test_a_shown_token_never_cuts_a_character(folders: tuple[Path, Path]) -> None:
    encoder = load_encoder(folders[0])
    text = "größe \U0001f600 heart"
    parts = encoder.cut(text)
    assert "".join(part for part, _ in parts) == text
    assert "\U0001f600" in [part.strip() for part, _ in parts]  # four bytes, four tokens, one part


@pytest.mark.parametrize(("config", "expected"), [
    ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 2 * 2 * 64 * 2),
    ({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "hidden_size": 64},
     2 * 2 * 32 * 2),
    ({"n_layer": 3, "n_head": 2, "n_embd": 8}, 2 * 3 * 8 * 2),
    ({"text_config": {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}}, 2 * 8 * 2),
    ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "kv_lora_rank": 16}, None),
    ({}, None),
])
def test_the_cache_of_a_token_follows_from_the_config(config: dict[str, object], expected: int | None) -> None:
    assert model.cache_bytes_per_token(config) == expected


def test_cache_and_context_follow_from_the_lengths(folders: tuple[Path, Path], corpus: str) -> None:
    found = lengths.measure_lengths(str(folders[0]), str(folders[1]), [corpus])
    cache = found["cache"]
    saved = (found["base_tokens"] - found["expanded_tokens"]) / 5
    assert cache["saved_bytes_per_document"] == pytest.approx(cache["bytes_per_token"] * saved)
    assert cache["expanded_context_characters"] > cache["base_context_characters"]
