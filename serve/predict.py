"""What an expansion should bring on a device nobody has rented yet: a roofline from config and lengths.

Every part of a forward pass takes as long as its arithmetic or its memory traffic, whichever takes longer:

    body        2 FLOP per parameter and token; its weights are read once per step, whatever the batch
    attention   4 FLOP per layer, width and (token, earlier token) pair; keys and values are read when writing
    head        2 FLOP per row, width and *predicted* token; it grows with every new token

Shorter text saves body and attention; more rows cost head and memory. Prefill predicts one token per prompt
(vLLM computes no other logits), writing predicts one per step. Where decoding is limited by reading the
weights, only fewer steps help: whether there are fewer depends on whether the model *writes* new tokens. So
there are two rows for it, between which the truth lies: it writes none, or as many as domain text has.

Launch overheads, sampling and scheduling are left out: small models and small batches gain less than this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vocabext.checkpoint.architecture import embedding_names
from vocabext.checkpoint.folder import resolve_model
from vocabext.errors import CheckpointError, UsageError
from vocabext.serve.model import attention_width, cache_bytes_per_token, context_length, num_layers, read_config
from vocabext.serve.provenance import machine_of, provenance

FORMAT_VERSION = 1
DTYPE_BYTES = 2  # what vLLM computes and stores in unless told otherwise
FLOPS_PER_WEIGHT = 2
FLOPS_PER_PAIR = 4  # scores and weighted values, a multiplication and an addition each
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: What to call it on the command line.
        flops_per_second: Dense 16-bit matrix products.
        bytes_per_second: To and from its memory.
        memory_bytes: Its memory; None if unknown.
        source: Where the numbers are from.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float | None
    source: str


# From their makers' data sheets. FLOP/s are those of dense 16-bit (bfloat16) matrix products; data sheets often print
# twice as much, "with sparsity". A server reaches a part of either number; for a ratio of two models that part cancels.
DEVICES = {device.name: device for device in (
    Device("h200", 989e12, 4.8e12, 141e9, "NVIDIA H200 Tensor Core GPU data sheet (SXM), half of the value with "
           "sparsity"),
    Device("h100", 989e12, 3.35e12, 80e9, "NVIDIA H100 Tensor Core GPU data sheet (SXM5), half of the value with "
           "sparsity"),
    Device("h100-pcie", 756e12, 2.0e12, 80e9, "NVIDIA H100 Tensor Core GPU data sheet (PCIe), half of the value with "
           "sparsity"),
    Device("a100", 312e12, 2.039e12, 80e9, "NVIDIA A100 Tensor Core GPU data sheet (SXM4, 80 GB)"),
    Device("l40s", 362e12, 864e9, 48e9, "NVIDIA L40S data sheet, value without sparsity"),
    Device("l4", 121e12, 300e9, 24e9, "NVIDIA L4 Tensor Core GPU data sheet, half of the value with sparsity"),
    Device("a10", 125e12, 600e9, 24e9, "NVIDIA A10 Tensor Core GPU data sheet, value without sparsity"),
    Device("mi300x", 1307e12, 5.3e12, 192e9, "AMD Instinct MI300X data sheet, value without sparsity"),
)}


def find_device(
    name: str | None, *, flops_per_second: float | None = None, bytes_per_second: float | None = None,
    memory_bytes: float | None = None,
) -> Device:
    """Look a device up in `DEVICES`; the numbers given replace its own.

    Raises:
        UsageError: If a speed is neither known nor given.
    """
    known = DEVICES.get((name or "").lower())
    flops = flops_per_second or (known.flops_per_second if known else None)
    bandwidth = bytes_per_second or (known.bytes_per_second if known else None)
    if flops is None or bandwidth is None:
        what = f"there is no device {name!r} here" if name else "no device was named"
        raise UsageError(f"{what}; choose from {', '.join(DEVICES)}, or pass both --flops and --bandwidth")
    if not 0 < flops < float("inf") or not 0 < bandwidth < float("inf"):
        raise UsageError(f"--flops {flops:g} and --bandwidth {bandwidth:g} must be numbers above 0")
    changed = flops_per_second or bytes_per_second
    source = "given on the command line" if known is None or changed else known.source
    return Device(name or "custom", flops, bandwidth, memory_bytes or (known.memory_bytes if known else None), source)


@dataclass(frozen=True)
class PredictConfig:
    """Options of `serve predict`: the load to predict."""

    # Characters of a long prompt (prefill), about 2,000 tokens of English.
    prompt_characters: int = 8000
    # Characters of a short prompt (decode).
    short_prompt_characters: int = 200
    # Characters of an answer.
    output_characters: int = 1000
    # Requests that are decoded together.
    concurrency: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in asdict(self).items():
            if value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclass(frozen=True)
class ModelShape:
    """The size of a model, as far as a roofline needs it.

    Attributes:
        body_parameters: All parameters but embedding and head.
        rows: Rows of the embedding and of the head (V).
        hidden: Their width (D).
        tied: Whether embedding and head are one matrix.
        layers: Layers.
        attention_width: Heads times head size.
        cache_bytes_per_token: Keys and values of one token; None if the attention is not plain.
        context_tokens: Longest input; None if unknown.
    """

    body_parameters: int
    rows: int
    hidden: int
    tied: bool
    layers: int
    attention_width: int
    cache_bytes_per_token: int | None
    context_tokens: int | None

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.rows * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return DTYPE_BYTES * (self.body_parameters + self.head_parameters * (1 if self.tied else 2))


def shape_of(folder: Path) -> ModelShape:
    """Read the size of a model from its config; no weights are needed.

    Raises:
        CheckpointError: If the config does not describe a transformer with attention.
    """
    config, names = read_config(folder), embedding_names(folder)
    rows, hidden = names.shapes[names.embedding]
    layers, width = num_layers(config), attention_width(config)
    if layers is None or width is None:
        raise CheckpointError(f"{folder / 'config.json'} does not say how many layers and heads the model has")
    body = names.num_parameters - rows * hidden * (1 if names.tied else 2)
    return ModelShape(body, rows, hidden, names.tied, layers, width, cache_bytes_per_token(config),
                      context_length(folder))


@dataclass(frozen=True)
class Lengths:
    """Tokens per character of domain text, of both models."""

    base: float
    expanded: float

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Lengths":
        """Take them from lengths.json."""
        return cls(document["base_tokens_per_1000_characters"] / 1000,
                   document["expanded_tokens_per_1000_characters"] / 1000)


@dataclass(frozen=True)
class Cost:
    """What a request takes.

    Attributes:
        seconds: Time on the device.
        limited_by: `arithmetic` or `memory`: what most of the time is spent on.
    """

    seconds: float
    limited_by: str


def prefill_cost(shape: ModelShape, device: Device, tokens: float) -> Cost:
    """Return the cost of reading a prompt and predicting one token."""
    pairs = tokens * tokens / 2  # a token sees itself and what is before it
    return _forward(shape, device, tokens=tokens, pairs=pairs, cached=tokens, predicted=1)


def decode_cost(shape: ModelShape, device: Device, prompt_tokens: float, tokens: float, batch: int) -> Cost:
    """Return the cost of writing `tokens` tokens, `batch` requests side by side; for all of them together."""
    context = batch * (prompt_tokens + tokens / 2)  # on average
    step = _forward(shape, device, tokens=batch, pairs=context, cached=context, predicted=batch)
    return Cost(step.seconds * tokens, step.limited_by)


def mixed_cost(shape: ModelShape, device: Device, prompt_tokens: float, tokens: float, batch: int) -> Cost:
    """Return the cost of reading `batch` prompts one after the other, and of writing their answers side by side."""
    reading = prefill_cost(shape, device, prompt_tokens)
    writing = decode_cost(shape, device, prompt_tokens, tokens, batch)
    longer = max((reading, writing), key=lambda cost: cost.seconds)
    return Cost(batch * reading.seconds + writing.seconds, longer.limited_by)


def _forward(
    shape: ModelShape, device: Device, *, tokens: float, pairs: float, cached: float, predicted: float
) -> Cost:
    """Return the cost of a forward pass: its tokens, pairs of them that meet, tokens in the cache, and predictions."""
    return _total([
        _part(device, FLOPS_PER_WEIGHT * shape.body_parameters * tokens, DTYPE_BYTES * shape.body_parameters),
        _part(device, FLOPS_PER_PAIR * shape.layers * shape.attention_width * pairs, _cache_bytes(shape, cached)),
        _part(device, FLOPS_PER_WEIGHT * shape.head_parameters * predicted, DTYPE_BYTES * shape.head_parameters),
    ])


def _cache_bytes(shape: ModelShape, tokens: float) -> float:
    per_token = shape.cache_bytes_per_token
    if per_token is None:  # not plain attention: at most one key and one value per head
        per_token = 2 * shape.layers * shape.attention_width * DTYPE_BYTES
    return tokens * per_token


def _part(device: Device, flops: float, num_bytes: float) -> Cost:
    arithmetic, memory = flops / device.flops_per_second, num_bytes / device.bytes_per_second
    return Cost(max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory")


def _total(parts: Sequence[Cost]) -> Cost:
    by_limit = {name: sum(p.seconds for p in parts if p.limited_by == name) for name in ("arithmetic", "memory")}
    return Cost(sum(by_limit.values()), max(by_limit, key=lambda name: by_limit[name]))


def predict_loads(
    base: ModelShape, expanded: ModelShape, lengths: Lengths, device: Device, config: PredictConfig
) -> list[dict[str, Any]]:
    """Predict seconds per request of the three scenarios, and the speed-up."""
    b, e, answer, at_once = lengths.base, lengths.expanded, config.output_characters, config.concurrency
    short, long = config.short_prompt_characters, config.prompt_characters
    rows = [("prefill", "", prefill_cost(base, device, b * long), prefill_cost(expanded, device, e * long))]
    for note, rate in (("no new token written", b), ("new tokens written as in the corpus", e)):
        for name, cost, prompt in (("decode", decode_cost, short), ("mixed", mixed_cost, long)):
            rows.append((name, note, cost(base, device, b * prompt, b * answer, at_once),
                         cost(expanded, device, e * prompt, rate * answer, at_once)))
    return [{"scenario": name, "note": note, "base_seconds": old.seconds, "base_limited_by": old.limited_by,
             "expanded_seconds": new.seconds, "expanded_limited_by": new.limited_by,
             "speedup": old.seconds / new.seconds} for name, note, old, new in rows]


def predict_memory(base: ModelShape, expanded: ModelShape, lengths: Lengths, device: Device,
                   config: PredictConfig) -> dict[str, Any]:
    """Work out weights, cache and context before and after, and how many long prompts fit into what is left."""
    found: dict[str, Any] = {"device_bytes": device.memory_bytes}
    for role, shape, rate in (("base", base, lengths.base), ("expanded", expanded, lengths.expanded)):
        per_text = _cache_bytes(shape, rate * (config.prompt_characters + config.output_characters))
        left = None if device.memory_bytes is None else device.memory_bytes - shape.weight_bytes
        found[role] = {
            "weight_bytes": shape.weight_bytes, "head_bytes": DTYPE_BYTES * shape.head_parameters,
            "cache_bytes_per_request": per_text, "cache_is_a_bound": shape.cache_bytes_per_token is None,
            "requests_that_fit": None if left is None else max(0, int(left // per_text)),
            "context_characters": shape.context_tokens and shape.context_tokens / rate,
        }
    return found


def measured_beside(
    bench: Mapping[str, Any], models: Mapping[str, ModelShape] | None = None, device: Device | None = None
) -> list[dict[str, Any]]:
    """Put what a bench.json measured at each point beside what the lengths, and the roofline, predict for it.

    Args:
        bench: The content of bench.json.
        models: The shape of each role; None predicts from lengths only.
        device: Where the roofline lets them run.

    Returns:
        For each point the measured speed-up, the ratio of lengths, `predicted_speedup`, and `prediction_error`, which
        is predicted over measured less 1.
    """
    rows = []
    for point in bench["points"]:
        metric = point["metrics"].get(point["main_metric"])
        if metric is None:
            continue
        ratio = point["base"]["prompt_tokens_per_run"] / max(1, point["expanded"]["prompt_tokens_per_run"])
        if point["scenario"] != "prefill":
            ratio = _written_ratio(point)
        predicted = _predicted_speedup(point, models, device) if models and device else None
        rows.append({
            "machine": machine_of(bench), "point": point["name"], "scenario": point["scenario"], "length_ratio": ratio,
            "speedup": metric["speedup"], "speedup_interval": metric["speedup_interval"], "verdict": metric["verdict"],
            "share_of_length_ratio": metric["speedup"] / ratio,
            "share_interval": [end / ratio for end in metric["speedup_interval"]],
            "predicted_speedup": predicted, "prediction_error": predicted and predicted / metric["speedup"] - 1,
        })
    return rows


def _predicted_speedup(point: Mapping[str, Any], models: Mapping[str, ModelShape], device: Device) -> float | None:
    """Return the speed-up that the roofline gives for a measured point, with the point's own tokens and load.

    None for requests that arrive at a rate: the roofline knows no waiting.
    """
    at_once, scenario = point["concurrency"], point["scenario"]
    if at_once is None:
        return None

    def seconds(role: str) -> float:
        prompt, output = (point[role][f"{kind}_tokens_per_run"] / point["requests_per_run"]
                          for kind in ("prompt", "output"))
        if scenario == "prefill":
            return prefill_cost(models[role], device, prompt).seconds
        whole = mixed_cost(models[role], device, prompt, output, at_once).seconds
        return whole / max(1, point[role]["output_characters_per_run"]) if scenario == "decode" else whole

    return seconds("base") / seconds("expanded")


def held_against(prediction: Mapping[str, Any], benches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold a predict.json against further results of `serve bench`.

    Returns:
        A row of `measured_beside` for each point of these and of those that the prediction names already.
    """
    names = [field.name for field in fields(ModelShape)]
    models = {role: ModelShape(**{name: prediction["model"][role][name] for name in names})
              for role in ("base", "expanded")}
    rows = [row for bench in benches for row in measured_beside(bench, models, Device(**prediction["device"]))]
    here = {(row["machine"], row["point"], row["speedup"]) for row in rows}
    unknown = {"predicted_speedup": None, "prediction_error": None}  # in a file of an older version
    return rows + [{**unknown, **row} for row in prediction["measured"]
                   if (row["machine"], row["point"], row["speedup"]) not in here]


