"""One engine, two tokenizers: what the base arm sends to the expanded engine.

The engine holds the expanded rows. A base request reaches it as base ids, which mean there what they always
meant, together with the ban on new tokens (ban.py). Ids are made in two ways:

    a prompt   the base tokenizer, here, with the special tokens that frame a prompt
    a chat     the engine's own `/tokenize`, which applies the chat template as its chat endpoint does once it
               has been told what that endpoint adds by itself (`rendering_of`), and then `unmerge`: that is what
               the base tokenizer would have said (vocabext/tokens.py)

Both go to `/v1/completions`, which has taken ids since vLLM's first versions. vLLM's render servers and
`/inference/v1/generate` would do the same in one more process, and are switched off by default as unfinished
(docs/decisions/gateway.md). Text comes back from the engine: base ids decode alike under both tokenizers.
"""

import asyncio
import json
import os
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec

from vocabext.errors import TokenizerError
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import BASE, EXPANDED, Arm
from vocabext.serve.gateway.calls import COMPLETIONS, DETOKENIZE, Call, Request
from vocabext.serve.gateway.chat import ChatConverter
from vocabext.serve.gateway.logprobs import LogprobsConverter
from vocabext.serve.gateway.upstream import Upstream
from vocabext.tokens import Expansion

if TYPE_CHECKING:
    from vocabext.tokenizer import BaseTokenizer

ARM_ARGUMENT = "vocabext_arm"
# Fields of a chat request that are used up by its rendering.
_RENDERED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template",
             "chat_template_kwargs", "add_special_tokens", "documents", "media_io_kwargs", "mm_processor_kwargs")
_TOKENIZED = tuple(name for name in _RENDERED if name != "documents")
# Fields of a chat request that a completion does not have.
_CHAT_ONLY = ("tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "max_completion_tokens",
              "reasoning_effort", "include_reasoning", "echo", "store", "metadata", "service_tier", "modalities")
# What vLLM's chat endpoint takes as a reasoning_effort, and as a part of a message that is text.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "tool_reference")
_MEDIA = ("image", "audio", "video", "input_image", "input_audio", "prompt_embeds")
# Above this, a prompt is encoded beside the event loop: there, it takes longer than a token of a stream. The library
# lets go of the interpreter while it encodes, so threads are enough.
LONG_CHARACTERS = 8192
# Above this, it is encoded by threads of its own, so that those between the two do not wait for it.
HUGE_CHARACTERS = 2**17
WORKERS = max(2, min(4, os.cpu_count() or 1))


