"""`serve swap-test`: its checks fire, and what it finds becomes an exit code and a page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import Running, cli, fake_engine, gateway
from tiny_expanded import expanded_pair

from serve.gateway.contract import stream_fault
from serve.gateway.page import render_swap
from serve.gateway.swap_test import FAIL, Item, Reply, checked, read_requests
from vocabext.errors import UsageError


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expanded_pair(tmp_path_factory.mktemp("pair"))[1]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("gateway")
    with fake_engine(folder, "base") as base, fake_engine(folder, "expanded", "--share-failing", "0.3") as other, \
            gateway(folder, base.url, other.url, "--no-canary") as found:
        yield found


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
    assert verdicts["stop strings"] == "FAIL"  # the fake engines know none
    page = render_swap(result)
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
