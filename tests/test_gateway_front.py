"""The base arm of one engine, in front of engines that are functions: what is sent, what comes back, what is not."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_expanded import expanded_pair

from vocabext.cli.main import cli
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.app import Gateway, Proxy
from vocabext.serve.gateway.arms import BASE, EXPANDED, Arm
from vocabext.serve.gateway.calls import CHAT, COMPLETIONS, Call, Request, parse, plain_call
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.front import ARM_ARGUMENT, HUGE_CHARACTERS, LONG_CHARACTERS, WORKERS, BaseFront
from vocabext.serve.gateway.health import AWAY, Health, ban_fault
from vocabext.serve.gateway.load import Loads
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.run import GatewayConfig, run_gateway
from vocabext.serve.gateway.side_tasks import SideTasks
from vocabext.serve.gateway.state import State
from vocabext.serve.gateway.trial import Trial
from vocabext.tokens import Expansion, NewToken

MESSAGES = [{"role": "user", "content": "hi"}]
FIRST = 300  # the first new id; base ids are characters


class Characters:
    """A tokenizer whose ids are characters; slow if it is told to be."""

    longest_token = 1

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.hf = self

    def encode_batch(self, texts: Sequence[str], *, framed: bool) -> list[list[int]]:
        time.sleep(self._seconds)
        return [[1] * framed + [ord(c) for c in text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def new_front(seconds: float = 0.0, **options: Any) -> BaseFront:
    expansion = Expansion([NewToken(" heart", " heart", (65, 66))], FIRST)
    tokenizer: Any = Characters(seconds)
    return BaseFront(tokenizer, expansion, **options)


def request(path: str, **document: Any) -> Request:
    body = json.dumps(document).encode()
    return Request(path, [], body, parse(body, 128), time.perf_counter())


def between(front: Any, engine: Callable[[str, dict[str, Any]], tuple[int, Any]]) -> Engines:
    """Return one engine of both arms that is a function of path and body."""

    async def post_json(url: str, value: bytes, **_: Any) -> tuple[int, bytes]:
        status, answer = engine(url.removeprefix("http://engine"), json.loads(value))
        return status, json.dumps(answer).encode()

    upstream: Any = SimpleNamespace(post_json=post_json)
    return Engines(arms_at("http://engine"), upstream, front, "m")


def arms_at(url: str) -> dict[str, Arm]:
    """Return both arms behind one URL."""
    return {name: Arm(name, url, "m") for name in (BASE, EXPANDED)}


def tokenize(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Answer `/tokenize` alone: one base id and one new one."""
    return (200, {"tokens": [72, FIRST], "max_model_len": 50}) if path == "/tokenize" else (404, {})


