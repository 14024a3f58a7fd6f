import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import tiny_folder
from tiny_tokenizers import KINDS, SPECIAL, TEXT, tiny_base

from vocabext.cli.main import cli
from vocabext.collect import (
    add_generated,
    collect,
    generate_missing,
    read_snippets,
    short_of_snippets,
    write_snippets,
)
from vocabext.corpus import Document
from vocabext.errors import TokenizerError, UsageError
from vocabext.files.jsonl import write_jsonl
from vocabext.mine.stage import mine, write_candidates
from vocabext.model.frozen import load_model
from vocabext.options import CollectConfig, MineConfig
from vocabext.tokenizer import BaseTokenizer, extend, load_tokenizer
from vocabext.tokens import NewToken, TokenSnippets

WORDS = [" cardiac", " ureter", " ureteral", " signs and symptoms", " the heart", " a", ",", " rates", ".\n"]


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"{i}", text) for i, text in enumerate(texts)]


def tokens_of(base: BaseTokenizer, *texts: str) -> list[NewToken]:
    return [base.new_token(text) for text in texts]


def run(base: BaseTokenizer, texts: Sequence[str], tokens: Sequence[NewToken], **options: int) -> list[TokenSnippets]:
    return collect(documents(texts), base, tokens, CollectConfig(**{"min_snippets": 1, **options}))


# ---- which places --------------------------------------------------------------------------------


@settings(max_examples=examples(60))
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=60).map("".join), max_size=6),
       window=st.integers(8, 40), seed=st.integers(0, 99), kind=st.sampled_from(["gpt2", "llama3", "metaspace"]))
def test_every_snippet_is_a_window_with_its_token(texts: list[str], window: int, seed: int, kind: str) -> None:
    base = tiny_base(kind)
    tokens = tokens_of(base, " cardiac", " ureter", " signs and symptoms")
    records = run(base, texts, tokens, window=window, snippets=5, seed=seed)
    new = extend(base, tokens)
    encoded = [tuple(new.encode(text)) for text in texts]
    everything = [i for ids in encoded for i in ids]
    longest = max(len(token.run) for token in tokens)
    assert [record.new_token for record in records] == tokens
    for token_id, record in enumerate(records, new.first_new_id):
        assert record.occurrences == everything.count(token_id)
        pairs = set(zip(record.snippets, record.positions, strict=True))
        assert len(record.snippets) == len(record.positions) == len(pairs)
        assert (len(record.snippets) == 0) == (record.occurrences == 0)
        assert len(record.snippets) <= min(5, record.occurrences)
        for snippet, position in zip(record.snippets, record.positions, strict=True):
            assert snippet[position] == token_id
            assert any(snippet == ids[at : at + len(snippet)] for ids in encoded for at in range(len(ids)))
            # The token is always whole, even where that takes the window beyond its length.
            assert len(new.expansion.unmerge(snippet)) <= max(window, int(0.4 * window) + 2 * longest)
            assert len(new.expansion.unmerge(snippet[:position])) <= 0.4 * window + longest


def test_a_word_inside_a_longer_word_is_no_occurrence() -> None:
    base = tiny_base("gpt2")
    tokens = tokens_of(base, " ureter")
    ureter, ureteral = base.new_token(" ureter").run, base.new_token(" ureteral").run
    assert ureteral[: len(ureter)] == ureter  # a search for the ids would find it
    (record,) = run(base, [" the ureteral the ureters the ureter the ureteral"] * 3, tokens)
    assert record.occurrences == 3
    assert all(base.decode(extend(base, tokens).expansion.unmerge(s).tolist()).count(" ureter ") == 1
               for s in record.snippets)


