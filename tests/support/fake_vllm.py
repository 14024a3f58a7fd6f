"""A stand-in for a vLLM server that can be told to misbehave: `fake_vllm.py PORT NAME [--delay SECONDS] [--tokens N]`.

Every token of an answer carries the server's name and the request's number, so that an answer made of two shows.
What a prompt says is done: `fault:hang` (no answer), `fault:hang-later` (stops in mid-stream), `fault:die-later`
(the process ends in mid-stream), `fault:500`, `fault:400`, `fault:cut` (ends without [DONE]), `fault:not-json`,
`fault:drop-once` (closes the connection of the first such request without an answer). A server named `expanded` has
the new tokens of `NEW`, and writes them gladly: a prompt's ids have log-probability -1.5 each there, and -1 elsewhere;
behind `misread` it is 1 less. With `--bans` it keeps new tokens out of the base arm's answers, as the ban does.
"""

import argparse
import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("name")
parser.add_argument("--delay", type=float, default=0.002)
parser.add_argument("--first-delay", type=float, default=0.0)
parser.add_argument("--tokens", type=int, default=8)
parser.add_argument("--model", default="")
parser.add_argument("--share-failing", type=float, default=0.0)
parser.add_argument("--bans", action="store_true")
OPTIONS = parser.parse_args()
NAME, MODEL = OPTIONS.name, OPTIONS.model or f"{OPTIONS.name}-model"
numbers = itertools.count()
running: dict[str, int] = {"now": 0, "begun": 0, "aborted": 0}
seen: list[dict[str, Any]] = []
dropped: list[int] = []
NEW = {"misread": 0xE000, "well read": 0xE001}


def said(document: dict[str, Any]) -> str:
    if "messages" in document:
        return str(document["messages"][-1]["content"])
    return str(document.get("prompt", ""))


def fault_of(document: dict[str, Any]) -> str:
    text = said(document)
    return text.partition("fault:")[2].split()[0] if "fault:" in text else ""


def tokens_of(document: dict[str, Any], number: int) -> list[str]:
    count = document.get("max_tokens") or document.get("max_completion_tokens") or OPTIONS.tokens
    if document.get("temperature") == 0:  # a greedy answer is a function of the prompt
        return [f" {NAME[:1] if 'differ' in said(document) else 'x'}é{len(said(document))}.{i}" for i in range(count)]
    return [f" {NAME}:{number}:{i}" for i in range(count)]


def frame(chat: bool, number: int, stream: bool) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
    return {"id": f"{'chatcmpl' if chat else 'cmpl'}-{NAME}-{number}", "object": kind, "created": 1, "model": MODEL}


async def generate(request: Request) -> Response:
    body = await request.body()
    document = json.loads(body)
    seen.append({"path": request.url.path, "document": document, "headers": dict(request.headers)})
    del seen[:-50]
    if document.get("prompt_logprobs") is not None:
        ids = document["prompt"]
        found = -1.0 - 0.5 * (NAME == "expanded") - (NEW["misread"] in ids)
        steps = [None, *({str(i): {"logprob": found}} for i in ids[1:])]
        return JSONResponse({**frame(False, 0, False), "choices": [{"text": "x", "prompt_logprobs": steps}]})
    if document.get("return_token_ids"):  # the gateway's trial of the ban
        banned = OPTIONS.bans and (document.get("vllm_xargs") or {}).get("vocabext_arm") == "base"
        ids = [65] if banned else [int(key) for key in document["logit_bias"]]
        return JSONResponse({**frame(False, 0, False), "choices": [{"text": "x", "token_ids": ids}]})
    number, fault, chat = next(numbers), fault_of(document), "chat" in request.url.path
    if OPTIONS.share_failing and number * OPTIONS.share_failing % 1 < OPTIONS.share_failing:
        fault = fault or "500"
    if fault in ("500", "400"):
        return JSONResponse({"error": {"message": f"asked for {fault}", "code": int(fault)}}, int(fault))
    if fault == "drop-once" and not dropped:
        dropped.append(number)
        request.scope["state_transport"]()
    if fault == "not-json":
        return Response("<html>", media_type="application/json")
    tokens = tokens_of(document, number)
    usage = {"prompt_tokens": 3, "completion_tokens": len(tokens), "total_tokens": 3 + len(tokens)}
    if document.get("stream"):
        return StreamingResponse(stream(document, number, tokens, fault, chat, usage), media_type="text/event-stream")
    running["now"] += 1
    running["begun"] += 1
    try:
        for _ in range(10_000 if fault == "hang" else 1):
            await asyncio.sleep(OPTIONS.first_delay + OPTIONS.delay * len(tokens))
            if await request.is_disconnected():
                running["aborted"] += 1
                return Response(status_code=499)
    finally:
        running["now"] -= 1
    text = "".join(tokens)
    part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choices = [{"index": i, **part, "logprobs": None, "finish_reason": "length"} for i in range(document.get("n") or 1)]
    return JSONResponse({**frame(chat, number, False), "choices": choices, "usage": usage})


async def stream(
    document: dict[str, Any], number: int, tokens: list[str], fault: str, chat: bool, usage: dict[str, int]
) -> AsyncIterator[bytes]:
    running["now"] += 1
    running["begun"] += 1
    try:
        await asyncio.sleep(OPTIONS.first_delay)
        head = frame(chat, number, True)
        if chat:
            yield event({**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for i, token in enumerate(tokens):
            if i == 3 and fault == "hang-later":
                await asyncio.sleep(1e6)
            if i == 3 and fault == "die-later":
                os._exit(9)
            if i == 3 and fault == "cut":
                return
            await asyncio.sleep(OPTIONS.delay)
            part = {"delta": {"content": token}} if chat else {"text": token}
            last = "length" if i == len(tokens) - 1 else None
            yield event({**head, "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": last}]})
        if (document.get("stream_options") or {}).get("include_usage"):
            yield event({**head, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        running["aborted"] += 1
        raise
    finally:
        running["now"] -= 1


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


async def models(_: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 128}]})


async def health(_: Request) -> Response:
    return Response()


async def tokenize(request: Request) -> Response:
    document = json.loads(await request.body())
    text = document.get("prompt") or said(document)
    for token, new_id in NEW.items() if NAME == "expanded" else ():
        text = text.replace(token, chr(new_id))
    ids = [ord(c) for c in text]
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": 128, "token_strs": None})


async def inspect(_: Request) -> Response:
    return JSONResponse({"running": running, "seen": seen})


PATHS = {"/v1/completions": generate, "/v1/chat/completions": generate, "/tokenize": tokenize}
app = Starlette(routes=[*(Route(path, handler, methods=["POST"]) for path, handler in PATHS.items()),
                        Route("/v1/models", models), Route("/health", health), Route("/inspect", inspect)])


class Droppable(HttpToolsProtocol):
    def on_headers_complete(self) -> None:
        self.scope["state_transport"] = self.transport.abort
        super().on_headers_complete()


uvicorn.run(app, host="127.0.0.1", port=OPTIONS.port, log_level="critical", http=Droppable, timeout_keep_alive=60)
