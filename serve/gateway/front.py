"""One engine, two tokenizers: what the base arm sends to the expanded engine.

The engine holds the expanded rows. A base request reaches it as base ids, which mean there what they always
meant, together with the ban on new tokens (ban.py). Ids are made in two ways:

    a prompt   the base tokenizer, here, with the special tokens that frame a prompt
    a chat     the engine's own `/tokenize`, which applies the chat template exactly as its chat endpoint does,
               and then `unmerge`: that is what the base tokenizer would have said (vocabext/expansion.py)

Both go to `/v1/completions`, which has taken ids since vLLM's first versions. vLLM's render servers and
`/inference/v1/generate` would do the same in one more process, and are switched off by default as unfinished
(docs/decisions.md). Text comes back from the engine: base ids decode alike under both tokenizers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serve.gateway.answers import Refusal
from serve.gateway.arms import BASE, EXPANDED, Arm
from serve.gateway.calls import COMPLETIONS, DETOKENIZE, Call, Request
from serve.gateway.chat import ChatConverter
from serve.gateway.logprobs import LogprobsConverter
from serve.gateway.upstream import forwarded
from vocabext.expansion import Expansion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from serve.gateway.app import Gateway

ARM_ARGUMENT = "vocabext_arm"
# Fields of a chat request that are used up by its rendering.
_RENDERED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template",
             "chat_template_kwargs", "add_special_tokens", "documents", "media_io_kwargs", "mm_processor_kwargs")
TOKENIZE_FIELDS = tuple(name for name in _RENDERED if name != "documents")
# Fields of a chat request that a completion does not have.
_CHAT_ONLY = ("tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "max_completion_tokens",
              "reasoning_effort", "include_reasoning", "echo", "store", "metadata", "service_tier", "modalities")


class BaseFront:
    """Turns requests of the base arm into requests of ids, and the answers back."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", expansion: Expansion) -> None:
        """Serve the base arm of an expanded engine.

        Args:
            tokenizer: The base's, as transformers loads it.
            expansion: The new tokens.
        """
        self._tokenizer = tokenizer
        self.expansion = expansion

    async def call(self, request: Request, arm: Arm, gateway: "Gateway") -> Call:
        """Return what to send to the engine.

        Raises:
            Refusal: 400 if the request asks for something that the base arm of one engine cannot do.
        """
        document = dict(request.document)
        if document.get("model") in gateway.names():
            document["model"] = arm.model
        if request.path == DETOKENIZE:
            self._check_ids(document.get("tokens"), "tokens")
            return Call(request.path, json.dumps(document).encode())
        if not request.is_generation:
            return Call(request.path, json.dumps(document).encode(), UnmergeConverter(self.expansion))
        self._check(document)
        arguments = document.get("vllm_xargs") or {}
        document["vllm_xargs"] = {**(arguments if isinstance(arguments, dict) else {}), ARM_ARGUMENT: BASE}
        if request.path == COMPLETIONS:
            return self._completion(document)
        return await self._chat(document, request, arm, gateway)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the base ids of a prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def decode(self, token_id: int) -> str:
        """Return the text of one token, as vLLM writes it into log-probabilities."""
        return str(self._tokenizer.decode([token_id]))

    def _completion(self, document: dict[str, Any]) -> Call:
        special = document.pop("add_special_tokens", True) is not False
        document["prompt"] = self._ids_of(document.get("prompt"), special=special)
        if document.get("logprobs") is None or document.get("return_tokens_as_token_ids"):
            return Call(COMPLETIONS, json.dumps(document).encode())
        document["return_tokens_as_token_ids"] = True
        converter = LogprobsConverter(self.decode, self.expansion.first_new_id)
        return Call(COMPLETIONS, json.dumps(document).encode(), converter)

    def _ids_of(self, prompt: Any, *, special: bool) -> Any:
        """Return a prompt of any form as ids."""
        if isinstance(prompt, str):
            return self.encode(prompt, special=special)
        if isinstance(prompt, list) and prompt and all(isinstance(part, str) for part in prompt):
            return [self.encode(part, special=special) for part in prompt]
        rows = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], list) else [prompt]
        for row in rows:
            self._check_ids(row, "prompt")
        return prompt

    async def _chat(self, document: dict[str, Any], request: Request, arm: Arm, gateway: "Gateway") -> Call:
        if document.get("tools") and document.get("tool_choice", "auto") != "none":
            raise Refusal(400, "tool calls are parsed by the engine's chat endpoint, which takes no ids: the base arm "
                               "of one engine cannot make them; use two engines, or tool_choice 'none'")
        if document.get("echo"):
            raise Refusal(400, "echo is not available for chats on the base arm of one engine")
        ids, longest = await self._render(document, request, arm, gateway)
        if len(ids) >= longest:
            raise Refusal(400, f"the chat has {len(ids)} tokens, and the model's context is {longest}")
        completion = {key: value for key, value in document.items() if key not in _RENDERED + _CHAT_ONLY}
        limit = document.get("max_completion_tokens")
        limit = document.get("max_tokens") if limit is None else limit
        completion.update(prompt=ids, max_tokens=longest - len(ids) if limit is None else limit)
        top = None
        if document.get("logprobs"):
            top = int(document.get("top_logprobs") or 0)
            completion.update(logprobs=top, return_tokens_as_token_ids=True)
        return Call(COMPLETIONS, json.dumps(completion).encode(),
                    ChatConverter(self.decode, self.expansion.first_new_id, top))

    async def _render(
        self, document: Mapping[str, Any], request: Request, arm: Arm, gateway: "Gateway"
    ) -> tuple[list[int], int]:
        """Return the base ids of a chat, and the length of the model's context."""
        body = {key: document[key] for key in (*TOKENIZE_FIELDS, "model") if document.get(key) is not None}
        if document.get("tool_choice") == "none":
            body.pop("tools", None)
        status, answer = await gateway.upstream.post_json(
            f"{arm.url}/tokenize", json.dumps(body).encode(), arm=arm.name, headers=forwarded(request.headers))
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
        bias = document.get("logit_bias")
        if isinstance(bias, dict):
            try:
                self._check_ids([int(key) for key in bias], "logit_bias")
            except ValueError:
                raise Refusal(400, "the keys of logit_bias must be token ids") from None

    def _check_ids(self, ids: Any, name: str) -> None:
        if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(type(i) is int for i in ids):
            raise Refusal(400, f"{name} must be a list of token ids" + (", or text" if name == "prompt" else ""))
        if unknown := [i for i in ids if not 0 <= i < self.expansion.first_new_id]:
            raise Refusal(400, f"{name} has the token id {unknown[0]}, the vocabulary has "
                               f"{self.expansion.first_new_id} ids")


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


async def check_ban(gateway: "Gateway", front: BaseFront, url: str, model: str, headers: Mapping[str, str]) -> str:
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
        status, answer = await gateway.upstream.post_json(f"{url}/v1/completions", json.dumps(body).encode(),
                                                          arm=arm, headers=headers)
        if status != 200:
            return f"the engine answered a trial request with status {status}: {answer[:200].decode(errors='replace')}"
        written[arm] = json.loads(answer)["choices"][0].get("token_ids") or []
    if any(i >= first for i in written[BASE]):
        return ("the engine does not ban new tokens from base requests; start it with --logits-processors "
                "serve.gateway.ban:BanNewTokens")
    if first not in written[EXPANDED]:
        return f"the trial could not make the engine write the new token {first}, so the ban cannot be checked"
    return ""