def test_a_part_that_never_stands_alone_is_seen_inside_what_is_merged_from_it() -> None:
    base = tiny_base("metaspace")
    tokens = tokens_of(base, "dm", "dmd", "dmdb")
    texts = [f" the {word} of a.dmdb{end}" for word in ("heart", "rate", "cat", "card") for end in (" a", " the", ".")]
    part, middle, whole = run(base, texts, tokens, window=40, snippets=20, min_snippets=2)
    new = extend(base, tokens)
    assert [record.occurrences for record in (part, middle, whole)] == [0, 0, 12]
    assert [record.num_inside for record in (part, middle, whole)] == [len(part.snippets), len(middle.snippets), 0]
    first = new.first_new_id
    for record, token_id, rest in ((part, first, "db"), (middle, first + 1, "b")):
        assert 8 <= len(record.snippets) == len(record.positions) <= 12  # one window of equal ones is kept
        for snippet, position in zip(record.snippets, record.positions, strict=True):
            assert snippet[position] == token_id
            assert new.backend.decode(snippet[position + 1 : position + 1 + len(rest)]) == rest
            read = str(new.expansion.unmerge(snippet).tolist())[1:-1]
            assert any(read in str(base.encode(text)) for text in texts), "the base reads what is there"


def test_a_part_with_enough_places_of_its_own_stays_with_them() -> None:
    base = tiny_base("metaspace")
    tokens = tokens_of(base, "dm", "dmd")
    texts = [f" {word}.dm {word}.dmd" for word in ("heart", "rate", "cat")]
    for least, inside in ((3, 0), (4, 3)):
        part, _ = run(base, texts, tokens, window=8, snippets=9, min_snippets=least)
        assert (part.occurrences, part.num_inside, len(part.snippets)) == (3, inside, 3 + inside)
    # Who occurred often when it was mined needs none either, whatever this corpus has.
    part, _ = run(base, texts, [replace(tokens[0], count=9), tokens[1]], window=8, snippets=9, min_snippets=4)
    assert part.num_inside == 0


def test_places_inside_longer_tokens_are_a_sample_of_all_of_them() -> None:
    base = tiny_base("metaspace")
    tokens = tokens_of(base, "dm", "dmd")
    texts = [f" {'the ' * (i % 5)}.dmd{' a' * (i // 5)}" for i in range(40)]
    seen = {ids for seed in range(30) for ids in run(base, texts, tokens, snippets=4, seed=seed)[0].snippets}
    assert len(seen) > 30


def test_windows_do_not_always_begin_at_the_same_place() -> None:
    base = tiny_base("gpt2")
    text = " a the" * 60 + " cardiac" + " of the" * 60
    (record,) = run(base, [text] * 40, tokens_of(base, " cardiac"), window=30, snippets=40)
    assert min(record.positions) <= 2
    assert 10 <= max(record.positions) <= 12
    assert len(set(record.positions)) > 6


def test_the_same_window_is_kept_once() -> None:
    base = tiny_base("gpt2")
    (record,) = run(base, [" cardiac"] * 50, tokens_of(base, " cardiac"))
    assert record.occurrences == 50
    assert len(record.snippets) == 1


def test_the_sample_is_uniform_over_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("gpt2")
    tokens = tokens_of(base, " cardiac")
    new = extend(base, tokens)
    monkeypatch.setattr("vocabext.collect.extend", lambda *_: new)
    texts = [f" cardiac {i}" for i in range(60)]
    document = {tuple(new.encode(text)): i for i, text in enumerate(texts)}
    seeds, size = 150, 6
    drawn = Counter(document[snippet] for seed in range(seeds)
                    for snippet in run(base, texts, tokens, snippets=size, seed=seed)[0].snippets)
    expected = seeds * size / len(texts)  # 15 for each of the 60 documents
    assert sum(drawn.values()) == seeds * size
    chi_square = sum((drawn[i] - expected) ** 2 / expected for i in range(len(texts)))
    assert chi_square < 100  # 59 degrees of freedom: above 100 once in a thousand
    assert sum(drawn[i] for i in range(size)) < 3 * size * expected  # not just the first ones


def test_the_seed_decides() -> None:
    base = tiny_base("llama3")
    tokens, texts = tokens_of(base, " cardiac"), [f"{i} cardiac {TEXT[0]}" for i in range(80)]
    assert run(base, texts, tokens, seed=1) == run(base, texts, tokens, seed=1)
    assert run(base, texts, tokens, seed=1) != run(base, texts, tokens, seed=2)


def test_batches_do_not_change_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama3")
    tokens, texts = tokens_of(base, " cardiac"), [f"{i} cardiac {TEXT[0]}" for i in range(80)]
    expected = run(base, texts, tokens)
    monkeypatch.setattr("vocabext.collect.BATCH", 7)
    assert run(base, texts, tokens) == expected


