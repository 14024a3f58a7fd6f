import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fuzz import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import tiny_folder
from tiny_tokenizers import FAMILIES, KINDS, TEXT, as_hf, llama3, tiny_base

from vocabext.cli import show
from vocabext.cli.main import cli
from vocabext.cli.mine import mine as command
from vocabext.corpus import Document
from vocabext.errors import CorpusError, UsageError
from vocabext.files.jsonl import write_jsonl
from vocabext.files.ranges import file_sha256
from vocabext.mine.counts import read_corpus
from vocabext.mine.repeats import Repeats, repeated_passages
from vocabext.mine.stage import CurvePoint, MineResult, _knee, _rare, mine, read_candidates, write_candidates
from vocabext.mine.usage import Usage
from vocabext.options import MineConfig
from vocabext.progress import no_progress
from vocabext.tokenizer import BaseTokenizer, extend

WORDS = " cardiac muscle of the heart, signs and symptoms; ureter theatre rates".split(" ")


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"{i}", text) for i, text in enumerate(texts)]


def corpus(seed: int = 0, count: int = 30) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["The" + " ".join(rng.choice(WORDS, 40)) + f".\n{TEXT[i % len(TEXT)]}" for i in range(count)]


def run(base: BaseTokenizer, texts: Sequence[str], **options: object) -> MineResult:
    return mine(documents(texts), base, MineConfig(**{"budget": 10, "min_count": 5, "dedup": False, **options}))  # type: ignore[arg-type]


def names(result: MineResult) -> list[str]:
    return [token.token for token in result.tokens]


# ---- what is chosen ------------------------------------------------------------------------------


def test_overlap_is_accounted_for() -> None:
    """A plain sort would take the phrase and then its words, which by then save nothing."""
    base = tiny_base("gpt2")
    texts = [" ureteral cardiopathy"] * 40 + [" symptomatic"] * 30
    result = run(base, texts, budget=2)
    assert names(result) == [" ureteral cardiopathy", " symptomatic"]
    by_worth = {text: 40 * (len(base.new_token(text).run) - 1) for text in (" ureteral", " cardiopathy")}
    assert max(by_worth.values()) > 30 * (len(base.new_token(" symptomatic").run) - 1)
    assert result.tokens[0].saved == 40 * (len(base.new_token(" ureteral cardiopathy").run) - 1)


