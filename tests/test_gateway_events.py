"""Server-sent events: cut as the HTML standard says, wherever the network cuts the bytes."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabext.serve.gateway.arms import Arm
from vocabext.serve.gateway.calls import COMPLETIONS, Call, Request
from vocabext.serve.gateway.contract import stream_fault
from vocabext.serve.gateway.logprobs import LogprobsConverter
from vocabext.serve.gateway.observe import events_of, observe
from vocabext.serve.gateway.relay import Relay
from vocabext.serve.gateway.replay import Reply

ENDS = [b"\n", b"\r\n", b"\r"]
ONE, TWO = b'{"choices": [{"index": 0, "text": "h\xc3\xa9"}]}', b'{"choices": [{"index": 0, "text": "!"}]}'
DONE = b"[DONE]"


def stream(end: bytes = b"\n", *, last: bytes | None = None, events: Sequence[bytes] = (ONE, TWO, DONE)) -> bytes:
    """Events with a line end; `last` stands in place of the blank line behind the last one."""
    text = b"".join(b"data: " + data + end + end for data in events)
    return text if last is None else text.removesuffix(end + end) + last


STREAMS = [stream(end, last=last) for end in ENDS for last in (None, end, b"")] + [
    b": hello\n\n" + stream(), stream().replace(b"data: ", b"data:"), b"\xef\xbb\xbf" + stream(),
    stream(b"\r\n").replace(b"data: ", b"id: 7\r\nevent: part\r\ndata: "), stream() + b": bye\n\n"]


def cut(text: bytes, *places: int) -> list[tuple[float, bytes]]:
    bounds = [0, *sorted(places), len(text)]
    return [(float(i), text[a:b]) for i, (a, b) in enumerate(itertools.pairwise(bounds))]


@pytest.mark.parametrize("text", STREAMS)
def test_the_last_event_and_every_line_end_count_wherever_the_bytes_are_cut(text: bytes) -> None:
    singly = cut(text, *range(1, len(text)))
    for parts in [singly, *(cut(text, place) for place in range(len(text) + 1))]:
        assert [data for _, data in events_of(parts)] == [ONE, TWO, DONE]


@given(text=st.text("d:ata x\r\n", max_size=30).map(str.encode), data=st.data())
def test_any_bytes_give_the_same_events_in_one_part_and_in_many(text: bytes, data: st.DataObject) -> None:
    """Beside the standard's own words: lines end with CR LF, LF or CR; a blank line ends an event."""
    places = data.draw(st.lists(st.integers(0, len(text))))
    lines = re.sub("\r\n|\r", "\n", text.decode()).split("\n")
    blocks = re.split("\n\n+", "\n".join(lines).strip("\n")) if any(lines) else []
    fields = [[line.partition(":")[2] for line in block.split("\n") if line.partition(":")[0] == "data"]
              for block in blocks]
    expected = ["\n".join(v.removeprefix(" ") for v in values).strip().encode() for values in fields if values]
    assert [found for _, found in events_of(cut(text, *places))] == expected


def test_an_event_of_several_lines_is_one() -> None:
    assert [data for _, data in events_of([(0.0, b'data: {"a":\ndata: 1}\n\n')])] == [b'{"a":\n1}']


def test_an_event_has_the_time_at_which_it_was_complete() -> None:
    parts = [(1.0, b"data: a\r\n"), (2.0, b"\r"), (3.0, b"\ndata: b\n"), (4.0, b"")]
    assert events_of(parts) == [(2.0, b"a"), (4.0, b"b")]


@pytest.mark.parametrize("text", STREAMS)
def test_an_answer_counts_as_whole_whatever_ends_its_lines(text: bytes) -> None:
    seen = observe("base", 200, [(0.0, text)], 1.0, streamed=True)
    assert (seen.failed, seen.text) == (False, "hé!")


@pytest.mark.parametrize("end", ENDS)
def test_a_rehearsed_stream_counts_as_whole_whatever_ends_its_lines(end: bytes) -> None:
    events = [b'{"id": 1, "choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}', DONE]
    whole = Reply(200, {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}})
    assert stream_fault(Reply(200, {"stream": stream(end, last=b"", events=events)}), whole) == ""


def relayed(parts: Sequence[bytes], converter: LogprobsConverter | None) -> tuple[bytes, bool]:
    """Pass a stream on; returns what the client got, and whether the answer counts as failed."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def come() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    request = Request(COMPLETIONS, [], b"{}", {}, 0.0)
    relay = Relay(None, Arm("base", "http://engine", "m"), request,  # type: ignore[arg-type]
                  Call(COMPLETIONS, b"{}", converter), send)
    relay.status = 200
    head = {"type": "http.response.start", "status": 200, "headers": []}
    observation = asyncio.run(relay._stream(head, come()))
    assert [message for message in sent if message["type"] == head["type"]] == sent[:1] == [head]
    return b"".join(message["body"] for message in sent[1:]), observation.failed


@pytest.mark.parametrize("text", STREAMS)
@pytest.mark.parametrize("converted", [True, False])
def test_a_client_gets_the_last_event_whatever_ends_the_engines_lines(text: bytes, converted: bool) -> None:
    for parts in ([text], [text[i : i + 1] for i in range(len(text))]):
        body, failed = relayed(parts, LogprobsConverter(str, 10) if converted else None)
        assert not failed
        if converted:
            assert [json.loads(data) for data in body.split(b"\n\n")[:-2] for data in [data[6:]]] == [
                json.loads(ONE), json.loads(TWO)]
            assert body.endswith(b"data: [DONE]\n\n")
        else:
            assert body == text


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("text", [stream()[:20], stream()[:-20], stream(events=[ONE, TWO])])
def test_an_answer_that_breaks_off_ends_with_an_error_event_of_its_own(text: bytes, converted: bool) -> None:
    body, failed = relayed([text], LogprobsConverter(str, 10) if converted else None)
    *_, (_, last) = events_of([(0.0, body)])
    assert failed
    assert "broke the answer off" in json.loads(last)["error"]["message"]


def test_text_that_says_done_is_no_end() -> None:
    text = b'data: {"choices": [{"index": 0, "text": "data: [DONE]"}]}\n\n'
    _, failed = relayed([text], None)
    assert failed