def test_tokens_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(TokenizerError, match="made for another tokenizer"):
        run(tiny_base("crossing"), ["a"], tokens_of(tiny_base("metaspace"), " cardiac"))


def test_tokens_with_too_few_snippets_are_listed() -> None:
    records = [TokenSnippets(NewToken(str(n), str(n), (1, 2)), tuple((n, i) for i in range(n))) for n in (8, 7, 0, 20)]
    assert short_of_snippets(records, CollectConfig(min_snippets=8)) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snippets": 1}, "--snippets is 1; it must be at least 2"),
        ({"window": 7}, "--window is 7; it must be at least 8"),
        ({"min_snippets": 26}, r"--min-snippets is 26; it must lie between 1 and --snippets \(25\)"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CollectConfig(**options)


# ---- text that the model writes ------------------------------------------------------------------


class Parrot:
    """A writer that continues every prompt with the same text, and remembers what it was asked."""

    max_positions = 64

    def __init__(self, base: BaseTokenizer, text: str, *, vary: bool = True) -> None:
        self.base, self.text, self.vary = base, text, vary
        self.prompts: list[list[int]] = []
        self.calls: list[tuple[int, int, int]] = []

    def write(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, temperature: float, seed: int,
              first_new_id: int) -> list[list[int]]:
        assert len({len(prompt) for prompt in prompts}) == 1
        assert first_new_id == self.base.first_new_id
        self.prompts += [list(prompt) for prompt in prompts]
        self.calls.append((len(prompts), num_tokens, seed))
        return [self.base.encode(f"{self.text}{i if self.vary else ''}")[:num_tokens] for i, _ in enumerate(prompts)]


CONFIG = CollectConfig(snippets=4, min_snippets=3, window=20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["ureteral", " cardiac", " signs and symptoms", "cardiac"])
def test_what_is_written_really_holds_the_token(kind: str, text: str) -> None:
    base = tiny_base(kind)
    tokens = tokens_of(base, text)
    parrot = Parrot(base, " of the")
    (record,) = generate_missing([TokenSnippets(tokens[0])], parrot, base, CONFIG)
    if kind != "crossing":  # there, the token and what follows may merge into something else
        assert record.snippets
    new = extend(base, tokens)
    for snippet, position in zip(record.snippets, record.positions, strict=True):
        assert snippet[position] == new.first_new_id
    assert record.num_generated == len(record.snippets) <= CONFIG.snippets
    assert record.occurrences == 0
    assert all(prompt == [*base.prefix_ids, *tokens[0].run] for prompt in parrot.prompts)
    assert CONFIG.snippets <= len(parrot.prompts) <= 2 * CONFIG.snippets


def test_only_what_is_missing_is_written() -> None:
    base = tiny_base("llama3")
    tokens = tokens_of(base, " cardiac", " ureter", " ureteral")
    texts = ["1 cardiac", "2 cardiac", "3 cardiac", "4 cardiac", "x ureter"]
    records = collect(documents(texts), base, tokens, CONFIG)
    parrot = Parrot(base, " of the")
    full, topped_up, written = generate_missing(records, parrot, base, CONFIG)
    assert full == records[0]
    assert topped_up.snippets[0] == records[1].snippets[0]
    assert (len(topped_up.snippets), topped_up.num_generated, topped_up.occurrences) == (4, 3, 1)
    assert (len(written.snippets), written.num_generated, written.occurrences) == (4, 4, 0)
    asked = Counter(tuple(prompt) for prompt in parrot.prompts)
    assert asked == {(base.added["<s>"], *tokens[1].run): 3, (base.added["<s>"], *tokens[2].run): 4}


def test_what_is_still_missing_is_tried_once_more() -> None:
    base = tiny_base("gpt2")
    token = tokens_of(base, " ureter")[0]
    parrot = Parrot(base, "al", vary=False)  # it always makes `ureteral` of it
    assert generate_missing([TokenSnippets(token)], parrot, base, CONFIG) == [TokenSnippets(token)]
    assert [count for count, _, _ in parrot.calls] == [4, 4]
    assert parrot.calls[0] != parrot.calls[1]


def test_generated_text_ends_at_a_special_token() -> None:
    base = tiny_base("gpt2")
    token = tokens_of(base, " cardiac")[0]
    (record,) = generate_missing([TokenSnippets(token)], Parrot(base, f" of{SPECIAL[1]} the", vary=False), base, CONFIG)
    assert record.num_generated == len(record.snippets) == 1
    assert extend(base, [token]).decode(record.snippets[0]) == " cardiac of"


def test_what_is_there_already_is_not_added_again() -> None:
    base = tiny_base("gpt2")
    tokens = tokens_of(base, " cardiac")
    records = run(base, [" cardiac of"], tokens)
    (record,) = add_generated(records, {0: [" cardiac of", " cardiac the"]}, extend(base, tokens), CONFIG)
    assert len(record.snippets) == len(set(record.snippets)) == 2
    assert record.num_generated == 1


def test_text_without_the_token_adds_nothing() -> None:
    base = tiny_base("gpt2")
    tokens = tokens_of(base, " ureter")
    (record,) = add_generated([TokenSnippets(tokens[0])], {0: [" ureteral", "the"]}, extend(base, tokens), CONFIG)
    assert record == TokenSnippets(tokens[0])


def test_seeds_differ_between_calls_and_agree_between_runs() -> None:
    base = tiny_base("gpt2")
    records = [TokenSnippets(token) for token in tokens_of(base, " cardiac", " ureter", " ureteral")]
    config = CollectConfig(snippets=25, window=20)
    calls = []
    for seed in (3, 3, 4):
        parrot = Parrot(base, " of")
        generate_missing(records, parrot, base, CollectConfig(**{**vars(config), "seed": seed}))
        calls.append(parrot.calls)
    assert calls[0] == calls[1]
    assert len({seed for _, _, seed in calls[0]}) == len(calls[0]) >= 2
    assert calls[0] != calls[2]


def test_a_prompt_leaves_room_in_the_model() -> None:
    base = tiny_base("gpt2")
    token = tokens_of(base, " cardiac")[0]
    for room, expected in [(1000, 20), (len(token.run) + 3, 3)]:
        parrot = Parrot(base, " of the heart of the heart")
        parrot.max_positions = room
        generate_missing([TokenSnippets(token)], parrot, base, CONFIG)
        assert {num_tokens for _, num_tokens, _ in parrot.calls} == {expected}
    parrot.max_positions, parrot.calls = len(token.run), []
    assert generate_missing([TokenSnippets(token)], parrot, base, CONFIG) == [TokenSnippets(token)]
    assert parrot.calls == []


# ---- the artifact and the verb -------------------------------------------------------------------


def test_snippets_survive_the_file(tmp_path: Path) -> None:
    base = tiny_base("llama3")
    records = run(base, ["1 cardiac", "2 cardiac", "a ureter"], tokens_of(base, " cardiac", " ureter"))
    path = tmp_path / "snippets.jsonl"
    config = CollectConfig(min_snippets=2)
    write_snippets(path, records, {"base": {"model": "m"}, "options": {"budget": 2}}, config=config, corpus=["c"])
    header, found = read_snippets(path)
    assert found == records
    assert header["base"] == {"model": "m"}
    assert header["options"] == {"budget": 2, **vars(config)}
    assert (header["snippets"], header["generated"], header["short"]) == (3, 0, [" ureter"])
    write_jsonl(path, "snippets", {}, [{"token": "x"}])
    with pytest.raises(UsageError, match=r"is damaged at token 1: 'key' is missing; run vocabext collect again"):
        read_snippets(path)


def invoke(*args: object) -> tuple[int, str, str]:
    outcome = CliRunner().invoke(cli, ["collect", *map(str, args)], prog_name="vocabext")
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome.exit_code, outcome.stdout, outcome.stderr


class Mined:
    """A tiny model, a corpus, and what was mined from it."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_folder(folder / "base")
        self.corpus, self.candidates = folder / "corpus.jsonl", folder / "candidates.jsonl"
        self.output = folder / "snippets.jsonl"
        texts = [f"{i} cardiology is the heart, {i} myocarditis" for i in range(30)]
        self.corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        base, config = load_tokenizer(self.model), MineConfig(dedup=False, budget=3, words_only=True)
        result = mine(documents(texts), base, config)
        write_candidates(self.candidates, result, base, model=str(self.model), config=config, corpus=["c"])
        self.names = [token.token for token in result.tokens]


@pytest.fixture
def mined(tmp_path: Path) -> Mined:
    return Mined(tmp_path)


def test_the_verb_writes_snippets_for_the_model_that_was_mined(mined: Mined) -> None:
    code, out, err = invoke(mined.candidates, "--corpus", mined.corpus, "-o", mined.output, "--snippets", 12)
    assert code == 0, err
    header, records = read_snippets(mined.output)
    assert [record.new_token.token for record in records] == mined.names
    assert [len(record.snippets) for record in records] == [12, 12, 12]
    assert header["base"]["model"] == str(mined.model)
    assert (header["options"]["budget"], header["options"]["snippets"]) == (3, 12)
    assert re.search(r"snippets +36\n", out)
    assert "fewer than" not in err


def test_the_verb_names_tokens_that_are_short(mined: Mined, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("myocarditis is myocarditis")
    code, out, err = invoke(mined.candidates, "--corpus", other, "-o", mined.output, "--model", mined.model, "--json")
    assert code == 0
    short = json.loads(out)["short"]
    assert sorted(short) == sorted(mined.names)
    (line,) = (line for line in err.splitlines() if "fewer than" in line)
    assert line.startswith("3 tokens have fewer than 8 snippets: ")
    assert line.endswith("give more text, or pass --generate-missing")
    assert all(repr(token) in line for token in mined.names)
    assert read_snippets(mined.output)[0]["short"] == short


def test_the_verb_lets_the_model_write(mined: Mined, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("nothing of it")
    args = (mined.candidates, "--corpus", other, "-o", mined.output, "--snippets", 3, "--min-snippets", 2)
    code, out, err = invoke(*args, "--window", 12, "--generate-missing", "--json")
    assert code == 0, err
    _, records = read_snippets(mined.output)
    base = load_tokenizer(mined.model)
    new = extend(base, [record.new_token for record in records])
    assert json.loads(out)["generated"] == sum(record.num_generated for record in records) >= 6
    for token_id, record in enumerate(records, new.first_new_id):
        assert record.occurrences == 0
        for snippet, position in zip(record.snippets, record.positions, strict=True):
            assert snippet[position] == token_id
            assert len(new.expansion.unmerge(snippet)) <= 12 + len(record.new_token.run)
    again = generate_missing([TokenSnippets(r.new_token) for r in records], load_model(mined.model), base,
                             CollectConfig(snippets=3, min_snippets=2, window=12))
    assert again == records


def test_wrong_use_is_one_line_and_writes_nothing(mined: Mined, tmp_path: Path) -> None:
    plain = (mined.candidates, "--corpus", mined.corpus, "-o", mined.output)
    for args, message in [
        ((tmp_path / "missing.jsonl", *plain[1:]), "missing.jsonl does not exist or is not a file"),
        ((mined.corpus, *plain[1:]), "holds nothing that vocabext wrote, but 'candidates' (from `vocabext mine`) is"),
        ((mined.candidates, "--corpus", tmp_path / "missing.txt", *plain[3:]), "missing.txt does not exist"),
        ((*plain, "--text-field", "body"), "has no field 'body'"),
        ((*plain, "--model", tmp_path), "has no config.json; it is no model folder"),
        ((*plain, "--model", tiny_folder(tmp_path / "other", num_ids=280)), "token ids, but this model has 280"),
        ((*plain, "--window", "1"), "--window is 1; it must be at least 8"),
    ]:
        code, out, err = invoke(*args)
        lines = [line for line in err.splitlines() if not re.match(r"[a-z ]+: [\d,]+ \w+ in ", line)]
        assert code in (1, 2)
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0], lines
        assert not out
        assert not mined.output.exists()
    mined.output.write_text("mine")
    assert invoke(*plain)[0] == 2
    assert mined.output.read_text() == "mine"
    assert invoke(*plain, "--force")[0] == 0
    assert len(read_snippets(mined.output)[1]) == 3