def test_a_word_counts_where_the_phrase_does_not_hold_it() -> None:
    base = tiny_base("gpt2")
    texts = [" ureteral cardiopathy"] * 40 + [" cardiopathy"] * 10
    tokens = {token.token: token for token in run(base, texts, budget=2).tokens}
    assert tokens[" ureteral cardiopathy"].count == 40
    assert tokens[" cardiopathy"].count == 10
    assert tokens[" cardiopathy"].saved == 10 * (len(tokens[" cardiopathy"].run) - 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_what_is_predicted_is_what_is_measured(kind: str) -> None:
    # No two of these phrases overlap, so the order in which text is read plays no part.
    base = tiny_base(kind)
    texts = [" signs and symptoms. The ureteral theatre"] * 20 + [" ureteral (symptomatic) cardiopathy"] * 30
    result = run(base, texts, budget=4, words_only=True)
    assert result.base_tokens - result.expanded_tokens == result.curve[-1].saved_tokens > 0
    assert result.curve[-1].shorter_share == pytest.approx(result.shorter_share)
    assert sum(t.saved for t in result.tokens) == result.curve[-1].saved_tokens
    for token in result.tokens:
        assert token.saved == token.count * (len(token.run) - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_real_tokenizer(kind: str) -> None:
    base, texts = tiny_base(kind), corpus()
    result = run(base, texts)
    assert result.base_tokens == sum(len(base.encode(text)) for text in texts)
    new = extend(base, result.tokens)
    ids = [i for text in texts for i in new.encode(text)]
    assert result.expanded_tokens == len(ids)
    assert [token.count for token in result.tokens] == [
        ids.count(new.first_new_id + i) for i in range(len(result.tokens))]
    rare = {i for i, token in enumerate(result.tokens) if token.count < 5}
    assert rare <= set(chain.from_iterable(base.scheme.parts(result.tokens)))
    assert result.parts == len(rare)
    assert not rare or base.kind == "whole text"
    assert result.shorter_share > (0.1 if base.kind == "whole text" else 0.2)


def test_the_curve_adds_the_savings_up() -> None:
    result = run(tiny_base("llama3"), corpus(), budget=15)
    saved = [token.saved for token in result.tokens]
    assert saved[0] == max(saved)
    assert [point.budget for point in result.curve] == [10, 15]
    assert result.curve[0] == CurvePoint(10, sum(saved[:10]), sum(saved[:10]) / result.base_tokens)


def test_what_one_document_repeats_does_not_count() -> None:
    base = tiny_base("gpt2")
    common = [" the" * 4] * 400 + [" ureteral"] * 20
    assert names(run(base, [*common, " cardiopathy" * 40], budget=1, words_only=True)) == [" ureteral"]
    # The same text in many documents is worth a token.
    assert names(run(base, [*common, *[" cardiopathy"] * 40], budget=1, words_only=True)) == [" cardiopathy"]


def test_one_long_document_can_be_mined() -> None:
    texts = ["".join(text for text in corpus(count=60))]
    assert len(names(run(tiny_base("gpt2"), texts))) == 10


def test_a_phrase_that_overlaps_itself_is_counted_without_overlap() -> None:
    base = tiny_base("gpt2")
    texts = [" ha ha ha ha ha"] * 20  # each ` ha` is a token already; two of them begin at four places
    for max_units, count in ((2, 40), (4, 20), (5, 20)):
        result = run(base, texts, budget=1, max_units=max_units)
        (token,) = result.tokens
        assert (token.token, token.count) == (" ha" * max_units, count)
        assert token.saved == count * (max_units - 1) == result.base_tokens - result.expanded_tokens


def test_a_phrase_is_only_chosen_where_it_would_be_used() -> None:
    # In front of `'s` the guard refuses the phrase; counting it there would promise too much.
    base = tiny_base("gpt2")
    texts = [" heart muscle's"] * 50
    phrase = " heart muscle"
    assert names(run(base, texts, budget=1, max_units=2)) != [phrase]
    with pytest.raises(UsageError, match="only 1 tokens"):
        run(base, texts, budget=2, max_units=2)
    assert phrase in names(run(base, texts + [phrase] * 10, budget=2, max_units=2))


def test_tokens_do_not_cross_documents_or_special_tokens() -> None:
    base = tiny_base("llama3")
    result = run(base, [" ureter<s> ureteral theatre", "cardiac"] * 20, budget=3, max_units=9)
    assert sorted(names(result)) == [" ureter", " ureteral theatre", "cardiac"]
    assert result.candidates == 5  # these, and the two words of the phrase


def test_tokens_cross_lines_where_the_tokenizer_allows_it() -> None:
    # Each name twice, so that only what stands between them is frequent.
    code = [f"def x{n}(self):\n        return self.y{n}\n" for n in range(20)] * 2
    (token,) = run(tiny_base("gpt2"), code, max_units=9, budget=1).tokens
    assert token.token == "(self):\n        return self."
    assert token.count == 40
    # As in Llama 2, a line break is a byte here: no merge can make the token, so it is looked for.
    assert names(run(tiny_base("metaspace"), code, max_units=9, budget=1)) == [":\n       "]


def test_indentation_can_be_a_token() -> None:
    code = ["if cat:\n        the\n            mat\n" * 3] * 8
    assert {"\n       ", "\n           "} <= set(names(run(tiny_base("gpt2"), code, words_only=True, budget=2)))


def test_options_limit_what_is_taken() -> None:
    base, texts = tiny_base("llama3"), [" ureteral cardiopathy and symptoms"] * 12 + [" ureteral"] * 3
    assert all(" " not in name.strip() for name in names(run(base, texts, budget=2, words_only=True)))
    assert max(name.count(" ") for name in names(run(base, texts, budget=2, max_units=2))) == 2
    assert max(map(len, names(run(base, texts, budget=2, max_characters=11)))) <= 11
    assert names(run(base, texts, budget=1, min_count=13, max_units=1)) == [" ureteral"]
    limited = run(base, texts, budget=2, max_characters=11)
    assert limited.rejected[" ureteral cardiopathy and"].endswith("is longer than 11 characters")


def test_signs_can_be_tokens() -> None:
    assert names(run(tiny_base("llama3"), [" >>>"] * 20, budget=1)) == [" >>>"]


def test_line_breaks_that_are_spelled_in_bytes_can_be_tokens() -> None:
    texts = ["x.\n\ny", "z!\n\na", "é\n\nß", "1\n\n2"] * 10
    result = run(tiny_base("metaspace"), texts, budget=1, max_units=2)
    assert names(result) == ["\n\n"]
    assert result.searched == 1, "the entry of a merge would be `<0x0A><0x0A>`"


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("' a' is one token already", "it is one token already"),
        ('" it\'s" is cut differently when \'\\n\' follows', "it is cut differently when ... follows"),
        ("the normalizer turns 'a' into 'b'", "the normalizer turns ... into ..."),
        ("the expanded tokenizer produces it twice", "the expanded tokenizer produces it twice"),
    ],
)
def test_reasons_are_counted_without_the_texts_they_quote(why: str, reason: str) -> None:
    assert MineResult((), (), 1, 1, 1, 1, {"x": why, "y": why}).rejected_by_reason() == {reason: 2}