class BaseFront:
    """Turns requests of the base arm into requests of ids, and the answers back.

    Attributes:
        expansion: The new tokens.
        context: How many tokens the engine's context holds; 0 if it does not say.
        trouble: Why no request may reach the engine, such as a ban that was not checked; empty if it may.
    """

    def __init__(
        self, tokenizer: "BaseTokenizer", expansion: Expansion, *, excludes_tools: bool = False
    ) -> None:
        """Serve the base arm of an expanded engine.

        Args:
            tokenizer: The base's.
            expansion: The new tokens.
            excludes_tools: Whether the engine runs with `--exclude-tools-when-tool-choice-none`.
        """
        self._tokenizer = tokenizer
        self._excludes_tools = excludes_tools
        self.expansion = expansion
        self.context = 0
        self.trouble = ""
        self._long, self._huge = (ThreadPoolExecutor(WORKERS, f"{name}-prompts") for name in ("long", "huge"))

    async def call(self, request: Request, arm: Arm, names: Container[str], upstream: Upstream) -> Call:
        """Return what to send to the engine.

        Args:
            request: The request.
            arm: The base arm.
            names: The names under which clients may ask for the model.
            upstream: The way to the engine, which renders chats.

        Raises:
            Refusal: 400 if the request asks for something that the base arm of one engine cannot do, 502 if the
                engine's ban on new tokens is not known to hold.
        """
        document = dict(request.document)
        if document.get("model") in names:
            document["model"] = arm.model
        if request.path == DETOKENIZE:
            self._check_ids(document.get("tokens"), "tokens")
            return Call(request.path, msgspec.json.encode(document))
        if not request.is_generation:
            return Call(request.path, msgspec.json.encode(document), UnmergeConverter(self.expansion))
        if self.trouble:
            raise Refusal(502, f"the base arm is not served: {self.trouble}")
        self._check(document)
        arguments = document.get("vllm_xargs") or {}
        document["vllm_xargs"] = {**(arguments if isinstance(arguments, dict) else {}), ARM_ARGUMENT: BASE}
        if request.path == COMPLETIONS:
            return await self._completion(document)
        return await self._chat(document, request, arm, upstream)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the base ids of a prompt.

        Raises:
            Refusal: 400 if the text is none that can be written in UTF-8, or the tokenizer gives up at it.
        """
        return _encode(self._tokenizer, [text], special)[0]

    def decode(self, token_id: int) -> str:
        """Return the text of one token, as vLLM writes it into log-probabilities."""
        return str(self._tokenizer.hf.decode([token_id]))

    async def _completion(self, document: dict[str, Any]) -> Call:
        special = document.pop("add_special_tokens", True) is not False
        # The engine would say the same, after it has read millions of ids.
        context = self.context if document.get("truncate_prompt_tokens") is None else 0
        rows, several = await self._rows_of(document.pop("prompt", None), context, special=special)
        longest = max(len(row) for row in rows)
        if 0 < context < longest:
            raise Refusal(400, f"the prompt has {longest} tokens, and the model's context is {context}")
        document["prompt"] = rows if several else rows[0]
        if document.get("logprobs") is None and document.get("prompt_logprobs") is None:
            return Call(COMPLETIONS, msgspec.json.encode(document))
        as_ids = bool(document.get("return_tokens_as_token_ids"))
        document["return_tokens_as_token_ids"] = True
        converter = LogprobsConverter(self.decode, self.expansion.first_new_id, as_ids=as_ids)
        return Call(COMPLETIONS, msgspec.json.encode(document), converter)

    async def _rows_of(self, prompt: Any, context: int, *, special: bool) -> tuple[list[list[int]], bool]:
        """Return a prompt of any form as ids, and whether it is several.

        Raises:
            Refusal: 400 if it is no prompt, or has more tokens than the context whatever they are.
        """
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
        rows = prompt if several else [prompt]
        if not all(isinstance(row, str) for row in rows):
            for row in rows:
                if not (context and isinstance(row, list) and len(row) > context):  # the caller refuses it for that
                    self._check_ids(row, "prompt")
            return rows, several
        longest, characters = self._tokenizer.longest_token, sum(map(len, rows))
        if context and (most := max(map(len, rows))) > context * longest:
            raise Refusal(400, f"the prompt has {most} characters; the model's context is {context} tokens, and none "
                               f"has more than {longest} characters")
        if characters <= LONG_CHARACTERS:
            return _encode(self._tokenizer, rows, special), several
        pool = self._long if characters <= HUGE_CHARACTERS else self._huge
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, _encode, self._tokenizer, rows, special), several

    async def _chat(self, document: dict[str, Any], request: Request, arm: Arm, upstream: Upstream) -> Call:
        if document.get("tools") and document.get("tool_choice", "auto") != "none":
            raise Refusal(400, "tool calls are parsed by the engine's chat endpoint, which takes no ids: the base arm "
                               "of one engine cannot make them; use two engines, or tool_choice 'none'")
        if document.get("echo"):
            raise Refusal(400, "echo is not available for chats on the base arm of one engine")
        top = document.get("top_logprobs")
        if top is not None and type(top) is not int:
            raise Refusal(400, f"top_logprobs is a JSON {type(top).__name__}, it must be a whole number")
        ids, longest = await self._render(document, request, arm, upstream)
        if len(ids) >= longest:
            raise Refusal(400, f"the chat has {len(ids)} tokens, and the model's context is {longest}")
        completion = {key: value for key, value in document.items() if key not in _CHAT_ONLY}
        limit = document.get("max_completion_tokens")
        limit = document.get("max_tokens") if limit is None else limit
        completion.update(prompt=ids, max_tokens=longest - len(ids) if limit is None else limit)
        top = (top or 0) if document.get("logprobs") else None
        if top is not None:
            completion.update(logprobs=top, return_tokens_as_token_ids=True)
        return Call(COMPLETIONS, msgspec.json.encode(completion),
                    ChatConverter(self.decode, self.expansion.first_new_id, top))

    async def _render(
        self, document: dict[str, Any], request: Request, arm: Arm, upstream: Upstream
    ) -> tuple[list[int], int]:
        """Take a chat out of a document; returns its base ids, and the length of the model's context."""
        rendering = rendering_of(document)
        if self._excludes_tools and document.get("tool_choice") == "none":
            rendering.pop("tools", None)
        body = msgspec.json.encode(rendering)
        del rendering
        for name in _RENDERED:  # as Python objects they may take many times the memory, while the engine is asked
            document.pop(name, None)
        status, answer = await upstream.post_json(f"{arm.url}/tokenize", body, arm=arm.name, headers=request.forwarded)
        try:
            found = json.loads(answer)
            if status == 200:
                return self.expansion.unmerge(found["tokens"]).tolist(), int(found["max_model_len"])
            message = found["error"]["message"]
        except (ValueError, KeyError, TypeError):
            status, message = 502, "the engine's /tokenize gave no answer that can be read"
        raise Refusal(status, message)

    def _check(self, document: Mapping[str, Any]) -> None:
        """Refuse what would let a new token in, or what cannot be said in ids."""
        if document.get("use_beam_search"):
            raise Refusal(400, "beam search reads log-probabilities past the ban on new tokens; it is not available "
                               "on the base arm of one engine")
        if document.get("bad_words"):
            raise Refusal(400, "bad_words are cut by the engine's own tokenizer; they are not available on the base "
                               "arm of one engine")
        for name in ("allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
            if document.get(name):
                self._check_ids(document[name], name)
        rows = document.get("prompt_logprob_token_ids")
        for row in rows if isinstance(rows, list) else [rows] if rows else ():
            self._check_ids(row if isinstance(row, list) else [row], "prompt_logprob_token_ids")
        bias = document.get("logit_bias")
        if isinstance(bias, dict):
            try:
                self._check_ids([int(key) for key in bias], "logit_bias")
            except ValueError:
                raise Refusal(400, "the keys of logit_bias must be token ids") from None

    def _check_ids(self, ids: Any, name: str) -> None:
        if not isinstance(ids, list) or not {*map(type, ids)} <= {int}:
            raise Refusal(400, f"{name} must be a list of token ids" + (", or text" if name == "prompt" else ""))
        end = self.expansion.first_new_id
        if ids and (min(ids) < 0 or max(ids) >= end):
            unknown = next(i for i in ids if not 0 <= i < end)
            raise Refusal(400, f"{name} has the token id {unknown}, the vocabulary has {end} ids")


def _encode(tokenizer: "BaseTokenizer", texts: Sequence[str], special: bool) -> list[list[int]]:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"the prompt has half of a surrogate pair at character {error.start}; it is no text"
                      ) from None
    try:
        return tokenizer.encode_batch(texts, framed=special)
    except TokenizerError as error:
        raise Refusal(400, str(error)) from None


