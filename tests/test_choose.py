"""`choose`: tokens are chosen by what they save and what they cost; `run` mines more, and ships the best."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import tiny_folder
from tiny_expanded import DOCUMENTS, new_tokens
from tiny_run import tiny_run, write_corpus

import vocabext
from vocabext.checkpoint.folder import Rows, save_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.choose import cost
from vocabext.choose.selection import Selection
from vocabext.choose.stage import ChosenSet, choose
from vocabext.choose.text import KeptText
from vocabext.cli.choose import choose as command
from vocabext.corpus import Document
from vocabext.errors import CorpusError, OutputExistsError, UsageError
from vocabext.files.ranges import file_sha256
from vocabext.mine.stage import read_candidates
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.options import ChooseConfig
from vocabext.progress import no_progress
from vocabext.run import RunConfig, StageOutcome, is_held_out, is_kept_for_choice, run
from vocabext.tokenizer import BaseTokenizer, load_tokenizer
from vocabext.tokens import Expansion, Ids, NewToken

TEXTS = [" muscle of", " the heart", " are rated", " of the"]
CONFIG = ChooseConfig(choice_bytes=2_000, context=48, device="cpu", dtype="float32")


class Case:
    """A tiny model, some candidates, and rows: the mean of pieces, but nonsense for one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base: BaseTokenizer = load_tokenizer(folder)
        self.model: FrozenModel = load_model(folder, device="cpu", dtype="float32")
        self.tokens: list[NewToken] = new_tokens(folder, TEXTS)
        self.rows_ND = mean_rows(self.model.embedding_VD, self.tokens)
        generator = torch.Generator().manual_seed(0)
        self.rows_ND[1] = torch.randn(self.rows_ND.shape[1], generator=generator) * 0.5  # " the heart"

    def choose(self, *, budget: int, held_out: bool = True, **options: Any) -> ChosenSet:
        return choose(self.tokens, self.rows_ND, self.model, self.base, DOCUMENTS[:2], DOCUMENTS[2:] * held_out,
                      replace(CONFIG, **options), budget=budget)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny_folder(tmp_path_factory.mktemp("base")))


def names(choice: ChosenSet) -> list[str]:
    return [token.token for token in choice.tokens]


def test_a_token_with_a_bad_row_is_left_out_and_the_reason_is_said(case: Case) -> None:
    choice = case.choose(budget=2)
    assert " the heart" not in names(choice)
    rows = {row["token"]: row for row in choice.document["tokens"]}
    bad = rows[" the heart"]
    assert bad["kept"] is False
    assert bad["why"] == "it costs more than it saves"
    assert bad["loss_nats_per_use"] > 2 * rows[" of the"]["loss_nats_per_use"]
    assert all(row["why"] is None for row in rows.values() if row["kept"])


def test_what_a_use_costs_is_the_divergence_at_it_and_behind_it(case: Case) -> None:
    """Computed once more without branches: the whole text with one token merged, and the base's."""
    text = KeptText(DOCUMENTS[:1], case.base, context=40, max_bytes=100)
    expansion, rows = text.encode(case.tokens)
    span, stem = next(iter(text.stems(expansion, rows, text.spans[:1])))
    base_ids, at = text.base_ids(span), np.flatnonzero(expansion.is_new(stem))
    found = cost.cost_of_uses(case.model, base_ids, stem, at, expansion, case.rows_ND)
    first, edges = case.base.first_new_id, expansion.edges(stem)
    for i, use in enumerate(at):
        merged = np.concatenate((base_ids[: edges[use]], stem[use : use + 1], base_ids[edges[use + 1] :]))
        logs = [case.model.log_probabilities(case.model.hidden(case.model.embed(
            torch.from_numpy(ids.copy())[None], case.rows_ND, first))[0], first_new_id=first)
            for ids in (base_ids, merged)]
        base, student = logs[0][edges[use + 1] - 1 :][:9], logs[1][edges[use] :][:9]
        expected = (base.exp() * (base - student)).sum(1)
        assert torch.allclose(torch.from_numpy(found[i][: len(expected)]).float(), expected, atol=1e-4)
        assert not found[i][len(expected) :].any()