def test_candidates_that_run_out_are_no_interrupted_work(capsys: pytest.CaptureFixture[str]) -> None:
    base, config = tiny_base("gpt2"), MineConfig(budget=None, min_count=5)
    mine(documents([" ureteral cardiopathy"] * 9), base, config, show.progress)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("choosing tokens")]
    assert line.endswith("no other candidate saves anything")


def test_the_same_corpus_gives_the_same_tokens() -> None:
    base = tiny_base("metaspace")
    assert run(base, corpus()) == run(base, corpus())


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(texts=st.lists(st.lists(st.sampled_from([*WORDS, "<s>", "\n", "🙂", "", "1", "'s"]), max_size=20).map(" ".join),
                      min_size=1, max_size=8), kind=st.sampled_from(list(KINDS)))
@example(texts=["1 the 1 the  signs  cardiac signs   cardiac"], kind="crossing")  # fewer tokens, fewer of ` signs `
def test_any_corpus_gives_tokens_that_keep_the_invariant(texts: list[str], kind: str) -> None:
    base = tiny_base(kind)
    try:
        result = mine(documents(texts), base, MineConfig(budget=None, min_count=2))
    except UsageError:
        return
    new = extend(base, result.tokens)
    for text in texts:
        assert new.expansion.unmerge(new.encode(text)).tolist() == base.encode(text)
    needed = set(chain.from_iterable(base.scheme.parts(result.tokens)))
    assert all(token.count >= 2 or i in needed for i, token in enumerate(result.tokens))


# ---- tokens that are merges ----------------------------------------------------------------------


def test_a_token_is_merged_from_those_before_it() -> None:
    base = tiny_base("crossing")
    result = run(base, [" ureteral cardiopathy"] * 40 + [" symptomatic heart"] * 30, budget=25)
    assert any(token.count == 0 for token in result.tokens), "some are only there to be merged further"
    for i, parts in enumerate(base.scheme.parts(result.tokens)):
        assert all(part < i for part in parts)
    new = extend(base, result.tokens)
    assert new.backend.pre_tokenizer.__getstate__() == base.backend.pre_tokenizer.__getstate__(), "nothing is searched"
    for budget in range(1, 25):  # any number of the first ones can do without the others
        assert not base.scheme.chain().add_all(result.tokens[:budget])


def test_a_rare_token_stays_while_something_is_merged_from_it() -> None:
    base = tiny_base("metaspace")
    counted = [replace(token, count=count) for token, count in (
        (base.new_token("dm"), 0), (base.new_token("dmd"), 9), (base.new_token("mm"), 1))]
    assert _rare(counted, base, MineConfig(min_count=2)) == {
        "mm": "the expanded tokenizer produces it fewer than 2 times"}
    rarer = [counted[0], replace(counted[1], count=1), counted[2]]
    assert set(_rare(rarer, base, MineConfig(min_count=2))) == {"dm", "dmd", "mm"}


