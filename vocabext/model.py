"""A frozen causal language model: rows in, hidden states and logits out.

Shape suffixes: B batch, T positions, D hidden size, V base rows, N new rows.

Distillation and evaluation never need an expanded model. A new token is one more row to look up, so
both run the base model on embeddings that they put together themselves, and one loaded model serves
base, mean-of-pieces and distilled rows side by side.

This is the only module that imports the models of transformers.
"""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vocabext.architecture import read_config
from vocabext.config import DEVICE
from vocabext.errors import CheckpointError, UsageError

# For each layer its keys and values, (B, heads, T, size of a head).
Past = Sequence[tuple[torch.Tensor, torch.Tensor]]
# What transformers calls the norm after the last layer: Llama and most others, GPT-2, GPT-NeoX, ...
PROBE_POSITIONS = 32
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


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


def _recompute_layers(body: nn.Module) -> None:
    """Let each layer compute its inner states again for the gradient, so that its weights need not stay."""
    from torch.utils.checkpoint import checkpoint

    def wrap(forward: Any) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*inputs, **options)
            return checkpoint(forward, *inputs, use_reentrant=False, **options)

        return run

    for stack in (child for child in body.children() if isinstance(child, nn.ModuleList)):
        for layer in stack:
            layer.forward = wrap(layer.forward)


def parse_max_memory(text: str) -> dict[int | str, str]:
    """Read `--max-memory`, such as `0=20GiB,cpu=60GiB`: how much of the model each device may hold.

    Raises:
        UsageError: If it has another form.
    """
    limits: dict[int | str, str] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+|cpu)\s*=\s*(\d+(?:\.\d+)?\s*[KMGT]i?B)\s*", part)
        if not found:
            raise UsageError(f"--max-memory is {text!r}; it must be sizes by device, such as 0=20GiB,cpu=60GiB")
        name = found[1]
        limits[int(name) if name.isdigit() else name] = found[2].replace(" ", "")
    return limits


def _readable(past: Past) -> Any:
    """Return what transformers' layers read earlier keys and values from.

    Nothing is kept there: a layer's are put together in its turn only.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number
            keys, values = past[number]
            self.lazy_initialization(keys, values)
            self.keys, self.values = (one.new_empty(()).expand(one.shape) for one in (keys, values))  # the shapes alone

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
                   ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            before = past[self.number]
            return torch.cat((before[0], keys), dim=-2), torch.cat((before[1], values), dim=-2)

    cache = DynamicCache()
    cache.layers = [Layer(number) for number in range(len(past))]
    cache.layer_class_to_replicate = None
    return cache


def _cache(past: Past) -> Any:
    """Return what transformers' layers read earlier keys and values from, and append theirs to."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(past):
        cache.update(keys, values, number)
    return cache


