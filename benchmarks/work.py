"""How many floating-point operations matrix products take: counted while a run does them, and the least needed."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference_step import Pair
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from vocabext.distill.input_rows.sharing import share_texts
from vocabext.model.frozen import FrozenModel
from vocabext.tokens import Expansion, TokenSnippets

aten: Any = torch.ops.aten
counting: Any = flop_counter  # carries no types


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(counting.sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
                        **__: Any) -> int:
    return int(counting.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# What torch's own registry leaves out: attention on a CPU.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of matrix products within a `with` block, by part and direction.

    Parts are `body` (products with weights of the layers), `attention`, `head` (products with an embedding
    matrix) and `other`. Attention counts as if it were not causal. Compiled code is not seen: run it with
    `torch.compiler.set_stance("force_eager")`.
    """

    def __init__(self, model: FrozenModel) -> None:
        """Learn which storages belong to what."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[tuple[str, str]] = Counter()
        self._parts = {_storage(weight): "body" for weight in body_weights(model)}
        self._parts |= {_storage(weight): "head" for weight in (model.embedding_VD, model.head_VD)}

    @property
    def body(self) -> int:
        """What the layers took, attention included."""
        return sum(count for (part, _), count in self.flops.items() if part in ("body", "attention"))

    def scale(self, factor: float) -> None:
        """Multiply what was counted, where only a sample was run."""
        self.flops = Counter({key: round(count * factor) for key, count in self.flops.items()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in counting.flop_registry and packet not in CPU_ATTENTION and func is not aten.detach.default:
            with self:  # an operation that is made of others, such as `linear` in inference mode
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if packet in CPU_ATTENTION:
            self._count("attention", CPU_ATTENTION[packet](*args, **kwargs))
        elif packet in counting.flop_registry:
            self._count(self._part(packet, args), int(counting.flop_registry[packet](*args, **kwargs, out_val=out)))
        return out

    def _part(self, packet: Any, args: Sequence[Any]) -> str:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        known = [self._parts[_storage(t)] for t in tensors if _storage(t) in self._parts]
        if known:
            return known[0]
        return "attention" if "attention" in str(packet) or packet is aten.bmm else "other"

    def _count(self, part: str, flops: int) -> None:
        backward = torch._C._current_graph_task_id() != -1
        self.flops[part, "backward" if backward else "forward"] += flops


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def body_weights(model: FrozenModel) -> list[torch.Tensor]:
    """Return the matrices of the layers that every position is multiplied by."""
    body = model.model.get_decoder()
    tables = {_storage(m.weight) for m in body.modules() if isinstance(m, torch.nn.Embedding)}
    return [p for p in body.parameters() if p.ndim == 2 and _storage(p) not in tables]


@dataclass(frozen=True)
class BodyShape:
    """What decides how much work one position is.

    Attributes:
        layers: Depth.
        layer_weights: Elements of the matrices of one layer.
        attention_width: Heads times their size.
        hidden: Hidden size D.
        inner: Width of the widest matrix of a layer.
        rows: Rows of the embedding matrix.
    """

    layers: int
    layer_weights: int
    attention_width: int
    hidden: int
    inner: int
    rows: int

    @classmethod
    def of(cls, model: FrozenModel) -> "BodyShape":
        """Read it off a model all of whose layers are alike."""
        config = model.model.config.get_text_config()
        heads, hidden = int(config.num_attention_heads), model.embedding_VD.shape[1]
        size = int(getattr(config, "head_dim", None) or hidden // heads)
        weights = body_weights(model)
        return cls(model.num_layers, sum(w.numel() for w in weights) // model.num_layers, heads * size, hidden,
                   max(max(w.shape) for w in weights), model.embedding_VD.shape[0])

    def linear(self, positions: int, layers: int) -> int:
        """Return the FLOPs of products with weights, in one direction, for a number of positions."""
        return 2 * self.layer_weights * layers * positions

    def attention(self, seen: int, layers: int) -> int:
        """Return the FLOPs of attention forward, for positions that see `seen` positions in all."""
        return 4 * self.attention_width * layers * seen


@dataclass(frozen=True)
class Floor:
    """The least work that a run can be done with.

    Attributes:
        teacher: FLOPs of the teacher, once over each text.
        student: FLOPs of the student, forward and activation-backward, from each snippet's token on.
    """

    teacher: int
    student: int

    @property
    def flops(self) -> int:
        """All of it."""
        return self.teacher + self.student


def floor_of(
    shape: BodyShape, records: Sequence[TokenSnippets], expansion: Expansion, num_prefix: int, *, layer: int,
    shown: Sequence[int], epochs: int, reach: int | None = None,
) -> Floor:
    """Return the least work for showing each token so many snippets.

    Positions before the token are the teacher's, by causality, and are not read again. The student has its
    own token merged, the others as pieces. Nothing above the target layer, nothing beyond the positions that
    are compared, no head, no padding. The teacher reads as few snippets as can be shown so often, out of texts that
    the tokens have in common as far as they can (`vocabext.distill.input_rows.sharing`), each once.

    Args:
        shape: Of the model.
        records: The tokens with their snippets.
        expansion: The new tokens.
        num_prefix: How many ids stand in front of every snippet.
        layer: How many layers are needed.
        shown: How often the student reads a snippet of each token, repetitions included.
        epochs: How often it reads the same snippet at most.
        reach: How many positions behind the token are compared; None for all.
    """
    student = 0.0
    texts: dict[tuple[int, ...], int] = {}  # how much of each the teacher reads
    ids_of_all = [expansion.first_new_id + index for index in range(len(records))]
    shared = share_texts(records, ids_of_all, max(1, min(-(-times // epochs) for times in shown)))
    for index, (record, times) in enumerate(zip(shared, shown, strict=True)):
        if not times:
            continue
        own = [expansion.first_new_id + index]
        compared, seen, once = 0, 0, -(-times // epochs)
        for number, (snippet, ids) in enumerate(zip(
                record.snippets, expansion.unmerge_batch(record.snippets, keep=own), strict=True)):
            start = int((ids == own[0]).argmax())
            stop = len(ids) if reach is None else min(len(ids), start + 1 + reach)
            if number < once:
                texts[snippet] = max(texts.get(snippet, 0), num_prefix + int(expansion.edges(ids[:stop])[-1]))
            compared += stop - start
            seen += _triangle(num_prefix + stop) - _triangle(num_prefix + start)
        size = len(record.snippets)
        # Attention takes two products forward and four back.
        student += times / size * (2 * shape.linear(compared, layer) + 3 * shape.attention(seen, layer))
    teacher = shape.linear(sum(texts.values()), layer) + shape.attention(sum(map(_triangle, texts.values())), layer)
    return Floor(teacher, round(student))


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def reference_work(shape: BodyShape, batches: Sequence[Sequence[Pair]], rows: int, *, tied: bool) -> tuple[int, int]:
    """Return the FLOPs that the reference takes in the layers, attention not causal, and in the head.

    Args:
        shape: Of the model.
        batches: The snippets of each step.
        rows: Rows of the grown matrices.
        tied: Whether logits go unused, and nothing comes back through the head.
    """
    body = head = 0
    for batch in batches:
        width = max(len(pair.teacher) for pair in batch)
        linear = shape.linear(len(batch) * width, shape.layers)
        attention = shape.attention(len(batch) * width * width, shape.layers)
        body += 3 * linear + 2 * attention + 5 * attention // 2  # flash attention computes one product of five anew
        head += (2 if tied else 3) * 2 * rows * shape.hidden * len(batch) * width
    return body, head