@pytest.mark.slow
def test_the_corpus_gets_as_short_as_was_counted() -> None:
    base, checked = tiny_base("metaspace"), 0
    for seed in range(20):  # many overlaps, such as `dddd` and `dmdmd`
        rng = np.random.default_rng(seed)
        texts = [" ".join("".join(rng.choice(list("dmd."), 9)) for _ in range(5)) for _ in range(30)]
        result = run(base, texts, budget=12, min_count=2)
        if result.rejected_by_reason().get("the expanded tokenizer produces it fewer than 2 times") is None:
            saved = sum(token.saved for token in result.tokens)
            assert result.base_tokens - saved == result.expanded_tokens
            checked += 1
    assert checked > 10


def test_words_without_spaces_are_mined_where_only_characters_can_be() -> None:
    backend = FAMILIES["llama2-no-prefix"].build()
    backend.add_special_tokens(["<|end|>"])  # no token may hold the last id
    base = BaseTokenizer(as_hf(backend))
    result = run(base, ["ጀጁ"] * 40, budget=2)
    assert names(result) == ["ጀ", "ጁ"]


def test_half_words_are_merged_within_words_only() -> None:
    base = tiny_base("metaspace")
    texts = [f" d{a}mb bm{b}d" for a in "abcde" for b in "fghik"] * 4
    result = run(base, texts, budget=2, min_count=30)
    # What is between the words, `mb bm`, is the most frequent run of all.
    assert not any("b b" in name for name in names(result))
    assert {"mb", " bm"} <= set(names(result))


def test_a_character_spelled_in_bytes_becomes_a_token_before_what_it_stands_in() -> None:
    base = tiny_base("metaspace")
    result = run(base, ["ऑफ the heart"] * 9 + ["ऑ"] * 9, budget=3)
    assert names(result)[0] == "ऑ"
    assert "फ" in names(result)
    assert not base.scheme.chain().add_all(result.tokens), "nothing is searched for"


def test_what_would_have_to_be_searched_for_behind_every_word_is_refused() -> None:
    result = run(tiny_base("metaspace"), [" heart\n"] * 40 + [" dm"] * 9, budget=1, max_units=2)
    assert names(result) == [" dm"]
    assert "every word would have to be looked at" in result.rejected[" heart\n"]


def test_a_corpus_whose_frequent_runs_can_be_no_token() -> None:
    with pytest.raises(UsageError, match="none of the 1 frequent sequences of this corpus can be a token that"):
        mine(documents(["      "]), tiny_base("crossing"), MineConfig(budget=None, min_count=2))


# ---- what is said again --------------------------------------------------------------------------

DISEASES = ["ureter", "theatre", "heart", "cardiac rates", "the cat", "muscle", "a card", "symptoms of heart"]


def templated(count: int = 40) -> list[str]:
    """Documents of one template that differ in its middle, and in what each adds to it."""
    rng = np.random.default_rng(1)
    return [f"The muscle of the heart and the signs of the cat on the mat in the theatre {DISEASES[i % 8]} {i} of the "
            f"ureteral cardiopathy and symptomatic cards in the theatre of the heart: {' '.join(rng.choice(WORDS, 60))}"
            for i in range(count)]


def test_a_template_that_every_document_has_is_no_vocabulary() -> None:
    base = tiny_base("gpt2")
    everything, once = (run(base, templated(), dedup=dedup, budget=30) for dedup in (False, True))
    assert any("symptomatic" in name or "cardiopathy" in name for name in names(everything))
    assert not any("symptomatic" in name or "cardiopathy" in name for name in names(once))
    assert once.repeats.passage_ids > 39 * 20
    assert once.base_tokens + once.repeats.passage_ids == everything.base_tokens
    assert everything.repeats == Repeats()


def test_a_near_duplicate_document_is_counted_once_whatever_the_order() -> None:
    base = tiny_base("gpt2")
    rng = np.random.default_rng(3)
    words = [f"{a}{b}" for a in WORDS for b in "abcdef"]
    texts = [" ".join(rng.choice(words, 300)) for _ in range(8)]
    near = [text.replace(text.split()[150], "different", 1) for text in texts for _ in range(3)]
    found = [run(base, order, dedup=True, min_count=2, budget=None) for order in (
        texts + near, near + texts, sorted(texts + near))]
    assert [result.repeats.documents for result in found] == [24, 24, 24]
    assert len({result.base_tokens + result.repeats.passage_ids for result in found}) == 1, "the same ones are kept"


def test_short_documents_count_as_often_as_they_occur() -> None:
    result = run(tiny_base("gpt2"), [" ureteral cardiopathy"] * 40, budget=1, dedup=True)
    assert (result.tokens[0].count, result.repeats) == (40, Repeats())