def rendering_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to ask of vLLM's `/tokenize`, so that it renders a chat as the chat endpoint does.

    The chat endpoint gives the template three variables that `/tokenize` only takes by `chat_template_kwargs`, and
    reads a message's `reasoning_content` as its `reasoning`.

    Raises:
        Refusal: 400 if the chat cannot be said in ids, or the chat endpoint would refuse it.
    """
    body = {key: document[key] for key in (*_TOKENIZED, "model") if document.get(key) is not None}
    given, documents = document.get("chat_template_kwargs") or {}, document.get("documents")
    effort = document.get("reasoning_effort")
    if not isinstance(given, dict):
        raise Refusal(400, f"chat_template_kwargs is a JSON {type(given).__name__}, it must be an object")
    if effort is not None and effort not in _EFFORTS:
        raise Refusal(400, f"reasoning_effort must be one of {', '.join(_EFFORTS)}")
    if documents is not None and not _are_documents(documents):
        raise Refusal(400, "documents must be a list of objects whose values are strings")
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [_read_message(message) for message in messages]
    told = {"documents": documents, "reasoning_effort": effort,
            "enable_thinking": None if effort is None or "enable_thinking" in given else effort != "none"}
    if told := {**given, **{name: value for name, value in told.items() if value is not None}}:
        body["chat_template_kwargs"] = told
    return body


def _are_documents(documents: Any) -> bool:
    return isinstance(documents, list) and all(
        isinstance(one, dict) and all(isinstance(value, str) for value in one.values()) for one in documents)


def _read_message(message: Any) -> Any:
    """Return a message as the chat endpoint reads it.

    Raises:
        Refusal: 400 if it is more than text.
    """
    if not isinstance(message, dict):
        return message
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and (part.get("type", "text") not in _TEXT_PARTS
                                       or any(name.startswith(_MEDIA) for name in part)):
            raise Refusal(400, "images, audio and video are not in the ids of a prompt: the base arm of one engine "
                               "cannot be asked about them; use two engines")
    if "reasoning_content" not in message:
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    thought = message["reasoning_content"]
    return rest if thought is None or rest.get("reasoning") is not None else {**rest, "reasoning": thought}


class UnmergeConverter:
    """Turns the engine's answer to `/tokenize` into that of the base tokenizer."""

    def __init__(self, expansion: Expansion) -> None:
        """Unmerge by the runs of an expansion."""
        self._expansion = expansion

    def whole(self, body: bytes) -> bytes:
        """Convert an answer."""
        document = json.loads(body)
        document["tokens"] = self._expansion.unmerge(document["tokens"]).tolist()
        document["count"] = len(document["tokens"])
        document["token_strs"] = None
        return json.dumps(document).encode()

    def event(self, data: bytes) -> bytes:
        """Never called: these answers are no streams."""
        raise AssertionError("/tokenize does not stream")