def _written_ratio(point: Mapping[str, Any]) -> float:
    """Return base over expanded in output tokens per output character: what decoding would gain from length alone."""
    per_character = [point[role]["output_tokens_per_run"] / max(1, point[role]["output_characters_per_run"])
                     for role in ("base", "expanded")]
    return per_character[0] / per_character[1] if per_character[1] else 1.0


def run_predict(
    base: str, expanded: str | None, lengths: Lengths, device: Device, *, config: PredictConfig,
    new_tokens: int | None = None, benches: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Predict speed and memory of an expansion on a device.

    Args:
        base: Base model, folder or hub id.
        expanded: Expanded model; None takes the base with `new_tokens` more rows.
        lengths: Tokens per character of both.
        device: Where it will run.
        config: The load.
        new_tokens: See `expanded`.
        benches: Contents of bench.json, to put what was measured beside the prediction.

    Returns:
        The content of predict.json.

    Raises:
        UsageError: If neither an expanded model nor a number of new tokens is given.
    """
    folder = resolve_model(base)
    old = shape_of(folder)
    if expanded is not None:
        new = shape_of(resolve_model(expanded))
    elif new_tokens is not None and new_tokens >= 0:
        new = replace(old, rows=old.rows + new_tokens)
    else:
        raise UsageError("there is no EXPANDED model; say with --new-tokens how many rows the base will grow by")
    notes = ["A bound from arithmetic and memory traffic alone: overheads of launching, sampling and scheduling are "
             "not in it, and weigh most on small models and small batches."]
    if any(name in read_config(folder) for name in EXPERTS):
        notes.append("The model has experts, of which a token uses some; all are counted here.")
    if old.cache_bytes_per_token is None:
        notes.append("The attention is not plain; its cache is counted as if every head kept keys and values.")
    tokens = lengths.base * (config.prompt_characters + config.output_characters)
    if old.context_tokens is not None and tokens > old.context_tokens:
        notes.append(f"A long prompt and its answer take {tokens:,.0f} base tokens, but the context has "
                     f"{old.context_tokens:,}: the base cannot run this load; use fewer --prompt-characters.")
    return {
        "artifact": "predict", "version": FORMAT_VERSION, "base": base, "expanded": expanded,
        "device": asdict(device), "options": asdict(config),
        "lengths": {"base_tokens_per_1000_characters": 1000 * lengths.base,
                    "expanded_tokens_per_1000_characters": 1000 * lengths.expanded,
                    "length_ratio": lengths.base / lengths.expanded},
        "model": {"base": _model_json(old), "expanded": _model_json(new), "new_rows": new.rows - old.rows},
        "loads": predict_loads(old, new, lengths, device, config),
        "memory": predict_memory(old, new, lengths, device, config),
        "measured": [row for bench in benches
                     for row in measured_beside(bench, {"base": old, "expanded": new}, device)],
        "notes": notes, "provenance": provenance(),
    }


def _model_json(shape: ModelShape) -> dict[str, Any]:
    return {**asdict(shape), "head_parameters": shape.head_parameters, "weight_bytes": shape.weight_bytes}