def test_a_long_word_that_has_the_ids_of_a_passage_is_vocabulary() -> None:
    base, word = tiny_base("gpt2"), " αβγδεζηθικλ"
    assert len(base.encode(word)) > 16
    rng = np.random.default_rng(4)
    texts = [f" {' '.join(rng.choice(WORDS, 6))}{word} {' '.join(rng.choice(WORDS, 6))}" for _ in range(30)]
    assert word in names(run(base, texts, budget=3, dedup=True))


@settings(max_examples=examples(50))
@given(documents_=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=5), width=st.integers(2, 5))
def test_an_id_is_repeated_if_its_passage_stands_further_in_front(documents_: list[list[int]], width: int) -> None:
    ids = np.asarray([i for document in documents_ for i in (*document, -1)])
    seen, expected = set(), np.zeros(len(ids), bool)
    for start in range(len(ids) - width + 1):
        passage = tuple(ids[start : start + width].tolist())
        if -1 not in passage:
            expected[start : start + width] |= passage in seen
            seen.add(passage)
    for size in (1 << 24, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vocabext.mine.repeats.MAX_SORTED", size)
            assert repeated_passages(ids, width).tolist() == expected.tolist()


def test_a_token_says_in_how_many_sections_it_occurs() -> None:
    texts = [" ureteral ureteral", *[" ureteral"] * 4, *[" the"] * 200]
    result = run(tiny_base("gpt2"), texts, budget=1, max_units=1)
    assert (result.tokens[0].count, result.tokens[0].sections) == (6, 5)


@pytest.mark.parametrize("kind", ["gpt2", "metaspace", "crossing"])
def test_counts_stay_right_when_tokens_come_and_go(kind: str) -> None:
    base, texts = tiny_base(kind), corpus(count=12)
    tokens = run(base, texts, budget=12, min_count=2).tokens
    corpus_ = read_corpus(texts, base, no_progress, dedup=False)
    usage = Usage(texts, corpus_.encoded, base, no_progress)
    for wanted in (tokens[:6], tokens[:9], tokens[:4], tokens):
        counted = usage.update(wanted)
        ids = [i for text in texts for i in extend(base, wanted).encode(text)]
        assert [t.count for t in counted] == [ids.count(base.first_new_id + i) for i in range(len(wanted))]
        assert usage.num_tokens == len(ids)


# ---- budgets -------------------------------------------------------------------------------------


def test_a_budget_larger_than_the_candidates_is_one_line_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"--budget is 5000, but only \d+ tokens that occur at least 5") as caught:
        run(tiny_base("llama3"), corpus(), budget=5000)
    (advised,) = re.findall(r"lower --budget to (\d+)", str(caught.value))
    assert len(run(tiny_base("llama3"), corpus(), budget=int(advised)).tokens) == int(advised)
    capped = mine(documents(corpus()), tiny_base("llama3"), MineConfig(budget=5000, min_count=5, dedup=False),
                  at_most=True)
    assert len(capped.tokens) == int(advised)
    # Enough candidates, but once the first are chosen the others save nothing.
    with pytest.raises(UsageError, match=r"--budget is 2, but only 1 tokens"):
        run(tiny_base("gpt2"), [" ureteral cardiopathy"] * 9, budget=2)


def test_a_corpus_without_repetition_or_without_documents() -> None:
    with pytest.raises(UsageError, match="no run of at least two tokens occurs 5 times in this corpus"):
        run(tiny_base("gpt2"), ["the", "<s>"])
    with pytest.raises(CorpusError, match="no document to mine"):
        run(tiny_base("gpt2"), [])
    with pytest.raises(UsageError, match="no run of at least two tokens"):
        run(tiny_base("crossing"), ["🙂"])


def test_auto_stops_at_the_knee() -> None:
    assert _knee([100, 90, 80, 1, 1, 1, 1, 1]) == 3
    assert _knee([5, 5]) == 2
    assert _knee([]) == 0
    base = tiny_base("gpt2")
    heavy, light = [" ureteral", " cardiopathy", " symptomatic"], [" xa", " xb", " xc", " xd", " xe", " xf", " xg"]
    texts = [text for text in heavy for _ in range(100)] + [text for text in light for _ in range(5)]
    assert set(names(run(base, texts, budget=None))) == set(heavy)


