"""A frozen causal language model: rows in, hidden states and logits out.

Shape suffixes: B batch, T positions, D hidden size, V base rows, N new rows.

Distillation and evaluation never need an expanded model. A new token is one more row to look up, so
both run the base model on embeddings that they put together themselves, and one loaded model serves
base, mean-of-pieces and distilled rows side by side.

This is the only module that imports the models of transformers.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vocabext.config import DEVICE
from vocabext.errors import CheckpointError, UsageError


def pick_device(name: str) -> torch.device:
    """Return the device for `--device`: `auto` takes a GPU where there is one.

    Raises:
        UsageError: If the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(DEVICE, name):
        raise UsageError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device is {name!r}, but torch sees no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here, from cuda:0 on")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for `--dtype`: `auto` takes bfloat16 where the hardware multiplies it.

    Raises:
        UsageError: If the name is none of auto, bfloat16, float16, float32.
    """
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise UsageError(f"--dtype is {name!r}; it must be auto, {', '.join(dtypes)}")
    return dtypes[name]


def layer_number(target: str, num_layers: int) -> int:
    """Return the number of layers to run for a target layer.

    Args:
        target: `last`, a number from 1 to L, or a fraction of the depth between 0 and 1.
        num_layers: The depth L.

    Raises:
        UsageError: If it is none of these.
    """
    if target == "last":
        return num_layers
    try:
        layer = math.ceil(float(target) * num_layers) if "." in target else int(target)
    except ValueError:
        layer = 0
    if not 1 <= layer <= num_layers:
        raise UsageError(f"--target-layer is {target!r}; it must be 'last', a number from 1 to {num_layers}, "
                         "or a fraction such as 0.5")
    return layer


def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class FrozenModel:
    """A causal language model in evaluation mode without gradients of its own.

    Attributes:
        model: The transformers model.
        device: Where it lives.
        dtype: What it computes in.
        num_layers: Its depth L.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Freeze a transformers causal language model; use `load_model` to load one."""
        # Evaluation mode: dropout would make teacher and student differ by chance.
        self.model: Any = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype
        self._body: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.num_layers = int(self._text_config.num_hidden_layers)

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def embedding_VD(self) -> torch.Tensor:  # noqa: N802
        """The input embedding matrix as stored."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def head_VD(self) -> torch.Tensor:  # noqa: N802
        """The output matrix as stored; the same as the input matrix where they are tied."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def tied(self) -> bool:
        """Whether input and output matrix are one."""
        return self.embedding_VD.data_ptr() == self.head_VD.data_ptr()

    @property
    def max_positions(self) -> int:
        """The longest input the model was made for."""
        return int(getattr(self._text_config, "max_position_embeddings", 0) or 2048)

    def layer_number(self, target: str) -> int:
        """Return the number of layers to run for a target layer, as the function of this name does."""
        return layer_number(target, self.num_layers)

    def embed(self, ids_BT: torch.Tensor, rows_ND: torch.Tensor | None = None, first_new_id: int = 0) -> torch.Tensor:
        """Look up embeddings, new tokens included.

        Args:
            ids_BT: Token ids; those from `first_new_id` on are new.
            rows_ND: The new rows; gradients flow into them.
            first_new_id: The id of `rows_ND[0]`.

        Returns:
            What the first layer reads, (B, T, D), in the model's dtype.
        """
        layer = self.model.get_input_embeddings()
        new_BT = ids_BT >= first_new_id if rows_ND is not None else torch.zeros_like(ids_BT, dtype=torch.bool)
        base_BTD: torch.Tensor = layer(ids_BT.masked_fill(new_BT, 0))
        if rows_ND is None:
            return base_BTD
        # Some models (Gemma) scale what they look up; a new row is stored unscaled like the others.
        scale = float(getattr(layer, "embed_scale", 1.0))
        looked_up_BTD = rows_ND[(ids_BT - first_new_id).clamp(min=0)].to(base_BTD.dtype) * scale
        return torch.where(new_BT.unsqueeze(-1), looked_up_BTD, base_BTD)

    def hidden(
        self, inputs_BTD: torch.Tensor, *, layer: int | None = None, position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Run the model up to a layer; nothing above it is computed.

        Padding belongs on the right: attention is causal, so that it changes nothing on its left.

        Args:
            inputs_BTD: Embeddings from `embed`.
            layer: How many layers to run; None or L runs all and applies the final norm.
            position_ids: Positions (B, T), where they are not 0 .. T-1.
            mask: Additive attention mask (B, 1, T, T), where it is not the causal one.

        Returns:
            Hidden states (B, T, D).
        """
        options: dict[str, Any] = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        hidden_BTD: torch.Tensor
        layers, norm = getattr(self._body, "layers", None), getattr(self._body, "norm", None)
        if layer is None or layer == self.num_layers:
            hidden_BTD = self._body(inputs_embeds=inputs_BTD, **options).last_hidden_state
        elif isinstance(layers, nn.ModuleList) and norm is not None:
            try:
                self._body.layers, self._body.norm = layers[:layer], nn.Identity()
                hidden_BTD = self._body(inputs_embeds=inputs_BTD, **options).last_hidden_state
            finally:
                self._body.layers, self._body.norm = layers, norm
        else:  # a body of another shape: run all of it and pick
            hidden_BTD = self._body(inputs_embeds=inputs_BTD, output_hidden_states=True, **options).hidden_states[layer]
        return hidden_BTD

    def log_probabilities(
        self, hidden_PD: torch.Tensor, *, num_base: int, new_rows_ND: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return next-token log probabilities over the ids in use.

        Args:
            hidden_PD: Final hidden states at P positions.
            num_base: How many base ids are in use; rows beyond them are padding and left out.
            new_rows_ND: Output rows of the new tokens; None predicts base tokens only.

        Returns:
            Log probabilities (P, num_base + N), float32.
        """
        return torch.log_softmax(self.logits(hidden_PD, num_base=num_base, new_rows_ND=new_rows_ND), dim=-1)

    def logits(
        self, hidden_PD: torch.Tensor, *, num_base: int, new_rows_ND: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what `log_probabilities` normalises, (P, num_base + N), float32."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden_PD)[:, :num_base]
        if new_rows_ND is not None:
            logits = torch.cat((logits, hidden_PD @ new_rows_ND.to(hidden_PD.dtype).T), dim=1)
        logits = logits.float()
        if cap := getattr(self._text_config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, temperature: float, seed: int,
              num_used_ids: int) -> list[list[int]]:  # fmt: skip
        """Continue prompts of equal length by sampling; returns the new ids of each."""
        torch.manual_seed(seed)
        ids = torch.tensor([list(p) for p in prompts], device=self.device)
        unused = torch.arange(num_used_ids, self.head_VD.shape[0], device=self.device).tolist()
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=True,
            temperature=temperature, top_k=0, top_p=0.95, suppress_tokens=unused or None,
            pad_token_id=getattr(self.model.config, "pad_token_id", None) or 0,
        )  # fmt: skip
        return [row[len(prompts[0]) :].tolist() for row in out]


def load_model(
    folder: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> FrozenModel:
    """Load a causal language model, frozen.

    Raises:
        CheckpointError: If transformers cannot load it.
        UsageError: If the device or dtype does not exist here.
    """
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    number = pick_dtype(dtype, place)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=number, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds; each means the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {folder}: {reason}") from error
    if model.get_output_embeddings() is None:
        raise CheckpointError(f"{folder} has no output head ({type(model).__name__}); "
                              "a causal language model is needed")
    return FrozenModel(model, place, number)
