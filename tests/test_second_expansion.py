"""A base with new tokens of ours: a folder is refused; of a tokenizer the invariant holds, or `extend` refuses."""

import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hard_texts import ALL_WANTED, FRAGMENTS, possible
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens, patched
from tiny_tokenizers import FAMILIES, every_family, every_family_of_chunks, every_merging_family, family_base

from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.cli.inspect import inspect
from vocabext.cli.main import cli
from vocabext.errors import TokenizerError
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer
from vocabext.tokens import NewToken

WAY_OUT = "a model cannot be expanded twice yet: {} was expanded from {} already; expand {} again with the longer list"
# What meets at the edges: tokens of the first round begin, end, or go on inside those of the second.
FIRST = [" of the", " the heart", " signs and", "心脏", " blood and", *ALL_WANTED[::2]]
SECOND = [" door of", " and the", " the blood", " it is", " of the heart", " of the old", "血液和", " heart of",
          " the old house", " signs and symptoms of", *ALL_WANTED[1::2]]
PARTS = [*FRAGMENTS, *FIRST, *SECOND, *8 * [" of", " the", " door", " and", " heart", " of the", " signs"]]


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twice")
    return patched(tiny_folder(folder / "base"), folder)


@pytest.mark.parametrize("verb", ["mine", "collect", "distill", "patch", "run"])
def test_a_second_expansion_is_refused_at_once_with_the_way_out(verb: str, expanded: Path, tmp_path: Path) -> None:
    base, out = expanded.parent / "base", str(tmp_path / "out")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(document.text for document in DOCUMENTS))
    candidates = tmp_path / "candidates.jsonl"
    assert CliRunner().invoke(cli, ["mine", str(corpus), "--model", str(base), "--budget", "2", "--min-count", "4",
                                    "--no-dedup",
                                    "-o", str(candidates)]).exit_code == 0
    model = ["--model", str(expanded), "-o", out]
    arguments = {
        "mine": [str(corpus), *model], "collect": [str(candidates), "--corpus", str(corpus), *model],
        "distill": [str(candidates), *model, "--method", "mean"],
        "patch": [str(expanded.parent / "rows.safetensors"), *model], "run": [str(corpus), *model]}[verb]
    shown = CliRunner().invoke(cli, [verb, *arguments])
    assert shown.exit_code == 2
    assert WAY_OUT.format(expanded, base, base) in shown.output
    assert f"vocabext revert {expanded} -o FOLDER" in shown.output
    assert not Path(out).exists()
    assert not (tmp_path / "out-work" / "candidates.jsonl").exists()


def test_inspect_says_that_a_second_expansion_is_refused(expanded: Path) -> None:
    shown = CliRunner().invoke(inspect, [str(expanded)]).output
    assert f"none: {expanded} was expanded from {expanded.parent / 'base'} already; expand" in shown
    assert "yes: 3 new tokens over" in shown


def test_an_expanded_folder_without_its_manifest_is_refused_by_what_restores_its_base(
    expanded: Path, tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(expanded, tmp_path / "expanded"))
    (folder / "vocabext.json").unlink()
    (tmp_path / "corpus.txt").write_text("the heart")
    shown = CliRunner().invoke(cli, ["mine", str(tmp_path / "corpus.txt"), "--model", str(folder), "-o",
                                     str(tmp_path / "out")])
    assert "was expanded already: it holds vocabext_base/, but its vocabext.json is gone" in shown.output
    assert "vocabext_base/" in CliRunner().invoke(inspect, [str(folder)]).output


