"""A frozen causal language model: rows in, hidden states and logits out.

Shape suffixes: B batch, T positions, D hidden size, V base rows, N new rows.

Distillation and evaluation never need an expanded model. A new token is one more row to look up, so
both run the base model on embeddings that they put together themselves, and one loaded model serves
base, mean-of-pieces and distilled rows side by side.

This is the only module that imports the models of transformers.
"""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vocabext.checkpoint.architecture import Quiet, describe_misfit, loading_class, read_config
from vocabext.errors import CheckpointError, UsageError, in_one_line
from vocabext.files.atomic import real_path
from vocabext.files.folders import scratch_folder
from vocabext.model.branches import Branches, unrolled
from vocabext.model.logit_map import LogitMap, measure_logit_map
from vocabext.options import DEVICE

# What later text needs of earlier text. For each layer its keys and values, (B, heads, T, size of a head). Of a model
# that does not take branches, where these are not all there is: the embeddings themselves, as one pair with one head.
Past = Sequence[tuple[torch.Tensor, torch.Tensor]]
PROBE_POSITIONS = 32
# Two ways of adding up the same numbers may differ by this, relative to all of them together, per dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
# And the same way on the same text by this share of it.
SAME_WAY = 0.2
# A text on which a model is tried: a stem, far more off its first position than elsewhere, and a branch off its middle.
STEM, OFF_FIRST, ON_BRANCH = 6, 20, 3
# What configs call the longest input: most of them, MPT, GPT-2 of old, RWKV, ...
MAX_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "context_length", "seq_length")
UNBOUNDED = 2**31
WITHOUT_RUNNING = "`distill --method mean` and `patch` extend it without running it"


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
                   ) -> tuple[torch.Tensor, torch.Tensor]:
            before = past[self.number]
            return torch.cat((before[0], keys), dim=-2), torch.cat((before[1], values), dim=-2)

    cache = DynamicCache()
    cache.layers = [Layer(number) for number in range(len(past))]
    cache.layer_class_to_replicate = None
    return cache


