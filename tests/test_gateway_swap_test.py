"""`serve swap-test`: its checks fire, and what it finds becomes an exit code and a page."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gateway_rig import Running, cli, fake_engine, gateway
from tiny_expanded import expanded_pair

from vocabext.errors import UsageError
from vocabext.serve.gateway import contract
from vocabext.serve.gateway.arms import ARMS, BASE, EXPANDED
from vocabext.serve.gateway.contract import FAIL, ITEMS, NOT_CHECKED, Item, stream_fault
from vocabext.serve.gateway.rehearsal import checked
from vocabext.serve.gateway.replay import Rehearsal, Reply, read_requests
from vocabext.serve.report.page import render_report


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expanded_pair(tmp_path_factory.mktemp("pair"))[1]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("gateway")
    with fake_engine(folder, "base") as base, fake_engine(folder, "expanded", "--share-failing", "0.3") as other, \
            gateway(folder, base.url, other.url, "--no-canary") as found:
        yield found


@pytest.mark.slow
def test_a_broken_contract_is_found_item_by_item(running: Running, expanded: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "the heart", "max_tokens": 4}\n{"path": "/v1/chat/completions", "body": '
                        '{"messages": [{"role": "user", "content": "the heart"}], "stream": true}}\n')
    output = tmp_path / "swap.json"
    done = cli("serve", "swap-test", str(requests), str(expanded), "--url", running.url, "-o", str(output))
    assert done.returncode == 3, done.stderr
    assert "error: the contract is broken: " in done.stderr
    result = json.loads(output.read_text())
    verdicts = {item["name"]: item["verdict"] for item in result["items"]}
    assert not result["passed"]
    assert verdicts["every request is answered"] == "FAIL"
    assert verdicts["stop strings"] == "not checked"  # the fake engines know none, on either arm
    page = render_report(expanded, {"swap": result}).html
    page = page[page.index("Swapping the tokenizer under clients"):].partition("</section>")[0]
    assert "The contract is broken: do not swap" in page
    assert page.count("<tr>") == len(verdicts) + 1
    assert running.status()["policy"] == "all requests to base"


def stream(*parts: dict[str, Any], end: bytes = b"data: [DONE]\n\n") -> Reply:
    data = b"".join(b"data: " + json.dumps(part, ensure_ascii=False).encode() + b"\n\n" for part in parts)
    return Reply(200, {"stream": data + end})


def part(text: str, identity: str = "a") -> dict[str, Any]:
    return {"id": identity, "choices": [{"index": 0, "text": text}]}


WHOLE = Reply(200, {"choices": [{"text": "hé!"}], "usage": {"completion_tokens": 2}})
USAGE = {"id": "a", "choices": [], "usage": {"completion_tokens": 2}}


@pytest.mark.parametrize(("streamed", "fault"), [
    (stream(part("hé"), part("!"), USAGE), ""),
    (stream(part("hé"), USAGE), "its parts add up to 'hé', the whole is 'hé!'"),
    (stream(part("hé"), part("!", "b"), USAGE), "its parts have 2 different ids"),
    (stream(part("hé"), part("!"), USAGE, end=b""), "there is no [DONE] at its end"),
    (stream(part("hé"), part("!")), "it counts None tokens, the whole 2"),
    (Reply(200, {"stream": b'data: {"id": "\xc3"}\n\ndata: [DONE]\n\n'}), "not valid UTF-8"),
    (Reply(500, {}, "gone"), "status 500: gone"),
])
def test_what_is_wrong_with_a_stream_is_found(streamed: Reply, fault: str) -> None:
    found = stream_fault(streamed, WHOLE)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


CONTEXT = 120
TOKEN = SimpleNamespace(token=" heart", token_id=300, run=(104, 101))
REQUESTS = [("/v1/completions", {"prompt": "the heart", "max_tokens": 4}),
            ("/v1/completions", {"prompt": "a heart", "max_tokens": 4, "stop": "e"})]


class Arms:
    """A gateway in front of two arms whose tokens are characters, but for one; each may have faults."""

    def __init__(self, **faults: str) -> None:
        self._faults, self._asked = faults, itertools.count()

    def rehearsal(self, requests: Any = REQUESTS) -> Rehearsal:
        client = httpx.Client(transport=httpx.MockTransport(self._answer), base_url="http://gateway")
        manifest: Any = SimpleNamespace(tokens=[TOKEN])
        return Rehearsal(client, requests, manifest, "m", CONTEXT)

    def verdicts(self, requests: Any = REQUESTS) -> dict[str, Item]:
        rehearsal = self.rehearsal(requests)
        return {name: checked(name, check, rehearsal) for name, check in ITEMS.items()}

    def _answer(self, request: httpx.Request) -> httpx.Response:
        arm, body = request.headers["x-vocabext-arm"], json.loads(request.content)
        fault, headers = self._faults.get(arm, ""), {"x-vocabext-arm": arm}
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": list(range(len(body["prompt"]))), "count": len(body["prompt"])},
                                  headers=headers)
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        count = len(prompt.replace(" heart", "h") if arm == EXPANDED and isinstance(prompt, str) else prompt)
        count = min(count, body.get("truncate_prompt_tokens", count)) + (fault == "more")
        limit = body["max_tokens"] + (fault == "longer")
        if count + body["max_tokens"] > CONTEXT or fault == "refuses":
            return httpx.Response(400, json={"error": {"message": "refused"}}, headers=headers)
        if fault == "unreadable":
            return httpx.Response(200, content=b"<html>", headers=headers)
        document = self._document(body, prompt, count, limit, fault)
        if not body.get("stream"):
            return httpx.Response(200, json=document, headers=headers)
        parts = [{"id": "a", "choices": [{"index": 0, "text": c}]} for c in document["choices"][0]["text"]]
        text = "".join(f"data: {json.dumps(part)}\n\n" for part in [*parts, {"id": "a", "usage": document["usage"]}])
        return httpx.Response(200, text=text + ("" if fault == "cut" else "data: [DONE]\n\n"),
                              headers={**headers, "content-type": "text/event-stream"})

    def _document(self, body: Mapping[str, Any], prompt: Any, count: int, limit: int, fault: str) -> dict[str, Any]:
        bias = next(iter(body.get("logit_bias") or {}), None)
        text = "qwertyuiop" * 8 if bias is None else ((" heart" if bias == "300" else chr(int(bias))) * 8)
        if (fault == "unsteady" and bias is None) or (fault == "biased" and bias not in (None, "300")):
            text = f"{next(self._asked) % 10}" + text
        text, reason = text[: 6 * limit if bias == "300" else limit], "length"
        stops = body.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            if stop in text and fault != "goes on":
                text, reason = text[: text.index(stop)], "stop"
        if "response_format" in body:
            text, reason = "no" if fault == "prose" else "{}", "stop"
        if body.get("echo") and fault != "no echo":
            text = prompt + text
        choice: dict[str, Any] = {"text": text, "finish_reason": reason}
        if "logprobs" in body:
            rows = [{c: -1.0, "z": -2.0} for c in text] if fault != "leak" else [{" heart": -1.0}] * len(text)
            choice["logprobs"] = {"tokens": list(text), "token_logprobs": [-1.0] * (len(text) - (fault == "short")),
                                  "top_logprobs": rows}
        if "tools" in body:
            call = {"function": {"arguments": "{" if fault == "bad call" else "{}"}}
            choice = {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "stop"}
        many = 1 if fault == "one" else body.get("n", 1)
        return {"id": "a", "choices": [{"index": i, **choice} for i in range(many)], "usage": {
            "prompt_tokens": count, "completion_tokens": limit, "total_tokens": count + limit + (fault == "sum")}}


def test_two_sound_arms_break_nothing() -> None:
    found = Arms().verdicts()
    assert {name: item.verdict for name, item in found.items() if item.verdict not in ("pass", "differs")} == {}
    assert [item.detail for item in found.values() if "not checked" in item.detail] == []


@pytest.mark.parametrize(("fault", "names"), [
    ("refuses", list(ITEMS)), ("unreadable", ["every request is answered", "max_tokens", "n > 1", "JSON mode"]),
    ("cut", ["streams add up"]), ("unsteady", ["streams add up", "prefix cache"]), ("goes on", ["stop strings"]),
    ("longer", ["max_tokens"]), ("short", ["logprobs"]), ("no echo", ["echo"]), ("one", ["n > 1"]),
    ("biased", ["logit_bias by base ids"]), ("more", ["prompts given as ids"]), ("prose", ["JSON mode"]),
    ("bad call", ["tool calls"]), ("sum", ["usage"]),
])
def test_only_faults_of_the_expanded_arm_count(fault: str, names: list[str]) -> None:
    expanded = Arms(expanded=fault).verdicts()
    answered = {"streams add up", "usage"} if fault == "refuses" else set()  # the first item says it
    for faults in ({BASE: fault}, dict.fromkeys(ARMS, fault)):
        found = Arms(**faults).verdicts()
        assert [name for name, item in found.items() if item.verdict == FAIL] == []
        for name in names:
            assert (found[name].verdict, found[name].examples) == (NOT_CHECKED, ())
            assert "the base arm does not do it either (" in found[name].detail or name in answered
    for name in set(names) - answered:
        assert expanded[name].verdict == FAIL, expanded[name]


@pytest.mark.parametrize("text", ["ปวดหัวและมีไข้ ", "the heart "])
@pytest.mark.parametrize("tokens", [116, 32_764])
def test_a_prompt_near_the_context_limit_is_found_in_any_script(text: str, tokens: int) -> None:
    """Byte by byte, a character of Thai is three tokens."""
    def answer(request: httpx.Request) -> httpx.Response:
        count = len(json.loads(request.content)["prompt"].encode())
        return httpx.Response(200, json={"count": count}, headers={"x-vocabext-arm": BASE})

    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway")
    rehearsal = Rehearsal(client, [], SimpleNamespace(tokens=[TOKEN]), "m", tokens + 4)  # type: ignore[arg-type]
    found = contract._text_of_length(rehearsal, text, tokens)
    assert found is not None
    assert tokens - 3 < found[1] == len(found[0].encode()) <= tokens


def test_a_first_prompt_beyond_the_context_is_no_fault() -> None:
    found = Arms().verdicts([("/v1/completions", {"prompt": "a" * 200, "max_tokens": 4}), *REQUESTS])
    assert [name for name, item in found.items() if item.verdict == FAIL] == []
    for name in ("stop strings", "n > 1", "max_tokens", "logprobs"):
        assert "status 400: refused" in found[name].detail
    assert found["every request is answered"].detail.endswith(
        "1 not checked, the base arm does not do it either (request 1: status 400: refused)")


def test_a_stream_that_differs_from_a_cold_prefix_alone_is_no_fault() -> None:
    seen: set[str] = set()

    class Cold(Arms):
        """The first answer to each prompt is rounded differently."""

        def _document(self, body: Mapping[str, Any], prompt: Any, *rest: Any) -> dict[str, Any]:
            first = str(prompt) not in seen
            seen.add(str(prompt))
            document = super()._document(body, prompt, *rest)
            if first:
                document["choices"][0]["text"] = "cold"
            return document

    assert Cold().verdicts()["streams add up"].verdict == "pass"


def test_a_new_token_on_the_base_arm_is_a_fault_of_the_expanded_engine() -> None:
    item = Arms(base="leak").verdicts()["logprobs"]
    assert (item.verdict, item.examples) == (
        FAIL, ("base arm: the new token ' heart' is among the alternatives",))


def test_an_answer_without_its_parts_is_a_broken_contract() -> None:
    def broken(_: Any) -> Item:
        raise KeyError("usage")

    assert checked("usage", broken, None).verdict == FAIL  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no request; record some with"), ("{", "line 1 is no request"), ('{"a": 1}', "line 1 is no request"),
    ('{"path": "/v1/embeddings", "body": {"prompt": "a"}}', "line 1 is no request")])
def test_files_that_hold_no_requests_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_requests(tmp_path / "r.jsonl", 5)


@pytest.mark.slow
def test_the_report_holds_the_rehearsal_if_there_is_one(expanded: Path, tmp_path: Path) -> None:
    item = {"name": "stop strings", "verdict": "FAIL", "detail": "1 of 2 went wrong", "checked": 2,
            "examples": ["<b>status</b> 200"]}
    swap = {"artifact": "swap", "version": 1, "requests": 3, "passed": False, "items": [item]}
    page = tmp_path / "report.html"
    for content, expected in ((None, False), (swap, True)):
        if content:
            (tmp_path / "swap.json").write_text(json.dumps(content))
        assert cli("serve", "report", str(expanded), "-o", str(page), "--force").returncode == 0
        html = page.read_text()
        assert ("The contract is broken: do not swap" in html) == expected
    assert "&lt;b&gt;status&lt;/b&gt; 200" in html