def test_the_loss_of_a_text_is_that_of_every_piece_read_after_merged_text(case: Case) -> None:
    text = KeptText(DOCUMENTS[:1], case.base, context=40, max_bytes=100)
    expansion, rows = text.encode(case.tokens)
    expected = 0.0
    for span, stem in text.stems(expansion, rows, text.sample):
        pieces, edges = text.base_ids(span), expansion.edges(stem)
        assert np.array_equal(expansion.unmerge(stem), pieces)
        for at in range(1, len(pieces)):  # one forward pass for each piece
            owner = int(np.searchsorted(edges, at, side="right")) - 1
            context = np.concatenate((stem[:owner], pieces[edges[owner] : at]))
            hidden = case.model.hidden(case.model.embed(torch.from_numpy(context)[None], case.rows_ND,
                                                        case.base.first_new_id))[0, -1:]
            logs = case.model.log_probabilities(hidden, first_new_id=case.base.first_new_id)
            expected -= float(logs[0, pieces[at]])
    assert cost.merged_nats(case.model, text, expansion, rows, case.rows_ND) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def planted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use of a token loses what is planted: a random model finds text by chance more likely, too."""
    def nats(model: FrozenModel, text: KeptText, expansion: Expansion, rows: list[Ids], input_ND: torch.Tensor
             ) -> float:
        uses = sum(expansion.counts(stem) for _, stem in text.stems(expansion, rows, text.sample))
        per_use = [5.0 if token.token == " the heart" else 1.0 for token in expansion.tokens]
        return cost.base_nats(model, text, expansion.first_new_id, no_progress) + float(uses @ np.asarray(per_use))

    monkeypatch.setattr("vocabext.choose.stage.merged_nats", nats)


@pytest.mark.usefixtures("planted")
def test_the_bound_holds_and_more_is_saved_where_more_may_be_lost(case: Case) -> None:
    free = case.choose(budget=4, max_loss=100.0).document
    assert free["chosen"] == free["by_savings"]
    assert free["chosen"]["tokens"] == 4
    bound = free["chosen"]["loss_bits_per_byte"] / 2
    tight = case.choose(budget=4, max_loss=bound).document
    assert 0 < tight["chosen"]["loss_bits_per_byte"] <= bound
    assert 0 < tight["chosen"]["saved_share"] < free["chosen"]["saved_share"]


@pytest.mark.usefixtures("planted")
def test_a_bound_that_no_token_keeps_is_one_clear_line(case: Case) -> None:
    with pytest.raises(UsageError, match=r"--max-loss is 1e-09 bits per byte, but no set of tokens"):
        case.choose(budget=4, max_loss=1e-9)


def test_fewer_candidates_than_the_budget_are_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="--budget is 9, but there are rows of 4 candidates only"):
        case.choose(budget=9)


def test_the_curve_has_both_rules_and_is_measured_on_other_documents(case: Case) -> None:
    points = case.choose(budget=4).document["frontier"]
    assert {point["rule"] for point in points} == {"savings", "cost"}
    assert sum(point["chosen"] for point in points) == 1
    assert case.choose(budget=4, held_out=False).document["frontier"] == []
    most = max(point["saved_share"] for point in points)
    alone = case.base.encode(DOCUMENTS[2].text)
    merged = KeptText(DOCUMENTS[2:], case.base, context=48, max_bytes=1).encode(case.tokens)[1]
    assert most == pytest.approx(1 - len(merged[0]) / len(alone))


def test_tokens_are_counted_again_with_what_was_chosen(case: Case) -> None:
    """Without " muscle of", the text has " of the" more often."""
    text = KeptText(DOCUMENTS[:2], case.base, context=48, max_bytes=2_000)
    flat = cost.Costs(np.ones(4, np.int64), np.full(4, 0.1), np.ones(9))
    selection = Selection(case.base, case.tokens, text, flat)
    alone = selection.count(np.asarray([3]))
    assert alone.uses[0] > selection.together.uses[3]
    assert selection.by_cost(4, 0.0).saved == selection.together.saved


# -- run ----------------------------------------------------------------------------------------------------------

CHOOSING = ["mine", "collect, trial", "distill, trial", "choose", "collect", "distill", "patch", "verify", "eval"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run that mines twice the budget, on documents of which some are kept for the choice."""
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 300)
    texts = [Document(str(i), f"{DOCUMENTS[i % 2].text} {i}") for i in range(60)]
    assert any(map(is_kept_for_choice, texts))
    tiny = tiny_run(tmp_path)
    return replace(tiny, corpus=(str(write_corpus(tmp_path / "many.jsonl", texts)),), choose=replace(
        CONFIG, candidates=2.0))


