"""Runs inside vLLM: a request of the base arm cannot be answered with a new token.

One engine with the expanded rows serves both arms. What the base arm must not write are the rows behind the
base's ids, a suffix of the logits, so the ban is one slice per step for all requests that carry

    "vllm_xargs": {"vocabext_arm": "base"}

Their logits become minus infinity before anything is sampled, whatever bias, temperature or grammar a request
has. vLLM loads the class by name: `--logits-processors vocabext.serve.gateway.ban:BanNewTokens`. Why not vLLM's own
`allowed_token_ids`, `logit_bias` or `bad_words`: benchmarks/gateway_ban.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vocabext.checkpoint.manifest import read_manifest
from vocabext.serve.gateway.arms import ARMS, BASE
from vocabext.serve.gateway.front import ARM_ARGUMENT

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class BanNewTokens(LogitsProcessor):
    """Takes the new tokens out of the logits of base requests."""

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse an arm that does not exist: a misspelt name would be no ban.

        Raises:
            ValueError: If there is no such arm.
        """
        arm = (sampling_params.extra_args or {}).get(ARM_ARGUMENT)
        if arm is not None and arm not in ARMS:
            raise ValueError(f"{ARM_ARGUMENT} is {arm!r}; it must be one of {ARMS}")

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        """Find out from vocabext.json where the new tokens begin."""
        self._first_new_id = read_manifest(Path(vllm_config.model_config.model)).first_new_id
        self._device = device
        self._banned: dict[int, bool] = {}
        self._rows = torch.empty(0, dtype=torch.long, device=device)

    def is_argmax_invariant(self) -> bool:
        """Tell vLLM to apply this to greedy requests, too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests through the batch."""
        if process_dict_updates(self._banned, batch_update, _is_base):
            self._rows = torch.tensor(sorted(self._banned), dtype=torch.long, device=self._device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Take the new tokens out of the rows of base requests, in place.

        Args:
            logits: Shape (requests, rows of the vocabulary).
        """
        if not self._banned:
            return logits
        if len(self._banned) == len(logits):
            logits[:, self._first_new_id:] = -torch.inf
        else:
            logits[self._rows, self._first_new_id:] = -torch.inf
        return logits


def _is_base(params: "SamplingParams", _prompt: Any, _output: Any) -> bool | None:
    return True if (params.extra_args or {}).get(ARM_ARGUMENT) == BASE else None