async def check_ban(upstream: Upstream, front: BaseFront, url: str, model: str, headers: Mapping[str, str]) -> str:
    """Try to make the engine write a new token, with and without the ban.

    Returns:
        What is wrong; empty if the ban holds.
    """
    first = front.expansion.first_new_id
    written = {}
    for arm in (EXPANDED, BASE):
        body = {"model": model, "prompt": list(front.expansion.tokens[0].run), "max_tokens": 2, "temperature": 0,
                "logit_bias": {str(first): 100}, "return_token_ids": True, "ignore_eos": True,
                "vllm_xargs": {ARM_ARGUMENT: arm}}
        status, answer = await upstream.post_json(f"{url}/v1/completions", json.dumps(body).encode(),
                                                  arm=arm, headers=headers)
        if status != 200:
            return f"the engine answered a trial request with status {status}: {answer[:200].decode(errors='replace')}"
        try:
            written[arm] = json.loads(answer)["choices"][0].get("token_ids") or []
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "the engine's answer to a trial request cannot be read; is it a vLLM server?"
    if any(i >= first for i in written[BASE]):
        return ("the engine does not ban new tokens from base requests; start it with --logits-processors "
                "vocabext.serve.gateway.ban:BanNewTokens")
    if first not in written[EXPANDED]:
        return f"the trial could not make the engine write the new token {first}, so the ban cannot be checked"
    return ""
