import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from vocabext.errors import CorpusError, ServerError, UsageError
from vocabext.serve.bench import answers
from vocabext.serve.bench.scenarios import (
    DECODE,
    MIXED,
    PREFILL,
    Point,
    PromptShape,
    build_prompts,
    max_output_tokens,
    points_of,
    tokens_per_character,
)
from vocabext.serve.engine import Server

WORDS = "the heart is a muscle that pumps blood through the body in one long loop".split()
SHAPE = PromptShape(4, None, 40, 120, 64)
ALL = points_of((PREFILL, DECODE, MIXED), (1,), ())


class Words:
    """A tokenizer with one token per word."""

    num_ids = 100

    def encode(self, text: str) -> list[int]:
        return [ord(word[0]) for word in text.split()]


def documents(count: int = 40, words: int = 30) -> list[str]:
    choose = random.Random(0)
    return [" ".join(choose.choice(WORDS) for _ in range(words)) for _ in range(count)]


def build(texts: list[str] | None = None, *, shape: PromptShape = SHAPE, points: tuple[Point, ...] = ALL,
          context: int | None = 512) -> dict[str, tuple[str, ...]]:
    return build_prompts(documents() if texts is None else texts, Words(), shape, points, context,  # type: ignore[arg-type]
                         answer_tokens=max_output_tokens(shape.output_characters, 0.2))


def test_every_scenario_is_measured_at_every_load_once() -> None:
    found = points_of((PREFILL, PREFILL, DECODE), (1, 8), (2.0,))
    assert [point.name for point in found] == ["prefill x1", "prefill x8", "prefill 2/s", "decode x1", "decode x8",
                                               "decode 2/s"]


def test_a_load_has_as_many_requests_as_it_takes_to_fill_it() -> None:
    assert Point(PREFILL).num_requests(6) == 6
    assert Point(PREFILL, 8).num_requests(6) == 16
    assert Point(PREFILL, None, 2.5).num_requests(6) == 25


def test_long_prompts_fill_the_context_in_base_tokens_and_end_at_a_space() -> None:
    texts = documents()
    prompts = build(texts, context=116)[PREFILL]
    lengths = [len(Words().encode(p)) for p in prompts]
    assert len(lengths) == 4
    assert all(90 <= n <= 100 for n in lengths)
    source = set(" ".join(texts).split())
    assert all(set(p.split()) <= source for p in prompts)


def test_prompts_never_exceed_the_limit_of_prompt_tokens() -> None:
    shape = PromptShape(4, 30, 40, 120, 64)
    assert all(len(Words().encode(p)) <= 30 for p in build(shape=shape, context=None)[PREFILL])


def test_short_prompts_are_the_beginnings_of_documents() -> None:
    texts = documents()
    prompts = build(texts)[DECODE]
    assert all(any(t.startswith(p) for t in texts) and 30 <= len(p) <= 40 for p in prompts)
    assert len(set(prompts)) == 4


def test_mixed_prompts_are_passages_of_other_documents_and_then_a_beginning() -> None:
    texts = documents()
    for prompt, opening in zip(*(build(texts)[name] for name in (MIXED, DECODE)), strict=True):
        *passages, last = prompt.split("\n\n")
        assert last == opening
        assert len(passages) == 3
        assert all(any(t.startswith(p) for t in texts) and not p.startswith(opening) for p in passages)
        assert 80 <= len("".join(passages)) <= 120


def test_mixed_prompts_leave_room_for_the_answer() -> None:
    shape = PromptShape(4, None, 40, 100_000, 64)
    for prompt in build(shape=shape, context=128)[MIXED]:
        assert len(Words().encode(prompt)) + 32 <= 128


@pytest.mark.parametrize("texts", [["", " \n"], []])
def test_a_corpus_of_empty_lines_is_one_clear_line(texts: list[str]) -> None:
    with pytest.raises(CorpusError, match="no text to make prompts from; pass held-out documents as --corpus"):
        build(texts)


def test_a_small_corpus_gives_fewer_prompts_if_they_fill_the_load() -> None:
    assert len(build(["only this"], points=(Point(PREFILL),))[PREFILL]) == 1
    with pytest.raises(CorpusError, match="text for 1 prefill prompts, but prefill x8 needs 16"):
        build(["only this"], points=(Point(PREFILL, 8),))
    with pytest.raises(CorpusError, match="text for 1 decode prompts, but decode 3/s needs 30"):
        build(["only this"], points=(Point(DECODE, None, 3.0),))


def test_what_does_not_fit_into_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="--prompt-tokens 5000 does not fit into the context of 512 tokens; use at"):
        build(shape=PromptShape(4, 5000, 40, 120, 64))
    with pytest.raises(UsageError, match="--output-characters 64 may need 32 tokens, which leaves too little of the"):
        build(context=48)


# -- answers of equal length --------------------------------------------------------------------------------------

def planted(monkeypatch: pytest.MonkeyPatch, characters_per_token: float) -> list[int]:
    """A server whose tokens have so many characters; returns the lengths it is asked for."""
    asked: list[int] = []

    def complete(server: Server, model: str, prompt: str, tokens: int) -> dict[str, object]:
        asked.append(tokens)
        offsets = [len(prompt) + int(i * characters_per_token) for i in range(tokens)]
        return {"text": "x" * int(tokens * characters_per_token), "logprobs": {"text_offset": offsets}}

    monkeypatch.setattr(answers, "_complete", complete)
    return asked