@pytest.mark.parametrize("option", ["budget", "min_count", "max_units", "max_characters"])
def test_options_out_of_range_are_named(option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is 0; it must be"):
        MineConfig(**{option: 0})


# ---- the artifact --------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds a tokenizer; mining needs nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    as_hf(llama3()).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()))
    return path


def test_candidates_survive_the_file(tmp_path: Path, model: Path) -> None:
    base = tiny_base("llama3")
    result = run(base, corpus(), max_characters=12)
    path = tmp_path / "candidates.jsonl"
    written = write_candidates(path, result, base, model=str(model), config=MineConfig(max_characters=12), corpus=["c"])
    header, tokens = read_candidates(path)
    assert tuple(tokens) == result.tokens
    assert {**written, "artifact": "candidates", "version": 1} == header
    assert header["base"] == {"model": str(model), "num_used_ids": base.first_new_id,
                              "tokenizer_sha256": file_sha256(model / "tokenizer.json")}
    assert header["options"]["max_characters"] == 12
    assert header["rejected"]["count"] == len(result.rejected) == sum(header["rejected"]["by_reason"].values())
    assert header["rejected"]["by_reason"]["it is longer than 12 characters"] > 10
    assert len(header["rejected"]["examples"]) == 10
    assert header["curve"][-1]["budget"] == 10


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ({"base": {"model": "m"}}, [{"token": "x"}], "is damaged at token 1: 'key' is missing; mine again, or mend it"),
        ({"base": "m"}, [{"token": "x", "key": "x", "run": [1, 2]}], "'base' of its first line is 'm', not an object"),
        ({"base": {"model": "m"}}, [], "holds no tokens"),
    ],
)
def test_damaged_candidates_are_one_line(tmp_path: Path, header: dict[str, object], rows: list[dict[str, object]],
                                         message: str) -> None:
    write_jsonl(tmp_path / "c.jsonl", "candidates", header, rows)
    with pytest.raises(UsageError, match=message):
        read_candidates(tmp_path / "c.jsonl")


# ---- the verb ------------------------------------------------------------------------------------


def invoke(*args: object) -> tuple[int, str, str]:
    outcome = CliRunner().invoke(cli, ["mine", *map(str, args)], prog_name="vocabext")
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


def test_the_verb_writes_the_file_and_shows_the_curve(tmp_path: Path, model: Path, corpus_file: Path) -> None:
    output = tmp_path / "candidates.jsonl"
    code, out, err = invoke(corpus_file, "--model", model, "--budget", 12, "-o", output, "--max-characters", 8)
    assert code == 0, err
    header, tokens = read_candidates(output)
    assert len(tokens) == 12
    assert re.search(r"budget +saved tokens +shorter\n", out)
    assert re.search(rf"^ +12 +{header['curve'][-1]['saved_tokens']:,} ", out, re.MULTILINE)
    assert repr(tokens[0].token) in out
    assert f"({header['base_tokens']:,} to {header['expanded_tokens']:,} tokens, measured)" in out
    assert header["rejected"]["count"] > 0
    assert f"{header['rejected']['count']} good candidates cannot be tokens" in err
    assert all(f"{count}: {why}" in err for why, count in header["rejected"]["by_reason"].items())


def test_the_verb_speaks_json(tmp_path: Path, model: Path, corpus_file: Path) -> None:
    output = tmp_path / "candidates.jsonl"
    code, out, _ = invoke(corpus_file, "--model", model, "--budget", "auto", "-o", output, "--json")
    document = json.loads(out)
    assert code == 0
    header, tokens = read_candidates(output)
    assert document["tokens"] == len(tokens) > 2
    assert document["curve"] == header["curve"]
    assert document["best"][0]["token"] == tokens[0].token
    assert header["options"]["budget"] is None


