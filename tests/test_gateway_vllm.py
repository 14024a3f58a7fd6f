"""One real vLLM engine with the expanded rows, and the gateway that serves both arms with it."""

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_rig import Running, events, gateway, text_of
from tiny_expanded import TOKENS, expanded_pair

from vocabext.checkpoint.manifest import read_manifest
from vocabext.serve.engine import group_members
from vocabext.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.vllm, pytest.mark.fuzz,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
TEXT = "so the heart of the muscles, and a muscle of the heart are rated"
BASE, EXPANDED = {"x-vocabext-arm": "base"}, {"x-vocabext-arm": "expanded"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return expanded_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def running(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("gateway")
    with gateway(folder, str(folders[0]), str(folders[1]), "--one-engine", "--unverified", "--model-name", "m",
                 "--logs", str(folder / "logs"), "--", "--max-num-seqs", "8", "--dtype", "float32",
                 timeout_seconds=240, real_engines=True) as found:
        yield found
    if os.environ.get("SHOW_LOGS"):
        subprocess.run(["tail", "-50", str(folder / "logs" / "expanded.log")], check=False)


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with running.client() as found:
        yield found


def complete(client: httpx.Client, arm: dict[str, str], **more: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": TEXT, "max_tokens": 12, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body, headers=arm)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-vocabext-arm"] == arm["x-vocabext-arm"]
    return dict(answer.json())


def chat(client: httpx.Client, arm: dict[str, str], **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 12, "temperature": 0, **more}
    answer = client.post("/v1/chat/completions", json=body, headers=arm)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_each_arm_reads_the_ids_of_its_own_tokenizer(
    client: httpx.Client, folders: tuple[Path, Path]
) -> None:
    base, expanded = (load_tokenizer(folder).hf for folder in folders)
    assert len(base.encode(TEXT)) > len(expanded.encode(TEXT))
    for arm, tokenizer in ((BASE, base), (EXPANDED, expanded)):
        found = complete(client, arm, return_token_ids=True)
        assert found["choices"][0]["prompt_token_ids"] == tokenizer.encode(TEXT)
        assert found["usage"]["prompt_tokens"] == len(tokenizer.encode(TEXT))
        talked = chat(client, arm)
        assert talked["usage"]["prompt_tokens"] == len(tokenizer.encode(TEXT, add_special_tokens=False))
        tokens = client.post("/tokenize", json={"model": "m", "prompt": TEXT}, headers=arm).json()
        assert tokens["tokens"] == tokenizer.encode(TEXT)
        assert tokens["count"] == len(tokens["tokens"])


def test_the_base_arm_answers_as_the_base_model_does(client: httpx.Client, folders: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    hf, model = load_tokenizer(folders[0]).hf, AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    ids = hf.encode(TEXT, return_tensors="pt")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                              pad_token_id=1)[0, ids.shape[1]:]
    found = complete(client, BASE, return_token_ids=True)["choices"][0]
    assert found["token_ids"] == expected.tolist()
    assert found["text"] == hf.decode(expected, skip_special_tokens=True)
    talked = chat(client, BASE)["choices"][0]["message"]
    assert talked["role"] == "assistant"
    assert talked["content"] == found["text"]  # the template is the text alone


@pytest.mark.parametrize("more", [
    {}, {"reasoning_effort": "low"}, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
    {"documents": [{"title": "a", "text": "b"}], "chat_template_kwargs": {"documents": [], "mood": "good"}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "none"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}],
     "add_generation_prompt": False, "continue_final_message": True},
])
def test_a_chat_is_rendered_from_what_the_chat_endpoint_takes(more: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    from vocabext.serve.gateway.front import rendering_of

    document = {"messages": [{"role": "user", "content": "a"}], **more}
    asked = TokenizeChatRequest(**rendering_of(document))
    chat = ChatCompletionRequest(**json.loads(json.dumps(document)))
    names = ("chat_template", "chat_template_kwargs", "media_io_kwargs")
    one, two = (request.build_chat_params(None, "auto") for request in (asked, chat))
    assert [getattr(one, name) for name in names] == [getattr(two, name) for name in names]
    assert (asked.messages, asked.tools) == (chat.messages, chat.tools)


def test_the_ban_holds_where_the_engine_wants_a_new_token(
    running: Running, client: httpx.Client, folders: tuple[Path, Path]
) -> None:
    first = read_manifest(folders[1]).first_new_id
    engine = running.document["engines"]["expanded"]["url"]
    forced = {"model": "m", "prompt": [5, 6], "max_tokens": 6, "ignore_eos": True, "return_token_ids": True,
              "logit_bias": {str(first): 100}}
    for temperature in (0, 1, 1.9):
        for arm, banned in (("expanded", False), ("base", True)):
            body = {**forced, "temperature": temperature, "n": 1 if temperature == 0 else 4,
                    "vllm_xargs": {"vocabext_arm": arm}}
            answer = httpx.post(f"{engine}/v1/completions", json=body, trust_env=False, timeout=60).json()
            ids = [i for choice in answer["choices"] for i in choice["token_ids"]]
            assert len(ids) >= 6
            assert (max(ids) < first) == banned
    misspelt = httpx.post(f"{engine}/v1/completions", json={**forced, "vllm_xargs": {"vocabext_arm": "Base"}},
                          trust_env=False, timeout=60)
    assert misspelt.status_code == 400
    # Both arms in one batch: the ban is by request.
    body = {"model": "m", "prompt": "a", "max_tokens": 30, "ignore_eos": True, "return_token_ids": True, "n": 4,
            "temperature": 1.5}
    assert max(i for c in complete(client, BASE, **body)["choices"] for i in c["token_ids"]) < first


def test_a_new_token_can_be_written_by_the_expanded_arm_and_a_stop_string_inside_it_stops(
    client: httpx.Client, folders: tuple[Path, Path]
) -> None:
    first = read_manifest(folders[1]).first_new_id
    bias = {str(first): 100}
    assert complete(client, EXPANDED, logit_bias=bias, max_tokens=2)["choices"][0]["text"] == TOKENS[0] * 2
    stopped = complete(client, EXPANDED, logit_bias=bias, max_tokens=4, stop=["scle"])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (" mu", "stop")


@pytest.mark.parametrize(("more", "message"), [
    ({"prompt": [5, 299]}, "prompt has the token id 299"),
    ({"logit_bias": {"291": 5}}, "logit_bias has the token id 291"),
    ({"use_beam_search": True}, "beam search"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"prompt": {"a": 1}}, "prompt must be a list of token ids, or text"),
])
def test_what_the_base_arm_cannot_do_is_refused(client: httpx.Client, more: dict[str, Any], message: str) -> None:
    answer = client.post("/v1/completions", json={"model": "m", "prompt": "a", **more}, headers=BASE)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_streams_add_up_to_the_whole(client: httpx.Client) -> None:
    for arm in (BASE, EXPANDED):
        whole = complete(client, arm, max_tokens=40)["choices"][0]["text"]
        body = {"model": "m", "prompt": TEXT, "max_tokens": 40, "temperature": 0, "stream": True}
        answer = client.post("/v1/completions", json=body, headers=arm)
        assert text_of(answer.text) == whole
        body = {**body, "messages": [{"role": "user", "content": TEXT}], "stream_options": {"include_usage": True}}
        body.pop("prompt")
        streamed = client.post("/v1/chat/completions", json=body, headers=arm).text
        assert text_of(streamed) == chat(client, arm, max_tokens=40)["choices"][0]["message"]["content"]
        parts = [json.loads(data) for data in events(streamed)[:-1]]
        assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} | (
            {} if arm == BASE else {k: v for k, v in parts[0]["choices"][0]["delta"].items()
                                    if k not in ("role", "content")})
        assert len({part["id"] for part in parts}) == 1
        assert parts[-1]["usage"]["completion_tokens"] > 0