@pytest.mark.parametrize(("per_token", "tokens", "characters"), [(4.0, 25, 100), (6.5, 16, 104), (2.0, 50, 100)])
def test_each_server_gets_the_tokens_that_its_characters_take(
    monkeypatch: pytest.MonkeyPatch, per_token: float, tokens: int, characters: int
) -> None:
    planted(monkeypatch, per_token)
    plan = answers.plan_answers(Server([], "", Path("log")), "base", ["a prompt"], 100, most_tokens=50)
    assert (plan.tokens, plan.characters) == ((tokens,), (characters,))
    assert plan.num_short(100) == 0


def test_a_model_that_writes_nothing_visible_comes_to_an_end_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = planted(monkeypatch, 0.1)
    plan = answers.plan_answers(Server([], "", Path("log")), "base", ["a prompt"], 100, most_tokens=50)
    assert asked == [34, 50]
    assert plan.tokens == (50,)
    assert plan.num_short(100) == 1


def test_a_server_without_token_offsets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "ask", lambda *_, **__: {"choices": [{"text": "a"}]})
    with pytest.raises(ServerError, match="the server gave no token offsets; its answer begins"):
        answers.plan_answers(Server([], "http://127.0.0.1:1", Path("log")), "base", ["a prompt"], 100, most_tokens=50)


@pytest.mark.parametrize(("status", "said"), [(200, "Expecting value"), (500, "500")])
def test_a_server_that_answers_no_json_is_an_error_in_one_line(tmp_path: Path, status: int, said: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>not a vLLM server")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http, Server(
        [sys.executable, "-c", "import time; time.sleep(60)"], f"http://127.0.0.1:{http.server_port}", tmp_path / "log",
        name="the base server",
    ) as server:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ServerError, match="the base server did not answer /v1/completions") as caught:
                answers.plan_answers(server, "base", ["a prompt"], 100, most_tokens=50)
        finally:
            http.shutdown()
    assert said in str(caught.value).partition("\n")[0]


# -- text whose characters take several tokens each ---------------------------------------------------------------

class Bytes:
    """A tokenizer with one token per byte: three for a character of Thai."""

    num_ids = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def thai(count: int = 12, characters: int = 2000) -> list[str]:
    choose = random.Random(1)
    return ["".join(chr(choose.randrange(0xE01, 0xE2F)) for _ in range(characters)) for _ in range(count)]


@pytest.mark.parametrize("context", [1300, 4096, None])
def test_thai_prompts_and_answers_fit_into_the_context_in_ids(context: int | None) -> None:
    shape = PromptShape(4, None, 200, 1500, 64)
    most = max_output_tokens(64, tokens_per_character(thai(), [Bytes()]))  # type: ignore[list-item]
    assert most >= 3 * 64
    found = build_prompts(thai(), Bytes(), shape, ALL, context, answer_tokens=most)  # type: ignore[arg-type]
    for name, prompts in found.items():
        longest = max(len(Bytes().encode(prompt)) for prompt in prompts)
        assert longest + (1 if name == PREFILL else most) <= (context or 10**9)
        if context is None and name == MIXED:
            assert 3 * 1650 <= longest <= 3 * 1710


def test_an_answer_may_take_twice_the_tokens_that_such_text_takes() -> None:
    assert max_output_tokens(256, 0.22) == 128  # English: half as many as characters
    assert max_output_tokens(256, 3.0) == 2 * 3 * 256
    assert max_output_tokens(1, 0.0) == 1


def test_an_answer_of_thai_is_asked_for_until_it_has_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 1 / 3)
    plan = answers.plan_answers(Server([], "", Path("log")), "base", ["a prompt"], 100, most_tokens=600)
    assert plan.num_short(100) == 0
    assert plan.tokens == (300,)


# -- passages of other documents ----------------------------------------------------------------------------------

def continued_and_passages(prompt: str, texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the documents that a mixed prompt continues, and those that its passages are from."""
    *passages, opening = prompt.split("\n\n")
    continued = [text for text in texts if text.startswith(opening)]
    return continued, [text for passage in passages for text in texts if text.startswith(passage)]


@pytest.mark.parametrize("count", [4, 5, 6, 7, 40])
def test_no_passage_is_of_the_document_that_is_continued(count: int) -> None:
    texts = documents(count)
    prompts = build(texts, points=(Point(MIXED),))[MIXED]
    assert len(prompts) == 4
    for prompt in prompts:
        continued, passages = continued_and_passages(prompt, texts)
        assert len(continued) == 1
        assert len(passages) == len(set(passages)) == 3
        assert continued[0] not in passages


def test_copies_of_a_document_are_the_same_document() -> None:
    texts = documents(5)
    copies = [f"{text}\n" for text in texts] + [f"  {text}" for text in texts] + texts
    found = build(copies, points=(Point(MIXED), Point(DECODE)))
    assert sorted(found[DECODE]) == sorted(set(found[DECODE]))
    for prompt in found[MIXED]:
        continued, passages = continued_and_passages(prompt, texts)
        assert continued[0] not in passages


def test_a_document_that_holds_the_continued_text_gives_no_passage() -> None:
    texts = documents(5)
    texts += [f"A copy with a heading. {text}" for text in texts]
    for prompt in build(texts, points=(Point(MIXED),))[MIXED]:
        *passages, opening = prompt.split("\n\n")
        assert not any(opening in text for passage in passages for text in texts if text.startswith(passage))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_other_documents_are_one_line_with_both_numbers(count: int) -> None:
    texts = documents(count)
    with pytest.raises(CorpusError, match="needs passages of 3 other documents, but of the "
                                          f"{count} different documents of the corpus {count - 1} do not hold"):
        build(texts, points=(Point(MIXED),))
    assert len(build(texts, points=(Point(DECODE),))[DECODE]) == count