class FrozenModel:
    """A causal language model in evaluation mode without gradients of its own.

    Attributes:
        model: The transformers model.
        device: Where it lives.
        dtype: What it computes in.
        num_layers: Its depth L.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Freeze a transformers causal language model; use `load_model` to load one.

        A model that accelerate has spread over devices stays where it is; `device` is then where its inputs go.
        """
        spread = getattr(model, "hf_device_map", None) is not None
        # Evaluation mode: dropout would make teacher and student differ by chance.
        self.model: Any = (model if spread else model.to(device=device, dtype=dtype)).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype
        self._body: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.num_layers = int(self._text_config.num_hidden_layers)
        # Some weights are elsewhere and come in for each layer's turn.
        self.offloaded = any(parameter.is_meta for parameter in self.model.parameters())
        if self.offloaded:
            _recompute_layers(self._body)

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _has_layer_types(self) -> bool:
        return bool(getattr(self._text_config, "layer_types", None))

    @property
    def _stack_names(self) -> tuple[str | None, str | None]:
        """The names of the body's list of layers and of its final norm, where it has them."""
        stacks = [name for name, child in self._body.named_children()
                  if isinstance(child, nn.ModuleList) and len(child) == self.num_layers]
        norms = [name for name in FINAL_NORMS if hasattr(self._body, name)]
        return stacks[0] if len(stacks) == 1 else None, norms[0] if norms else None

    @property
    def embedding_VD(self) -> torch.Tensor:  # noqa: N802
        """The input embedding matrix as stored."""
        return self._weight(self.model.get_input_embeddings())

    @property
    def head_VD(self) -> torch.Tensor:  # noqa: N802
        """The output matrix as stored; the same as the input matrix where they are tied."""
        return self._weight(self.model.get_output_embeddings())

    @property
    def tied(self) -> bool:
        """Whether input and output matrix are one."""
        into, out = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        if into.is_meta or out.is_meta:  # weights that are elsewhere have no address to compare
            return bool(self.model.config.get_text_config().tie_word_embeddings)
        return bool(into.data_ptr() == out.data_ptr())

    @property
    def head_bias_V(self) -> torch.Tensor | None:  # noqa: N802
        """The bias of the output head as stored; None if it has none."""
        head = self.model.get_output_embeddings()
        return None if getattr(head, "bias", None) is None else self._weight(head, "bias")

    def _weight(self, module: nn.Module, name: str = "weight") -> torch.Tensor:
        """Return a module's weight, or its bias, fetching it where it is offloaded."""
        weight: torch.Tensor = getattr(module, name)
        if not weight.is_meta:
            return weight
        from accelerate.utils import align_module_device  # type: ignore[import-untyped]

        with align_module_device(module):
            fetched: torch.Tensor = getattr(module, name).detach().clone()
        return fetched

    @property
    def weight_bytes(self) -> int:
        """How much memory the weights take; of those that are elsewhere, the largest layer or matrix, in its turn."""
        here = sum(parameter.nbytes for parameter in self.model.parameters() if not parameter.is_meta)
        stack, _ = self._stack_names
        layers = list(getattr(self._body, stack)) if stack else [self._body]
        matrices = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return here + max(sum(parameter.nbytes for parameter in module.parameters() if parameter.is_meta)
                          for module in (*layers, *matrices))  # fmt: skip

    @torch.no_grad()
    def past_bytes(self, layer: int | None = None) -> int:
        """Return how much memory the keys and values of one position take, measured on one position."""
        probe = self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        try:
            past = self.hidden_and_past(probe, layer=layer)[1]
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return 0  # a model that keeps its past in a way of its own; nobody asks it to
        return sum(keys.nbytes + values.nbytes for keys, values in past)

    def step_bytes(self, layer: int | None = None, *, positions: int = PROBE_POSITIONS, before: int = 0) -> int:
        """Return how much memory a text takes while gradients are computed, measured on one.

        Args:
            layer: How many layers run.
            positions: Positions of the text that are computed.
            before: Positions in front of them whose keys and values are kept.
        """
        known = {parameter.data_ptr() for parameter in self.model.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in known:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        options: dict[str, Any] = {}
        if before:
            with torch.no_grad():
                text = self.embed(torch.zeros(1, before, dtype=torch.long, device=self.device))
                past = self.hidden_and_past(text, layer=layer)[1]
            options = {"past": past, "position_ids": torch.arange(before, before + positions, device=self.device)[None],
                       "mask": torch.zeros(1, 1, positions, before + positions, dtype=self.dtype, device=self.device)}
        probe = self.embed(torch.zeros(1, positions, dtype=torch.long, device=self.device)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = self.hidden(probe, layer=layer, **options)
        del kept
        # While a layer runs, forward or backward, as much again is there for a moment as it keeps.
        return math.ceil(sum(sizes.values()) * (1 + 2 / (layer or self.num_layers)))

    @property
    def logit_cap(self) -> float | None:
        """The bound that the model puts on logits (Gemma 2); None for no bound."""
        cap = getattr(self._text_config, "final_logit_softcapping", None)
        return float(cap) if cap else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which generation ends, by the model's own settings."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)

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
        looked_up_BTD = self.scaled(rows_ND[(ids_BT - first_new_id).clamp(min=0)])
        return torch.where(new_BT.unsqueeze(-1), looked_up_BTD, base_BTD)

    def scaled(self, rows_D: torch.Tensor) -> torch.Tensor:
        """Return rows as the first layer reads them, in the model's dtype.

        Some models (Gemma) scale what they look up; a new row is stored unscaled like the others.
        """
        return rows_D.to(self.dtype) * float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))

    def hidden(
        self, inputs_BTD: torch.Tensor, *, layer: int | None = None, position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None, past: Past | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Run the model up to a layer; nothing above it is computed.

        Padding belongs on the right: attention is causal, so that it changes nothing on its left.

        Args:
            inputs_BTD: Embeddings from `embed`.
            layer: How many layers to run; None or L runs all and applies the final norm.
            position_ids: Positions (B, T), where they are not 0 .. T-1.
            mask: Additive attention mask (B, 1, T, T), where it is not the causal one.
            past: Keys and values of text before the inputs; then `position_ids` and `mask` are needed, and the mask
                is (B, 1, T, P + T).

        Returns:
            Hidden states (B, T, D).
        """
        options = {"position_ids": position_ids, "attention_mask": mask}
        if past is None:
            return self._run(inputs_BTD, layer, use_cache=False, **options)
        return self._run(inputs_BTD, layer, use_cache=True, past_key_values=_readable(past), **options)

    def hidden_and_past(
        self, inputs_BTD: torch.Tensor, *, layer: int | None = None, position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None, past: Past = (),
    ) -> tuple[torch.Tensor, Past]:  # fmt: skip
        """Run the model up to a layer as `hidden` does, and keep the keys and values of the layers that ran.

        Returns:
            Hidden states (B, T, D), and for each layer its keys and values (B, heads, P + T, size of a head). Fewer
            layers, or other lengths, mean that the model does not keep all of the past.
        """
        cache = _cache(past)
        hidden_BTD = self._run(inputs_BTD, layer, use_cache=True, past_key_values=cache, position_ids=position_ids,
                               attention_mask=mask)  # fmt: skip
        return hidden_BTD, tuple((kept.keys, kept.values) for kept in cache.layers if kept.is_initialized)

    def _run(self, inputs_BTD: torch.Tensor, layer: int | None, **options: Any) -> torch.Tensor:
        hidden_BTD: torch.Tensor
        stack, norm = self._stack_names
        if layer is None or layer == self.num_layers:
            hidden_BTD = self._body(inputs_embeds=inputs_BTD, **options).last_hidden_state
        elif stack and norm:
            layers, final = getattr(self._body, stack), getattr(self._body, norm)
            try:
                setattr(self._body, stack, layers[:layer])
                setattr(self._body, norm, nn.Identity())
                hidden_BTD = self._body(inputs_embeds=inputs_BTD, **options).last_hidden_state
            finally:
                setattr(self._body, stack, layers)
                setattr(self._body, norm, final)
        else:  # a body of another shape: run all of it and pick
            hidden_BTD = self._body(inputs_embeds=inputs_BTD, output_hidden_states=True, **options).hidden_states[layer]
        return hidden_BTD.to(inputs_BTD.device)  # of a model that is spread the last layer may be elsewhere

    def sliding_window(self, layer: int | None = None) -> int | None:
        """Return how far the first `layer` layers look back at least: None for all the way, 0 where it is unknown.

        Unknown are layers that are neither full nor sliding attention, such as recurrent ones.
        """
        kinds = set((getattr(self._text_config, "layer_types", None) or ["full_attention"])[:layer])
        if not kinds <= {"full_attention", "sliding_attention"}:
            return 0
        window = getattr(self._text_config, "sliding_window", None)
        return int(window) if window and ("sliding_attention" in kinds or not self._has_layer_types) else None

    def log_probabilities(
        self, hidden_PD: torch.Tensor, *, num_base: int, new_rows_ND: torch.Tensor | None = None,
        new_bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return next-token log probabilities over the ids in use.

        Args:
            hidden_PD: Final hidden states at P positions.
            num_base: How many base ids are in use; rows beyond them are padding and left out.
            new_rows_ND: Output rows of the new tokens; None predicts base tokens only.
            new_bias_N: Their entries of the head's bias; None for a head without one.

        Returns:
            Log probabilities (P, num_base + N), float32.
        """
        return torch.log_softmax(
            self.logits(hidden_PD, num_base=num_base, new_rows_ND=new_rows_ND, new_bias_N=new_bias_N), dim=-1)

    def logits(
        self, hidden_PD: torch.Tensor, *, num_base: int, new_rows_ND: torch.Tensor | None = None,
        new_bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return what `log_probabilities` normalises, (P, num_base + N), float32."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden_PD)[:, :num_base].to(hidden_PD.device)
        if new_rows_ND is not None:
            bias_N = None if new_bias_N is None else new_bias_N.to(hidden_PD)
            new_PN = nn.functional.linear(hidden_PD, new_rows_ND.to(hidden_PD), bias_N)
            logits = torch.cat((logits, new_PN), dim=1)
        logits = logits.float()
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

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


def check_runs_on_rows(config: Any) -> None:
    """Refuse a model whose layers look token ids up in tables of their own (Gemma 3n, Gemma 4).

    It is run on embeddings here, from which no layer can know the ids: transformers then leaves their part out, or
    fails.

    Args:
        config: The model's configuration, as transformers reads it.

    Raises:
        UsageError: If it has such tables.
    """
    size = getattr(config.get_text_config(), "hidden_size_per_layer_input", None)
    if size:
        name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise UsageError(
            f"{name} has hidden_size_per_layer_input {size}: its layers look up token ids themselves, so distill and "
            "eval cannot run it on new rows; `distill --method mean` and `patch` extend it without running it")


def check_folder_runs_on_rows(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Do what `check_runs_on_rows` does, before any weight is read.

    Raises:
        CheckpointError: If transformers cannot read the configuration.
        UsageError: As there.
    """
    check_runs_on_rows(read_config(folder, trust_remote_code=trust_remote_code))


@contextmanager
def offloading(beside: Path) -> Iterator[Path]:
    """Name a folder beside a path for weights that fit nowhere; it is removed at the end.

    `load_model` makes it when it is needed.
    """
    beside = beside.resolve()
    folder = beside.with_name(f".{beside.name}.offloaded")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_model(
    folder: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False,
    max_memory: str | None = None, offload_folder: Path | None = None,
) -> FrozenModel:  # fmt: skip
    """Load a causal language model, frozen.

    Args:
        folder: The model.
        device: Where to compute.
        dtype: In which numbers.
        trust_remote_code: Run code that comes with the model.
        max_memory: Spread the model over devices, such as `0=20GiB,cpu=60GiB`; what fits nowhere stays on disk.
        offload_folder: Where weights lie that fit nowhere.

    Raises:
        CheckpointError: If transformers cannot load it.
        UsageError: If the device or dtype does not exist here.
    """
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    number = pick_dtype(dtype, place)
    spread: dict[str, Any] = {}
    if max_memory is not None:
        spread = {"device_map": "auto", "max_memory": parse_max_memory(max_memory)}
        if offload_folder is not None:
            spread["offload_folder"] = str(offload_folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=number, trust_remote_code=trust_remote_code, use_safetensors=True, **spread
        )
    except Exception as error:  # transformers and safetensors raise many kinds; each means the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {folder}: {reason}") from error
    if model.get_output_embeddings() is None:
        raise CheckpointError(f"{folder} has no output head ({type(model).__name__}); "
                              "a causal language model is needed")
    return FrozenModel(model, place, number)