def test_log_probabilities_name_no_new_token(client: httpx.Client, folders: tuple[Path, Path]) -> None:
    prompt = complete(client, BASE, prompt_logprobs=5, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert max(int(i) for row in prompt[1:] for i in row) < read_manifest(folders[1]).first_new_id
    found = complete(client, BASE, logprobs=5, max_tokens=6)["choices"][0]
    assert "".join(found["logprobs"]["tokens"]) == found["text"]
    assert found["logprobs"]["text_offset"][0] == 0
    assert not set(TOKENS) & {token for row in found["logprobs"]["top_logprobs"] for token in row}
    talked = chat(client, BASE, logprobs=True, top_logprobs=3, max_tokens=6)["choices"][0]["logprobs"]["content"]
    assert [row["token"] for row in talked] == found["logprobs"]["tokens"]
    assert all(len(row["top_logprobs"]) <= 3 for row in talked)
    assert talked[0]["bytes"] == list(talked[0]["token"].encode())
    echoed = complete(client, BASE, echo=True, max_tokens=3)["choices"][0]["text"]
    assert echoed.startswith(TEXT)


def test_structured_output_and_several_answers(client: httpx.Client) -> None:
    choices = ["the heart is rated", "a muscle of the rest"]  # both can be written with a new token
    for arm in (BASE, EXPANDED):
        content = chat(client, arm, structured_outputs={"choice": choices}, max_tokens=60)["choices"][0]["message"]
        assert content["content"] in choices
        several = complete(client, arm, n=3, temperature=1, seed=3)
        assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]


def test_the_official_client_works_on_both_arms(running: Running) -> None:
    with openai.OpenAI(base_url=running.document["url"], api_key="any",
                       http_client=httpx.Client(trust_env=False)) as api:
        for arm in (BASE, EXPANDED):
            whole = api.chat.completions.create(model="m", messages=[{"role": "user", "content": TEXT}], max_tokens=8,
                                                temperature=0, extra_headers=arm)
            parts = list(api.chat.completions.create(model="m", messages=[{"role": "user", "content": TEXT}],
                                                     max_tokens=8, temperature=0, stream=True, extra_headers=arm))
            assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
            text = api.completions.create(model="m", prompt=TEXT, max_tokens=8, temperature=0, extra_headers=arm)
            pieces = api.completions.create(model="m", prompt=TEXT, max_tokens=8, temperature=0, stream=True,
                                            extra_headers=arm)
            assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text


def test_the_engine_ends_with_the_gateway(running: Running) -> None:
    group = running.document["process_ids"]["expanded"]
    assert group_members(group)
    running.process.terminate()
    assert running.process.wait(timeout=60) == 143
    assert not group_members(group)