def test_where_every_trace_is_gone_phrases_are_refused_that_would_cut_the_earlier_ones(
    expanded: Path, tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(expanded, tmp_path / "expanded"))
    (folder / "vocabext.json").unlink()
    shutil.rmtree(folder / "vocabext_base")
    shown = CliRunner().invoke(inspect, [str(folder)]).output
    assert "splitting that lists phrases, such as" in shown
    assert "words can be added, phrases not" in shown
    base = load_tokenizer(folder)
    with pytest.raises(TokenizerError, match=r"' rest of' is a phrase, and .* was extended by vocabext already"):
        base.new_token(" rest of")
    tokens = [*new_tokens(folder, [" heartless"]), NewToken(" rest of", "Ġrestġof", (1, 2))]
    save_rows(tmp_path / "rows", tokens, Rows(torch.ones(2, 64)), {})
    shown = CliRunner().invoke(cli, ["patch", str(tmp_path / "rows"), "--model", str(folder), "-o",
                                     str(tmp_path / "out")])
    assert "is a phrase, and this tokenizer was extended by vocabext already" in shown.output


# -- tokenizers ---------------------------------------------------------------------------------------------------

@cache
def extended_base(name: str, *, phrases: bool = True) -> BaseTokenizer:
    """The tokenizer of a family with new tokens of ours, taken for a base."""
    base = family_base(name)
    tokens = [token for token in possible(base, FIRST) if phrases or " " not in token.token[1:]]
    if base.scheme.only_merges:  # one that is searched for makes a tokenizer of another kind, which is refused
        searched = base.scheme.searched(tokens)
        tokens = [token for token in tokens if token not in searched]
    assert tokens
    return BaseTokenizer(FAMILIES[name].as_hf(extend(base, tokens).backend))


def texts(seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(2, 7))) for _ in range(count)]


@pytest.mark.parametrize("phrases", [True, False], ids=["words and phrases before", "words before"])
@every_family
def test_the_invariant_holds_on_a_base_that_has_new_tokens_of_ours(name: str, phrases: bool) -> None:
    base = extended_base(name, phrases=phrases)
    tokens = possible(base, SECOND)
    assert tokens
    new = extend(base, tokens)
    found, wanted = new.encode_batch(texts(1)), base.encode_batch(texts(1))
    assert sum(new.expansion.is_new(ids).sum() for ids in found) > 50
    for text, ids, base_ids in zip(texts(1), found, wanted, strict=True):
        assert new.expansion.unmerge(ids).tolist() == base_ids, text
        assert new.decode(ids) == base.decode(base_ids), text


@every_family_of_chunks
def test_a_phrase_that_would_cut_an_earlier_phrase_is_refused(name: str) -> None:
    """` door of` in front of ` the` would be taken out of ` door of the`, where the base has ` of the`."""
    base = extended_base(name)
    with pytest.raises(TokenizerError, match=r"' door of' is a phrase, and .*(was extended by vocabext|cannot take)"):
        base.new_token(" door of")
    token = family_base(name).new_token(" door of") if _can(name, " door of") else NewToken(" door of", "x", (1, 2))
    with pytest.raises(TokenizerError, match="' door of' is a phrase"):
        extend(base, [token])


def _can(name: str, text: str) -> bool:
    try:
        family_base(name).new_token(text)
    except TokenizerError:
        return False
    return True


@pytest.mark.parametrize("phrase", ["---\n", "mg/dL", " of the", " 37.5 °C", " signs and symptoms"])
def test_a_single_earlier_phrase_of_any_sort_is_seen(phrase: str) -> None:
    one = extend(family_base("gpt2"), [family_base("gpt2").new_token(phrase)])
    base = BaseTokenizer(FAMILIES["gpt2"].as_hf(one.backend))
    with pytest.raises(TokenizerError, match="was extended by vocabext already"):
        base.new_token(" door of")
    base.scheme.extended_before = False  # as if somebody had hidden the marks of our extension
    with pytest.raises(TokenizerError, match="lists phrases already"):
        base.new_token(" door of")


@every_merging_family
def test_a_base_that_searches_for_earlier_tokens_is_refused(name: str) -> None:
    base = family_base(name)
    wanted = possible(base, ["\n\n\n\n\n", " heart\nand", "a\n", "e\n"])
    searched = base.scheme.searched(wanted)
    if not searched:
        pytest.skip("this family has no token that is searched for")
    with pytest.raises(TokenizerError, match="this tokenizer was extended by vocabext already"):
        BaseTokenizer(FAMILIES[name].as_hf(extend(base, searched).backend))