def _cache(past: Past, room: int) -> Any:
    """Return what transformers' layers read earlier keys and values from, and write theirs behind without a copy.

    Args:
        past: Earlier text; empty for none.
        room: Positions that may follow.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        def __init__(self, *before: torch.Tensor) -> None:
            super().__init__()
            self.lazy_initialization(*before)
            self.whole = [one.new_empty((*one.shape[:2], one.shape[2] + room, one.shape[3])) for one in before]
            self.size = 0
            self.update(*before)

        def update(self, *pair: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            begin, self.size = self.size, self.size + pair[0].shape[2]
            for whole, one in zip(self.whole, pair[:2], strict=True):
                whole[:, :, begin : self.size] = one
            self.keys, self.values = (whole[:, :, : self.size] for whole in self.whole)
            return self.keys, self.values

    cache = DynamicCache()
    if past:
        cache.layers = [Layer(*pair) for pair in past]
        cache.layer_class_to_replicate = None
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
        self.model: Any = (model if spread else model.to(device)).eval().requires_grad_(False)
        # What was loaded in a dtype stays as it is: some parts, such as the frequencies of positions, keep more digits.
        if not spread and model.get_input_embeddings().weight.dtype != dtype:
            self.model.to(dtype)
        self.device, self.dtype = device, dtype
        self._body: Any = _body(model)
        self.num_layers = int(self._text_config.num_hidden_layers)
        # Some weights are elsewhere and come in for each layer's turn.
        self.offloaded = any(parameter.is_meta for parameter in self.model.parameters())
        if self.offloaded:
            _recompute_layers(self._body)

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _stack(self) -> nn.ModuleList | None:
        """The body's list of layers, where it has one."""
        stacks = [child for child in self._body.children()
                  if isinstance(child, nn.ModuleList) and len(child) == self.num_layers]
        return stacks[0] if len(stacks) == 1 else None

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
        layers = list(self._stack or [self._body])
        matrices = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return here + max(sum(parameter.nbytes for parameter in module.parameters() if parameter.is_meta)
                          for module in (*layers, *matrices))

    @torch.no_grad()
    def past_bytes(self, layer: int | None = None) -> int:
        """Return how much memory the keys and values of one position take; 0 where they are not kept."""
        if not self.takes_branches:
            return 0
        probe = self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return sum(keys.nbytes + values.nbytes for keys, values in self.hidden_and_past(probe, layer=layer)[1])

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
            behind = Branches.of(range(-1, before + positions - 1)).of_inputs(positions)
            options = {"past": past, "branches": behind}
        probe = self.embed(torch.zeros(1, positions, dtype=torch.long, device=self.device)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = self.hidden(probe, layer=layer, **options)
        del kept
        # While a layer runs, forward or backward, as much again is there for a moment as it keeps.
        return math.ceil(sum(sizes.values()) * (1 + 2 / (layer or self.num_layers)))

    @cached_property
    def logit_map(self) -> LogitMap:
        """What the class makes of the products of its head before it calls them logits; measured on the class."""
        return measure_logit_map(self.model, self._probe_ids()) or LogitMap()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which generation ends, by the model's own settings."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)

    @property
    def max_positions(self) -> int:
        """The longest input the model was made for; very long where it has no bound."""
        stated = (getattr(self._text_config, name, None) for name in MAX_POSITIONS)
        bound = next((size for size in stated if isinstance(size, int) and size > 0), UNBOUNDED)
        return min([bound, *(_learned_positions(name, module) for name, module in self._body.named_modules()
                             if isinstance(module, nn.Embedding))])

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
        new_BT = ids_BT >= first_new_id if rows_ND is not None else torch.zeros_like(ids_BT, dtype=torch.bool)
        base_BTD: torch.Tensor = self.model.get_input_embeddings()(ids_BT.masked_fill(new_BT, 0))
        base_BTD = base_BTD if self._input_scale == 1.0 else base_BTD * self._input_scale
        if rows_ND is None:
            return base_BTD
        looked_up_BTD = self._look_up((ids_BT - first_new_id).clamp(min=0), rows_ND)
        return torch.where(new_BT.unsqueeze(-1), looked_up_BTD, base_BTD)

    def scaled(self, rows_SD: torch.Tensor) -> torch.Tensor:
        """Return rows as the first layer reads them, in the model's dtype.

        Some models (Gemma) scale what they look up; a new row is stored unscaled like the others.
        """
        return self._look_up(torch.arange(len(rows_SD), device=rows_SD.device), rows_SD)

    def _look_up(self, at: torch.Tensor, rows_ND: torch.Tensor) -> torch.Tensor:
        """Let the class's own embedding look up rows as if they were its matrix."""
        found: torch.Tensor = torch.func.functional_call(
            self._bare_embedding, {"weight": rows_ND.to(self.dtype)}, (at.to(rows_ND.device),))
        return (found if self._input_scale == 1.0 else found * self._input_scale).to(self.dtype)

    @cached_property
    def _bare_embedding(self) -> nn.Module:
        """The embedding without what accelerate does to fetch its weight."""
        bare: Any = copy.copy(self.model.get_input_embeddings())
        bare.__dict__.pop("forward", None)
        bare.padding_idx = None  # no row of ours is padding
        found: nn.Module = bare
        return found

    def hidden(
        self, inputs_BTD: torch.Tensor, *, layer: int | None = None, branches: Branches | None = None,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Run the model up to a layer; nothing above it is computed.

        Padding belongs on the right: attention is causal, so that it changes nothing on its left.

        Args:
            inputs_BTD: Embeddings from `embed`.
            layer: How many layers to run; None or L runs all and applies the final norm.
            branches: What each position follows, where it is not the one on its left.
            past: What is kept of text before the inputs; then `branches` is needed.

        Returns:
            Hidden states (B, T, D).
        """
        if branches is None:
            return self._run(inputs_BTD, layer, use_cache=False)
        if not self.takes_branches:
            return unrolled(lambda texts: self._run(texts, layer, use_cache=False), _whole(inputs_BTD, past), branches)
        cache = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": _readable(past)}
        return self._run_branches(inputs_BTD, layer, branches, **cache)

    def hidden_and_past(
        self, inputs_BTD: torch.Tensor, *, layer: int | None = None, branches: Branches | None = None, past: Past = (),
    ) -> tuple[torch.Tensor, Past]:
        """Run the model up to a layer as `hidden` does, and keep what text after it needs.

        Returns:
            Hidden states (B, T, D), and for each layer its keys and values (B, heads, P + T, size of a head). Fewer
            layers, or other lengths, mean that the model does not keep all of the past.
        """
        if not self.takes_branches:
            every_BKD = _whole(inputs_BTD, past)[:, None]
            return self.hidden(inputs_BTD, layer=layer, branches=branches, past=past), ((every_BKD, every_BKD),)
        return self._hidden_and_past(inputs_BTD, layer, branches, past)

    def behind(self, past: Past, room: int) -> Callable[[torch.Tensor, Branches], torch.Tensor]:
        """Return what runs further inputs behind a past as `hidden` does, and adds each to it.

        Args:
            past: What is kept of text before the inputs. Not changed.
            room: Inputs that may follow.
        """
        if self.takes_branches:
            cache = _cache(past, room)
            return lambda inputs_BTD, branches: self._run_branches(
                inputs_BTD, None, branches, use_cache=True, past_key_values=cache)
        kept = [past]

        def run(inputs_BTD: torch.Tensor, branches: Branches) -> torch.Tensor:
            hidden_BTD, kept[0] = self.hidden_and_past(inputs_BTD, branches=branches, past=kept[0])
            return hidden_BTD

        return run

    def _hidden_and_past(
        self, inputs_BTD: torch.Tensor, layer: int | None, branches: Branches | None, past: Past
    ) -> tuple[torch.Tensor, Past]:
        cache = _cache(past, inputs_BTD.shape[1])
        if branches is None:
            hidden_BTD = self._run(inputs_BTD, layer, use_cache=True, past_key_values=cache)
        else:
            hidden_BTD = self._run_branches(inputs_BTD, layer, branches, use_cache=True, past_key_values=cache)
        return hidden_BTD, tuple((kept.keys, kept.values) for kept in cache.layers if kept.is_initialized)

    def _run_branches(
        self, inputs_BTD: torch.Tensor, layer: int | None, branches: Branches, **options: Any
    ) -> torch.Tensor:
        # Without a mask, transformers takes numbers that do not rise for texts that are packed together.
        size = (len(inputs_BTD), branches.position_BK.shape[1])
        everything = torch.ones(size, dtype=torch.long, device=inputs_BTD.device)
        positions_BT = branches.input_positions.to(inputs_BTD.device).expand(len(inputs_BTD), -1)
        with branches.masks():
            return self._run(inputs_BTD, layer, position_ids=positions_BT, attention_mask=everything, **options)

    @cached_property
    def takes_branches(self) -> bool:
        """Whether texts that branch, and text after a kept past, give the states of the same texts one by one.

        Tried on a short text. Models that go by the order in which positions lie (ALiBi, recurrent states) do not.
        """
        parents = _probe_parents(min(OFF_FIRST, self.max_positions - 2))
        branches, inputs_BTD = Branches.of(parents), self.embed(self._probe_ids(len(parents)))
        if self.offloaded:
            return self._branches_differ(inputs_BTD, branches) < SAME_WAY * TOLERANCE[self.dtype]
        exact = torch.promote_types(self.dtype, torch.float32)
        with self._exactly():  # rounding to 16 bits would hide a small bias
            return self._branches_differ(inputs_BTD.to(exact), branches) < TOLERANCE[exact]

    @torch.no_grad()
    def _branches_differ(self, inputs_BTD: torch.Tensor, branches: Branches) -> float:
        """Return by how much states of branches differ from those of texts of their own, at once or after a past."""
        plain_BTD = unrolled(lambda texts: self._run(texts, None, use_cache=False), inputs_BTD, branches)
        try:
            at_once_BTD = self._run_branches(inputs_BTD, None, branches, use_cache=False)
            stem_BTD, past = self._hidden_and_past(inputs_BTD[:, :STEM], None, None, ())
            after_BTD = self._run_branches(inputs_BTD[:, STEM:], None, branches.of_inputs(inputs_BTD.shape[1] - STEM),
                                           use_cache=True, past_key_values=_cache(past, inputs_BTD.shape[1] - STEM))
        except Exception:  # a class that has no such cache, or takes no such mask, says so in many ways
            return math.inf
        in_two_BTD = torch.cat((stem_BTD, after_BTD), 1)
        return max(relative_difference(found, plain_BTD) for found in (at_once_BTD, in_two_BTD))

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """Let the body compute in 32 bits at least, with the weights of a layer at a time."""
        kept: dict[nn.Parameter, torch.Tensor] = {}

        def widen(parameters: Iterable[nn.Parameter]) -> None:
            for parameter in parameters:
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    kept[parameter] = parameter.data
                    parameter.data = parameter.data.float()

        def restore(parameters: Iterable[nn.Parameter]) -> None:
            for parameter in parameters:
                if parameter in kept:
                    parameter.data = kept.pop(parameter)

        layers = list(self._stack or ())
        apart = {parameter for module in (*layers, self.model.get_input_embeddings())
                 for parameter in module.parameters()}
        hooks = [hook for layer in layers for hook in (
            layer.register_forward_pre_hook(lambda layer, _: widen(layer.parameters())),
            layer.register_forward_hook(lambda layer, *_: restore(layer.parameters()), always_call=True))]
        try:
            widen(parameter for parameter in self._body.parameters() if parameter not in apart)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            restore(list(kept))

    def _probe_ids(self, size: int = PROBE_POSITIONS) -> torch.Tensor:
        """Return some text of ids that are in use in every vocabulary, (1, T), the same each time."""
        rows, padding = self.model.get_input_embeddings().weight.shape[0], getattr(
            self._text_config, "pad_token_id", None)
        ids = [number for number in range(min(rows, 256)) if number != padding]
        chosen = torch.randint(len(ids), (size,), generator=torch.Generator().manual_seed(0))
        return torch.tensor(ids, device=self.device)[chosen.to(self.device)][None]

    def _run(self, inputs_BTD: torch.Tensor, layer: int | None, **options: Any) -> torch.Tensor:
        hidden_BTD: torch.Tensor
        if layer is None or layer == self.num_layers:
            hidden_BTD = self._body(inputs_embeds=inputs_BTD, **options).last_hidden_state
        elif self._stack is not None:
            hidden_BTD = self._run_until(self._stack[layer - 1], inputs_embeds=inputs_BTD, **options)
        else:  # a body of another shape: run all of it and pick
            hidden_BTD = self._body(inputs_embeds=inputs_BTD, output_hidden_states=True, **options).hidden_states[layer]
        # Of a model that is spread the last layer may be elsewhere; and some add up their states in float32 (Mamba).
        return hidden_BTD.to(inputs_BTD)

    def _run_until(self, layer: nn.Module, *, reads: bool = False, **options: Any) -> torch.Tensor:
        """Run the body up to one of its layers and return what this gives, or reads; nothing behind is computed."""

        def stop(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any = None) -> None:
            found = (inputs[0] if inputs else named["hidden_states"]) if reads else output
            raise _LayerReached(found[0] if isinstance(found, tuple) else found)

        register = layer.register_forward_pre_hook if reads else layer.register_forward_hook
        hook = register(stop, with_kwargs=True)
        try:
            self._body(**options)
        except _LayerReached as stopped:
            return stopped.states
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self._body).__name__} does not run {type(layer).__name__}")

    @cached_property
    @torch.no_grad()
    def _input_scale(self) -> float:
        """By what a body multiplies the embeddings that it looks up itself, and no others (Falcon-H1)."""
        if self._stack is None:
            return 1.0
        ids = self._probe_ids()
        own, ours = (self._run_until(self._stack[0], reads=True, use_cache=False, **options) for options in (
            {"input_ids": ids}, {"inputs_embeds": self.model.get_input_embeddings()(ids)}))
        own, ours = own.double(), ours.double()
        scale = float((own * ours).sum() / ours.square().sum())
        rounding = SAME_WAY * TOLERANCE[self.dtype]
        return scale if abs(scale - 1) > rounding and relative_difference(scale * ours, own) < rounding else 1.0

    def log_probabilities(
        self, hidden_PD: torch.Tensor, *, first_new_id: int, new_rows_ND: torch.Tensor | None = None,
        new_bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return next-token log probabilities over the ids in use.

        Args:
            hidden_PD: Final hidden states at P positions.
            first_new_id: Id of the first new token (U); base rows from there on are padding and left out.
            new_rows_ND: Output rows of the new tokens; None predicts base tokens only.
            new_bias_N: Their entries of the head's bias; None for a head without one.

        Returns:
            Log probabilities (P, first_new_id + N), float32.
        """
        return torch.log_softmax(
            self.logits(hidden_PD, first_new_id=first_new_id, new_rows_ND=new_rows_ND, new_bias_N=new_bias_N), dim=-1)

    def logits(
        self, hidden_PD: torch.Tensor, *, first_new_id: int, new_rows_ND: torch.Tensor | None = None,
        new_bias_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what `log_probabilities` normalises, (P, first_new_id + N), float32."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden_PD)[:, :first_new_id].to(hidden_PD.device)
        logits = self.logit_map(logits.float())
        if (missing := first_new_id - logits.shape[1]) > 0:  # the last ids have no row
            logits = torch.cat((logits, logits.new_full((len(logits), missing), -torch.inf)), dim=1)
        if new_rows_ND is None:
            return logits
        return torch.cat((logits, self.new_logits(hidden_PD, new_rows_ND, new_bias_N)), dim=1)

    def new_logits(self, hidden_PD: torch.Tensor, new_rows_ND: torch.Tensor, new_bias_N: torch.Tensor | None = None
                   ) -> torch.Tensor:
        """Return the logits of the new tokens alone, (P, N), float32."""
        bias_N = None if new_bias_N is None else new_bias_N.to(hidden_PD)
        return self.logit_map(nn.functional.linear(hidden_PD, new_rows_ND.to(hidden_PD), bias_N).float())

    @torch.no_grad()
    def check_against_class(self) -> None:
        """Compare what is computed here with what the class itself computes from token ids, on a short text.

        Everything that is measured or trained goes through rows, states and products that are put together here. What a
        class does besides (another scale, other positions) would make all of it wrong, and nobody would notice.

        Raises:
            UsageError: If anything differs by more than rounding, or the class cannot be run so.
        """
        name = type(self.model).__name__
        try:
            ids = self._probe_ids(min(PROBE_POSITIONS, self.max_positions))
            own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            looked_up = self.embed(ids)
            rows_VD, first = self.embedding_VD, len(self.embedding_VD)
            as_new = self.embed(first + torch.arange(ids.shape[1], device=self.device)[None],
                                rows_VD[ids[0].to(rows_VD.device)].to(self.device), first)
            logits = self.logits(self.hidden(as_new)[0], first_new_id=own.shape[1]).to(own.device)
        except Exception as error:  # a model class raises what it likes
            reason = in_one_line(error, 200)
            raise UsageError(f"{name} cannot be run on embeddings ({reason}); {WITHOUT_RUNNING}") from error
        for what, found, wanted in (("embeddings of rows", as_new, looked_up), ("logits", logits, own)):
            difference = relative_difference(found, wanted)
            if not difference < SAME_WAY * TOLERANCE[self.dtype]:
                raise UsageError(f"the {what} of {name}, put together from its rows, differ from its own by "
                                 f"{difference:.2%}, which is more than rounding: the class does something that "
                                 f"vocabext does not know; {WITHOUT_RUNNING}")

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, temperature: float, seed: int,
              first_new_id: int) -> list[list[int]]:
        """Continue prompts of equal length by sampling; returns the new ids of each."""
        torch.manual_seed(seed)
        ids = torch.tensor([list(p) for p in prompts], dtype=torch.long, device=self.device)
        unused = list(range(first_new_id, self.head_VD.shape[0]))
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=True,
            temperature=temperature, top_k=0, top_p=0.95, suppress_tokens=unused or None,
            pad_token_id=getattr(self.model.config, "pad_token_id", None) or 0,
        )
        return [row[len(prompts[0]) :].tolist() for row in out]


class _LayerReached(Exception):  # noqa: N818 - nothing went wrong
    """The layer that was asked for has run."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _body(model: Any) -> Any:
    """Return what gives a class's last hidden states: what is around embedding and layers, without the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = [model.get_decoder()] if hasattr(model, "get_decoder") else []  # of some classes it is the head
    parts = [*named, model.base_model, *(child for child in model.children() if child is not head)]
    return next((part for part in parts if part is not model and embedding in part.modules()), model)


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far numbers are from others, relative to their size."""
    exact = torch.promote_types(wanted.dtype, torch.float32)
    size = wanted.to(exact).square().sum().sqrt()
    return float((found.to(wanted.device, exact) - wanted.to(exact)).square().sum().sqrt() / size.clamp(min=1e-30))


def _whole(inputs_BTD: torch.Tensor, past: Past | None) -> torch.Tensor:
    """Return the embeddings of earlier text and of the inputs, where the past of a model consists of the former."""
    return torch.cat((past[0][0][:, 0], inputs_BTD), 1) if past else inputs_BTD


def _probe_parents(off_first: int) -> list[int]:
    """Lay out a stem, a long branch off its first position, and a short one off its middle."""
    stem = [*range(-1, STEM - 1)]
    long = [0, *range(STEM, STEM + off_first - 1)]
    short = [STEM // 2, *range(STEM + off_first, STEM + off_first + ON_BRANCH - 1)]
    return [*stem, *long, *short]


def _learned_positions(name: str, module: nn.Embedding) -> int:
    """Return how many positions a table of them has; some begin behind a few that mean something else."""
    last = name.rpartition(".")[2]
    if "pos" not in last and last != "wpe":
        return UNBOUNDED
    padding = module.padding_idx
    return module.num_embeddings - int(getattr(module, "offset", 0) or (0 if padding is None else padding + 1))


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
            f"eval cannot run it on new rows; {WITHOUT_RUNNING}")


def check_folder_runs_on_rows(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that cannot be run on rows, before any weight is read.

    Raises:
        CheckpointError: As `check_folder_loads` does.
        UsageError: As `check_runs_on_rows` does, or if the class takes no embeddings.
    """
    check_runs_on_rows(read_config(folder, trust_remote_code=trust_remote_code))
    model = check_folder_loads(folder, trust_remote_code=trust_remote_code)
    if "inputs_embeds" not in inspect.signature(type(model).forward).parameters:
        raise UsageError(f"{type(model).__name__} takes no embeddings, only token ids, so distill and eval cannot run "
                         f"it on new rows; {WITHOUT_RUNNING}")


def check_folder_loads(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Refuse a folder that `load_model` would refuse, before any weight is read.

    Returns:
        The model without its weights.

    Raises:
        CheckpointError: If transformers cannot load it as a causal language model, or its tensors are not those of the
            class.
    """
    model, report = _from_pretrained(folder, trust_remote_code, device_map="meta")
    _check_complete(folder, model, report)
    return model


def _from_pretrained(folder: str | Path, trust_remote_code: bool, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """Load a model and return it with what transformers says about its tensors."""
    try:
        # A wrapper for images that AutoModelForCausalLM does not know is loaded by the class that its config names.
        loader = loading_class(read_config(Path(folder), trust_remote_code=trust_remote_code))
        with Quiet():  # what it says about tensors is said by us, in one line
            model, report = loader.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True,
                **options)
    except Exception as error:  # transformers and safetensors raise many kinds; each means the same to the user
        raise CheckpointError(f"transformers cannot load {folder}: {in_one_line(error)}") from error
    if model.config.is_encoder_decoder:
        raise CheckpointError(f"{folder} is an encoder and a decoder ({type(model).__name__}); "
                              "a causal language model is needed")
    if model.get_output_embeddings() is None:
        raise CheckpointError(f"{folder} has no output head ({type(model).__name__}); "
                              "a causal language model is needed")
    return model, report


@contextmanager
def offloading(beside: Path) -> Iterator[Path]:
    """Make a folder beside a path for weights that fit nowhere; it is removed at the end."""
    with scratch_folder(real_path(beside)) as folder:
        yield folder


def load_model(
    folder: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False,
    max_memory: str | None = None, offload_folder: Path | None = None, complete: bool = True, runs: bool = True,
) -> FrozenModel:
    """Load a causal language model, frozen.

    Args:
        folder: The model.
        device: Where to compute.
        dtype: In which numbers.
        trust_remote_code: Run code that comes with the model.
        max_memory: Spread the model over devices, such as `0=20GiB,cpu=60GiB`; what fits nowhere stays on disk.
        offload_folder: Where weights lie that fit nowhere.
        complete: Refuse a folder that does not hold every weight of the class, or holds others.
        runs: Whether it will be run on rows: it is compared with its class then.

    Raises:
        CheckpointError: If transformers cannot load it, or would put random numbers in place of weights.
        UsageError: If the device or dtype does not exist here, or what is computed here is not what the class computes.
    """
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    spread: dict[str, Any] = {}
    if max_memory is not None:
        spread = {"device_map": "auto", "max_memory": parse_max_memory(max_memory)}
        if offload_folder is not None:
            spread["offload_folder"] = str(offload_folder)
    model, report = _from_pretrained(folder, trust_remote_code, dtype=number, **spread)
    if complete:
        _check_complete(folder, model, report)
    frozen = FrozenModel(model, place, number)
    if runs:
        frozen.check_against_class()
    return frozen


def _check_complete(folder: str | Path, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse weights that are not the class's: transformers goes on with random numbers in their place."""
    misfit = describe_misfit(folder, model, report, quantised=hasattr(model.config, "quantization_config"))
    if misfit is not None:
        raise CheckpointError(misfit.said)