def call(path: str, *, front: BaseFront | None = None, asked: list[Any] | None = None, **document: Any) -> Call:
    """Have the front make of a request what the engine gets; `asked` takes what `/tokenize` was asked."""

    def engine(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if asked is not None:
            asked.append(body)
        return tokenize(path, body)

    front = front or new_front()
    engines = between(front, engine)
    return asyncio.run(engines.call_for(request(path, **document), engines.arms[BASE]))


def converted(sent: Call, answer: dict[str, Any], *, streamed: bool = False) -> dict[str, Any]:
    assert sent.converter is not None
    data = json.dumps(answer).encode()
    if streamed:
        return dict(json.loads(sent.converter.event(data).removeprefix(b"data:")))
    return dict(json.loads(sent.converter.whole(data)))


def test_an_engine_that_fails_while_a_chat_is_rendered_counts_as_failing(tmp_path: Path) -> None:
    async def refuse(*_: Any) -> Any:
        raise Refusal(502, "the engine of the base arm cannot be reached")

    metrics, side_tasks, state = Metrics(), SideTasks(), State(tmp_path / "state.json", Policy())
    gateway = Gateway(between(SimpleNamespace(call=refuse), tokenize), Trial(state, None, metrics, side_tasks),
                      Loads(metrics, 9), metrics, side_tasks)
    sent: list[Any] = []

    async def talk() -> None:
        messages = iter([{"type": "http.request", "body": json.dumps({"messages": MESSAGES}).encode()}])

        async def receive() -> Any:
            if (message := next(messages, None)) is None:
                await asyncio.sleep(60)
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        await Proxy(gateway)({"path": CHAT, "headers": [(b"content-type", b"application/json")]}, receive, send)

    asyncio.run(talk())
    assert sent[0]["status"] == 502
    assert b'engine_failures_total{arm="base"} 1.0' in gateway.metrics.text()


PROMPT_LOGPROBS = [None, {"66": {"logprob": -1.0, "rank": 2, "decoded_token": "B"},
                          str(FIRST): {"logprob": -0.5, "rank": 1, "decoded_token": " heart"}}]


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_of_the_prompt_name_no_new_token(streamed: bool) -> None:
    answer = {"id": "a", "choices": [{"index": 0, "text": "x", "prompt_logprobs": PROMPT_LOGPROBS}]}
    sent = call(COMPLETIONS, prompt="AB", prompt_logprobs=1, stream=streamed)
    assert converted(sent, answer, streamed=streamed)["choices"][0]["prompt_logprobs"] == [
        None, {"66": PROMPT_LOGPROBS[1]["66"]}]  # type: ignore[index]
    if not streamed:
        talked = converted(call(CHAT, messages=MESSAGES, prompt_logprobs=1), answer)
        assert talked["prompt_logprobs"] == [None, {"66": PROMPT_LOGPROBS[1]["66"]}]  # type: ignore[index]
        assert "heart" not in json.dumps(talked)


def test_log_probabilities_by_id_name_no_new_token() -> None:
    logprobs = {"tokens": ["token_id:66"], "token_logprobs": [-1.0], "text_offset": [0],
                "top_logprobs": [{"token_id:66": -1.0, f"token_id:{FIRST}": -0.5}]}
    answer = {"id": "a", "choices": [{"index": 0, "text": "B", "logprobs": logprobs}]}
    as_ids = converted(call(COMPLETIONS, prompt="A", logprobs=2, return_tokens_as_token_ids=True), answer)
    assert as_ids["choices"][0]["logprobs"] == {**logprobs, "top_logprobs": [{"token_id:66": -1.0}]}
    as_text = converted(call(COMPLETIONS, prompt="A", logprobs=2), answer)["choices"][0]["logprobs"]
    assert (as_text["tokens"], as_text["top_logprobs"]) == (["B"], [{"B": -1.0}])


def test_all_log_probabilities_of_a_chat_are_all() -> None:
    logprobs = {"tokens": ["token_id:66"], "token_logprobs": [-1.0],
                "top_logprobs": [{"token_id:66": -1.0, "token_id:67": -2.0, f"token_id:{FIRST}": -0.5}]}
    answer = {"id": "a", "choices": [{"index": 0, "text": "B", "logprobs": logprobs}]}
    for top, expected in ((-1, ["B", "C"]), (1, ["B"]), (0, [])):
        found = converted(call(CHAT, messages=MESSAGES, logprobs=True, top_logprobs=top), answer)
        rows = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert [row["token"] for row in rows] == expected


@pytest.mark.parametrize(("path", "document", "message"), [
    (COMPLETIONS, {"prompt_logprob_token_ids": [[66], [FIRST]]}, "prompt_logprob_token_ids has the token id 300"),
    (COMPLETIONS, {"prompt_logprob_token_ids": 5.5}, "prompt_logprob_token_ids must be a list of token ids"),
    (COMPLETIONS, {"prompt": "a\ud800b"}, "the body is no JSON document"),
    (COMPLETIONS, {"prompt": ["a", "\udfff"]}, "the body is no JSON document"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt must be a list of token ids, or text"),
    (CHAT, {"top_logprobs": "x"}, "top_logprobs is a JSON str, it must be a whole number"),
    (CHAT, {"top_logprobs": {"a": 1}, "logprobs": True}, "top_logprobs is a JSON dict"),
    (CHAT, {"chat_template_kwargs": "x"}, "chat_template_kwargs is a JSON str"),
    (CHAT, {"reasoning_effort": "enormous"}, "reasoning_effort must be one of none, minimal"),
    (CHAT, {"reasoning_effort": []}, "reasoning_effort must be one of none, minimal"),
    (CHAT, {"documents": [{"title": 5}]}, "documents must be a list of objects"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
     "images, audio and video are not in the ids"),
    (CHAT, {"messages": [{"role": "user", "content": [{"input_audio": {}}]}]}, "images, audio and video"),
    (CHAT, {"tools": [{}]}, "tool calls are parsed by the engine's chat endpoint"),
])
def test_what_cannot_be_done_is_refused_with_a_reason(path: str, document: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        call(path, **{"prompt": "a", "messages": MESSAGES, **document})
    assert caught.value.status == 400


@pytest.mark.parametrize("model", [[], {}, 5, True])
def test_a_model_that_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(Refusal, match=f"model is a JSON {type(model).__name__}, it must be a string") as caught:
        parse(json.dumps({"model": model, "prompt": "a"}).encode(), 128)
    assert caught.value.status == 400
    assert plain_call(request(COMPLETIONS, prompt="a"), Arm(BASE, "", "m"), {"m": ""}).path == COMPLETIONS


def test_a_chat_is_rendered_with_what_the_chat_endpoint_adds() -> None:
    asked: list[Any] = []
    documents, tools = [{"title": "a", "text": "b"}], [{"type": "function", "function": {"name": "f"}}]
    sent = call(CHAT, asked=asked, messages=MESSAGES, documents=documents, reasoning_effort="low", tools=tools,
                tool_choice="none", chat_template_kwargs={"documents": [], "mood": "good"})
    assert json.loads(sent.body)["prompt"] == [72, 65, 66]
    assert asked.pop() == {"messages": MESSAGES, "tools": tools, "chat_template_kwargs": {
        "documents": documents, "mood": "good", "reasoning_effort": "low", "enable_thinking": True}}
    assert not {"documents", "reasoning_effort", "tools", "tool_choice"} & set(json.loads(sent.body))
    for given, expected in (({}, {"reasoning_effort": "none", "enable_thinking": False}),
                            ({"enable_thinking": True}, {"reasoning_effort": "none", "enable_thinking": True})):
        call(CHAT, asked=asked, messages=MESSAGES, reasoning_effort="none", chat_template_kwargs=given)
        assert asked.pop()["chat_template_kwargs"] == expected
    call(CHAT, asked=asked, messages=MESSAGES)
    assert asked.pop() == {"messages": MESSAGES}


def test_tools_stay_in_the_prompt_unless_the_engine_leaves_them_out() -> None:
    asked: list[Any] = []
    for excludes in (False, True):
        call(CHAT, front=new_front(excludes_tools=excludes), asked=asked, messages=MESSAGES, tools=[{}],
             tool_choice="none")
        assert ("tools" in asked.pop()) != excludes


def test_reasoning_is_read_under_both_of_its_names() -> None:
    asked: list[Any] = []
    old, both = {"role": "assistant", "reasoning_content": "a"}, {"role": "assistant", "reasoning": "b"}
    call(CHAT, asked=asked, messages=[old, {**both, "reasoning_content": "a"}, {**both, "reasoning_content": None}])
    assert asked[0]["messages"] == [{"role": "assistant", "reasoning": "a"}, both, both]


def test_a_long_prompt_does_not_hold_up_the_streams() -> None:
    front = new_front(seconds=0.5)
    engines = between(front, tokenize)

    async def longest_pause(characters: int) -> float:
        work = asyncio.ensure_future(engines.call_for(request(COMPLETIONS, prompt="a" * characters),
                                                      engines.arms[BASE]))
        pauses = [0.0]
        while not work.done():
            began = time.perf_counter()
            await asyncio.sleep(0.01)
            pauses.append(time.perf_counter() - began)
        assert len(json.loads((await work).body)["prompt"]) == characters + 1
        return max(pauses)

    assert asyncio.run(longest_pause(LONG_CHARACTERS)) > 0.45  # short ones are not worth a thread
    assert asyncio.run(longest_pause(LONG_CHARACTERS + 1)) < 0.4


def test_a_prompt_beyond_the_context_does_not_reach_the_engine() -> None:
    front = new_front()
    front.context = 10
    call(COMPLETIONS, front=front, prompt="a" * 9)
    for prompt in ("a" * 10, ["a", "a" * 10], [5] * 11):
        with pytest.raises(Refusal, match="the prompt has 11 tokens, and the model's context is 10"):
            call(COMPLETIONS, front=front, prompt=prompt)
    call(COMPLETIONS, front=front, prompt="a" * 10, truncate_prompt_tokens=5)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    front = new_front()
    front.context = 10
    tokenizer: Any = front._tokenizer
    tokenizer.longest_token = 3
    call(COMPLETIONS, front=front, prompt="a" * 9)
    tokenizer.encode_batch = None
    for prompt in ("a" * 31, ["a", "a" * 31]):
        with pytest.raises(Refusal, match="the prompt has 31 characters; the model's context is 10 tokens, and none "
                                          "has more than 3 characters") as caught:
            call(COMPLETIONS, front=front, prompt=prompt)
        assert caught.value.status == 400


def test_a_huge_prompt_does_not_hold_up_a_long_one() -> None:
    front, entered, leave = new_front(), threading.Semaphore(0), threading.Event()
    tokenizer: Any = front._tokenizer
    encode_batch = tokenizer.encode_batch

    def slow(texts: Sequence[str], *, framed: bool) -> list[list[int]]:
        if len(texts[0]) > HUGE_CHARACTERS:
            entered.release()
            leave.wait(10)
        return list(encode_batch(texts, framed=framed))

    tokenizer.encode_batch = slow
    engines = between(front, tokenize)

    async def ask(characters: int) -> Call:
        return await engines.call_for(request(COMPLETIONS, prompt="a" * characters), engines.arms[BASE])

    async def both() -> None:
        huge = [asyncio.ensure_future(ask(HUGE_CHARACTERS + 1)) for _ in range(3 * WORKERS)]
        await asyncio.to_thread(lambda: [entered.acquire() for _ in range(WORKERS)])
        assert len(json.loads((await ask(LONG_CHARACTERS + 1)).body)["prompt"]) == LONG_CHARACTERS + 2
        assert not any(one.done() for one in huge)
        leave.set()
        await asyncio.gather(*huge)

    asyncio.run(both())


def test_a_prompt_at_which_the_tokenizer_gives_up_is_refused() -> None:
    front = new_front()
    tokenizer: Any = front._tokenizer

    def give_up(texts: Sequence[str], *, framed: bool) -> list[list[int]]:
        raise TokenizerError("the tokenizer gave up (over) at a text: 41 characters")

    tokenizer.encode_batch = give_up
    for length in (5, LONG_CHARACTERS + 1):
        with pytest.raises(Refusal, match="the tokenizer gave up") as caught:
            call(COMPLETIONS, front=front, prompt="a" * length)
        assert caught.value.status == 400


def test_ids_are_checked_before_they_reach_the_engine() -> None:
    for prompt, found in (([5, FIRST], FIRST), ([[5], [-1]], -1)):
        with pytest.raises(Refusal, match=f"prompt has the token id {found}, the vocabulary has {FIRST} ids"):
            call(COMPLETIONS, prompt=prompt)
    with pytest.raises(Refusal, match="prompt must be a list of token ids"):
        call(COMPLETIONS, prompt=[5, True])


class Engine:
    """An expanded engine that can be away, or come back without the ban."""

    def __init__(self) -> None:
        self.up, self.bans, self.trials, self.context = True, True, 0, 50

    @contextlib.asynccontextmanager
    async def call(self, method: str, url: str, **_: Any) -> AsyncIterator[Any]:
        if not self.up:
            raise Refusal(502, "cannot be reached")
        yield SimpleNamespace(status=200)

    async def get_json(self, url: str, **_: Any) -> Any:
        return {"data": [{"id": "m", "max_model_len": self.context}]}

    async def post_json(self, url: str, value: bytes, **_: Any) -> tuple[int, bytes]:
        self.trials += 1
        banned = self.bans and json.loads(value)["vllm_xargs"][ARM_ARGUMENT] == BASE
        return 200, json.dumps({"choices": [{"token_ids": [65] if banned else [FIRST]}]}).encode()


def test_an_engine_that_was_away_serves_the_base_arm_once_its_ban_was_tried_again() -> None:
    engine, front = Engine(), new_front()
    notes: list[str] = []
    upstream: Any = engine
    engines = Engines(arms_at("http://engine"), upstream, front, "m")
    health = Health(engines, Metrics(), {}, notes.append)

    def ask() -> str:
        try:
            asyncio.run(engines.call_for(request(COMPLETIONS, prompt="a"), engines.arms[BASE]))
        except Refusal as refusal:
            return f"{refusal.status} {refusal.message}"
        return ""

    def check() -> dict[str, bool]:
        asyncio.run(health.check())
        return engines.healthy

    assert asyncio.run(ban_fault(upstream, front, "http://engine", {})) == ""
    assert (check(), engine.trials, front.context, ask()) == ({BASE: True, EXPANDED: True}, 2, 50, "")
    engine.up = False
    assert check() == {BASE: False, EXPANDED: False}
    assert ask() == f"502 the base arm is not served: {AWAY}"
    engine.up, engine.bans, engine.context = True, False, 70
    for _ in range(2):
        assert check() == {BASE: False, EXPANDED: True}
        assert "does not ban new tokens" in ask()
    assert len(notes) == 1
    assert "does not ban new tokens from base requests" in notes[0]
    engine.bans = True
    assert check() == {BASE: True, EXPANDED: True}
    assert (ask(), front.context) == ("", 70)
    trials = engine.trials
    check()
    assert engine.trials == trials


@pytest.mark.parametrize(("place", "one_engine"), [("{}", False), ("{}", True), ("{}@http://127.0.0.1:1", True)])
def test_a_folder_that_was_not_verified_is_not_served(tmp_path: Path, place: str, one_engine: bool) -> None:
    base, folder = expanded_pair(tmp_path)
    (folder / "verify.json").unlink(missing_ok=True)
    config = GatewayConfig(str(base), place.format(folder), one_engine, tmp_path / "state.json")
    for message in ("was not verified", "failed verification"):
        with pytest.raises(CheckpointError, match=f"{message}.* or pass --unverified"):
            run_gateway(config, on_ready=lambda _: None, note=lambda _: None)
        (folder / "verify.json").write_text('{"artifact": "verify", "passed": false, "checks": []}')
    assert not (tmp_path / "state.json").exists()


@pytest.mark.parametrize("flags", [[], ["--unverified"]])
def test_the_flag_opens_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    seen: list[GatewayConfig] = []

    def run(config: GatewayConfig, **_: Any) -> int:
        seen.append(config)
        raise CheckpointError("enough")

    monkeypatch.setattr("vocabext.serve.gateway.run.run_gateway", run)
    CliRunner().invoke(cli, ["serve", "gateway", "a", "b", "--logs", str(tmp_path), *flags])
    assert seen[0].unverified == bool(flags)
    if flags:
        monkeypatch.undo()
        monkeypatch.setattr("vocabext.serve.gateway.run.engines_of",
                            lambda *_, **__: (_ for _ in ()).throw(CheckpointError("beyond")))
        base, folder = expanded_pair(tmp_path)
        config = GatewayConfig(str(base), str(folder), False, tmp_path / "state.json", port=0, unverified=True)
        with pytest.raises(CheckpointError, match="beyond"):
            run_gateway(config, on_ready=lambda _: None, note=lambda _: None)