def states(outcomes: list[StageOutcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


@pytest.mark.slow
def test_run_ships_the_best_of_more_candidates_and_is_up_to_date_afterwards(config: RunConfig) -> None:
    said: list[str] = []
    assert states(run(config, say=said.append)) == dict.fromkeys(CHOOSING, "made")
    work = config.output.with_name("new-work")
    choice = json.loads((work / "choice.json").read_text())
    kept = [row["token"] for row in choice["tokens"] if row["kept"]]
    assert choice["candidates"] == 10
    assert len(kept) == choice["chosen"]["tokens"] == 5
    shipped = json.loads((config.output / "vocabext.json").read_text())["tokens"]
    assert {token["token"] for token in shipped} <= set(kept)
    assert sum(line.startswith("chosen: 5 of 10 candidates") for line in said) == 1
    assert states(run(config)) == dict.fromkeys(CHOOSING, "up to date")
    bounded = replace(config, choose=replace(config.choose, max_loss=50.0), force=True)
    expected = {**dict.fromkeys(CHOOSING, "made"), **dict.fromkeys(CHOOSING[:3], "up to date")}
    assert states(run(bounded)) == expected


@pytest.mark.slow
def test_what_is_chosen_on_is_neither_mined_nor_held_out(config: RunConfig) -> None:
    run(replace(config, heldout=(), distill=replace(config.distill, method="mean")))
    texts = [Document("", json.loads(line)["text"]) for line in Path(config.corpus[0]).read_text().splitlines()]
    kept = sum(map(is_kept_for_choice, texts))
    assert not any(is_kept_for_choice(text) and is_held_out(text) for text in texts)
    header, _ = read_candidates(config.output.with_name("new-work") / "candidates.jsonl")
    assert header["documents"] == len(texts) - kept - sum(map(is_held_out, texts))


@pytest.mark.slow
def test_an_interrupted_choice_goes_on_where_it_stopped(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vocabext.choose.stage.measure_costs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (config.output.with_name("new-work") / "chosen.jsonl").exists()
    assert states(run(config)) == {**dict.fromkeys(CHOOSING, "made"), **dict.fromkeys(CHOOSING[:3], "up to date")}


def test_without_the_options_run_has_the_stages_that_it_had(config: RunConfig) -> None:
    from vocabext.run import _Pipeline

    plain, work = replace(config, choose=ChooseConfig()), config.output.with_name("work")
    stages = _Pipeline(plain, work, no_progress, lambda _: None).stages()
    assert [stage.name for stage in stages] == [name for name in CHOOSING if "trial" not in name and name != "choose"]


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"budget": None}, UsageError, "--budget is 'auto', but --candidates chooses among more tokens"),
    ({"corpus": True}, CorpusError, "the corpus is too small for --candidates: one document in 20 is kept"),
])
def test_what_choose_would_refuse_is_refused_before_mining(
    config: RunConfig, change: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    if "budget" in change:
        config = replace(config, mine=replace(config.mine, **change))
    else:
        small = [d for i in range(40) if not is_kept_for_choice(d := Document("", f"{DOCUMENTS[0].text} {i}"))][:2]
        config = replace(config, corpus=(str(write_corpus(tmp_path / "small.jsonl", small)),))
    with pytest.raises(error, match=words):
        run(config)
    assert not config.output.with_name("new-work").exists()


@pytest.mark.parametrize(("option", "words"), [
    ({"max_loss": 0.0}, "--max-loss is 0.0; it must be a number of bits per byte above 0"),
    ({"max_loss": float("nan")}, "--max-loss is nan"),
    ({"candidates": 1.0}, "--candidates is 1.0; it must be a number above 1"),
    ({"choice_bytes": 0}, "--choice-bytes is 0"),
])
def test_options_out_of_range_are_one_clear_line(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ChooseConfig(**option)


# -- the verb and the Python API ----------------------------------------------------------------------------------

@pytest.fixture
def rows(case: Case, tmp_path: Path) -> Path:
    header = {"method": "distill", "options": {}, "left_out": [{"token": " rest", "left_out": "error 9 is above 5"}],
              "base": {"model": str(case.folder), "num_used_ids": case.base.first_new_id,
                       "tokenizer_sha256": file_sha256(case.folder / "tokenizer.json")}}
    save_rows(tmp_path / "rows.safetensors", case.tokens, Rows(case.rows_ND), header)
    write_corpus(tmp_path / "kept.jsonl", DOCUMENTS[:2])
    write_corpus(tmp_path / "heldout.jsonl", DOCUMENTS[2:])
    return tmp_path / "rows.safetensors"


def test_the_verb_writes_candidates_and_the_choice_beside_them(rows: Path, case: Case) -> None:
    arguments = [str(rows), "--model", str(case.folder), "--corpus", str(rows.parent / "kept.jsonl"), "--heldout",
                 str(rows.parent / "heldout.jsonl"), "--budget", "2", "--dtype", "float32", "--choice-bytes", "2000",
                 "-o", str(rows.parent / "chosen.jsonl")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "by savings alone" in result.stdout
    assert "it costs more than it saves" in result.stdout
    _, tokens = read_candidates(rows.parent / "chosen.jsonl")
    choice = json.loads((rows.parent / "choice.json").read_text())
    assert [token.token for token in tokens] == [row["token"] for row in choice["tokens"] if row["kept"]]
    assert choice["tokens"][-1]["why"] == "error 9 is above 5"  # it was mined, and the model cannot represent it
    again = CliRunner().invoke(command, arguments)
    assert isinstance(again.exception, vocabext.VocabextError)


def test_python_chooses_and_collects_what_was_chosen(rows: Path, case: Case) -> None:
    base = vocabext.load(case.folder)
    chosen = base.choose(rows, DOCUMENTS[:2].__iter__(), budget=2, choice_bytes=2_000, dtype="float32")
    assert " the heart" not in [token.token for token in chosen]
    assert chosen.to_json()["frontier"] == []
    snippets = base.collect(chosen, iter(DOCUMENTS[:2]), snippets=4, min_snippets=2, window=24)
    assert len(snippets) == len(chosen)
    assert "lose" in str(chosen)


def test_chosen_tokens_come_back_from_their_two_files(tmp_path: Path) -> None:
    header = {"base": {"model": "m"}, "options": {"seed": 0}}
    document = {"candidates": 2, "chosen": {"saved_share": 0.1, "loss_bits_per_byte": 0.01}, "tokens": []}
    chosen = vocabext.ChosenTokens([NewToken(" the heart", "Ġthe heart", (1, 2))], header, document)
    chosen.save(tmp_path / "chosen.jsonl")
    again = vocabext.ChosenTokens.load(tmp_path / "chosen.jsonl")
    assert (list(again), again.header, again.document) == (list(chosen), header, document)
    with pytest.raises(OutputExistsError, match=r"choice\.json exists already"):
        chosen.save(tmp_path / "other.jsonl")
    (tmp_path / "choice.json").unlink()
    with pytest.raises(UsageError, match=r"choice\.json is missing or damaged.*with TokenTable\.load"):
        vocabext.ChosenTokens.load(tmp_path / "chosen.jsonl")
    assert list(vocabext.TokenTable.load(tmp_path / "chosen.jsonl")) == list(chosen)