def test_what_was_counted_once_is_one_line_and_in_the_header(tmp_path: Path, model: Path) -> None:
    path, output = tmp_path / "corpus.jsonl", tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in templated()))
    plain = (path, "--model", model, "--budget", 5, "--min-count", 5, "-o", output, "--force")
    code, out, err = invoke(*plain)
    assert code == 0, err
    header, tokens = read_candidates(output)
    (line,) = [line for line in err.splitlines() if "counted once" in line]
    assert f"{header['counted_once']['passage_ids']:,} tokens of repeated passages" in line
    assert "--no-dedup" in line
    assert re.search(r"token +pieces +count +sections +saved\n", out)
    assert 0 < tokens[0].sections <= tokens[0].count
    code, _, err = invoke(*plain, "--no-dedup")
    assert code == 0
    assert "counted once" not in err
    assert read_candidates(output)[0]["counted_once"] == {"documents": 0, "passage_ids": 0}


def test_what_is_not_read_of_the_corpus_is_one_line_and_in_the_header(
    tmp_path: Path, model: Path, corpus_file: Path
) -> None:
    folder, output = tmp_path / "corpus", tmp_path / "candidates.jsonl"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(corpus_file.read_bytes())
    (folder / "b.docx").write_text("no text")
    code, _, err = invoke(folder, "--model", model, "-o", output, "--budget", "5")
    assert code == 0
    assert sum("unknown format .docx: 1" in line for line in err.splitlines()) == 1
    header, _ = read_candidates(output)
    assert header["left_out"]["unknown format .docx"]["names"] == [f"{folder}/b.docx"]


def test_wrong_use_is_one_line_and_writes_nothing(tmp_path: Path, model: Path, corpus_file: Path) -> None:
    output = tmp_path / "candidates.jsonl"
    plain = (corpus_file, "--model", model, "-o", output)
    for args, message in [
        ((tmp_path / "missing.txt", *plain[1:]), "missing.txt does not exist"),
        ((*plain, "--text-field", "body"), "has no field 'body', only 'text'; choose one with --text-field"),
        ((corpus_file, "--model", tmp_path / "missing", "-o", output), "missing does not exist"),
        ((corpus_file, "--model", tmp_path, "-o", output), "has no config.json; it is no model folder"),
        ((*plain[:-1], tmp_path), "is a folder, but a file is written here"),
        ((*plain, "--budget", "5000"), "--budget is 5000, but only"),
        ((*plain, "--budget", "many"), "'many' is neither a number nor 'auto'"),
        ((*plain, "--min-count", "1"), "--min-count is 1; it must be at least 2"),
        ((corpus_file, "--model", model, "-o", tmp_path / "no" / "c.jsonl"), "no does not exist; create it"),
    ]:
        code, out, err = invoke(*args)
        lines = [line for line in err.splitlines() if not re.match(r"[a-z ]+: [\d,]+ .* in \d", line)]
        assert code in (1, 2)
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0], lines
        assert not out
        assert not output.exists()
    output.write_text("mine")
    assert invoke(*plain, "--budget", "5")[0] == 2
    assert output.read_text() == "mine"
    assert invoke(*plain, "--budget", "5", "--force")[0] == 0
    assert len(read_candidates(output)[1]) == 5


def test_the_verb_works_on_a_whole_model_folder(tmp_path: Path, corpus_file: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    output = tmp_path / "candidates.jsonl"
    assert invoke(corpus_file, "--model", folder, "--budget", "5", "-o", output)[0] == 0
    assert read_candidates(output)[0]["base"]["num_used_ids"] == 290


def test_help_names_every_option() -> None:
    out = CliRunner().invoke(command, ["--help"]).output
    for option in ("--budget", "--min-count", "--max-units", "--max-characters", "--words-only", "--no-dedup",
                   "--json"):
        assert option in out


# ---- a real corpus -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.assets
def test_a_real_tokenizer_and_corpus(assets: Path) -> None:
    from vocabext.corpus import read_documents
    from vocabext.tokenizer import load_tokenizer

    sources = assets / "corpora" / "medquad.heldout.jsonl.gz"
    base = load_tokenizer(assets / "models" / "biomed-13m")
    texts = [d for i, d in enumerate(read_documents([str(sources)])) if i % 4 == 0]
    result = mine(texts, base, MineConfig(budget=200, min_count=5))
    assert len(result.tokens) == 200
    assert result.shorter_share > 0.1
    assert result.shorter_share == pytest.approx(result.curve[-1].shorter_share, abs=0.03)
    new = extend(base, result.tokens)
    for document in texts[:50]:
        assert new.expansion.unmerge(new.encode(document.text)).tolist() == base.encode(document.text)
