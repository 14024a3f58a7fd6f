"""A model folder: its config, its shards, and the tensors that hold one row per token id.

A safetensors file is eight bytes with the length of a JSON header, the header (name -> dtype, shape, byte
range), and the bytes. Headers alone tell everything that `inspect` and `patch` must decide; tensors are
read one at a time, and a shard is rewritten by copying byte ranges.

Shapes: V rows of the vocabulary as stored, U rows the tokenizer addresses, N new rows, D hidden size.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from vocabext.architecture import EmbeddingNames, embedding_names
from vocabext.errors import CheckpointError, UsageError
from vocabext.records import FORMAT_VERSION, NewToken, atomic_file

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ROWS_ARTIFACT = "rows"

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
CHUNK_BYTES = 16 * 1024 * 1024
FLOAT_DTYPES = ("F32", "F16", "BF16")
# Sizes of the types this module has to compute with; other types are copied as bytes and not looked into.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
               "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
# What a model folder needs besides code and pickles; a hub download is limited to it.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies.

    Attributes:
        file: Name of the shard, relative to the model folder.
        dtype: The type as safetensors spells it, such as `BF16`.
        shape: The shape.
        start: First byte, counted from the end of the shard's header.
        end: The byte after the last one.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """The header of one safetensors file.

    Attributes:
        file: Name of the file, relative to the model folder.
        data_start: Offset of the first tensor byte in the file.
        metadata: The header's `__metadata__`, None if it has none.
        tensors: Every tensor in the file, in the order of its bytes.
    """

    file: str
    data_start: int
    metadata: dict[str, str] | None
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class Rows:
    """What distillation makes: one vector per new token, in the order of the tokens.

    Attributes:
        input_ND: Rows for the input embedding, float32.
        output_ND: Rows for an untied output head, float32; None if it was not trained.
    """

    input_ND: "torch.Tensor"
    output_ND: "torch.Tensor | None" = None


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose parts were found to agree. Holds headers, not weights.

    Attributes:
        folder: The folder.
        config: config.json as it is written.
        shards: The safetensors files that hold the model, by name.
        tensors: Every stored tensor.
        names: The vocabulary parameters, by the names of the model class.
        embedding_name: Stored name of the input embedding; None if a tied model stores only its head.
        head_name: Stored name of the output head; None if it is not stored.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    names: EmbeddingNames
    embedding_name: str | None
    head_name: str | None

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.names.tied

    @property
    def vocab_tensors(self) -> tuple[str, ...]:
        """Stored names of all tensors that hold one row per token id."""
        return tuple(name for name in (self.embedding_name, self.head_name) if name is not None)

    @property
    def vocab_info(self) -> TensorInfo:
        """The stored tensor that holds the input rows."""
        return self.tensors[self.vocab_tensors[0]]

    @property
    def vocab_size(self) -> int:
        """Rows stored (V); at least as many as the tokenizer has ids."""
        return self.vocab_info.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of a row (D)."""
        return self.vocab_info.shape[1]

    @property
    def dtype(self) -> str:
        """Type of the input rows, as safetensors spells it."""
        return self.vocab_info.dtype

    @property
    def sharded(self) -> bool:
        """Whether an index names the shards."""
        return WEIGHTS_NAME not in self.shards

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor.

        Args:
            name: A stored name, a key of `tensors`.

        Raises:
            CheckpointError: If safetensors cannot read it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.folder / self.tensors[name].file), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read {name} from {self.folder / self.tensors[name].file}: {error}") from None
        return tensor

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, as hexadecimal digits."""
        info = self.tensors[name]
        digest = hashlib.sha256()
        with open(self.folder / info.file, "rb") as file:
            for chunk in _byte_range(file, self.shards[info.file].data_start + info.start, info.num_bytes):
                digest.update(chunk)
        return digest.hexdigest()


# -- finding a model ----------------------------------------------------------------------------------------------

def resolve_model(model: str) -> Path:
    """Turn a folder or a hub id into a folder.

    Args:
        model: A folder, or a hub id such as `org/name`, which is downloaded (no pickles) into the hub cache.

    Returns:
        The folder. It holds a config.json.

    Raises:
        UsageError: If `model` is neither.
        CheckpointError: If the hub cannot be reached or does not have it, or the folder has no config.json.
    """
    path = Path(model)
    if path.is_dir():
        folder = path
    elif path.exists():
        raise UsageError(f"{model} is a file; a model is a folder with config.json and safetensors, or a hub id")
    # OWNER is no folder here: else it is a path with a typing error
    elif HUB_ID.fullmatch(model) and not model.endswith((".safetensors", ".json")) \
            and (path.parent == Path() or not path.parent.exists()):
        folder = _download(model)
    else:
        raise UsageError(f"the model folder {model} does not exist")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; it is no model folder")
    return folder


def _download(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(
            model, allow_patterns=HUB_PATTERNS,
            ignore_patterns=[*PICKLE_PATTERNS, "original/*", "consolidated*", "onnx/*", "*.index.fp16.json"],
        ))
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated on the hub; accept its licence there and log in with: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{model} is neither a folder here nor a model on the hub") from None
    except Exception as error:  # connection errors come in the flavours of three HTTP libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{model} is no folder here, and it cannot be had from the hub ({reason}); "
            "download it where there is a network, and pass the folder"
        ) from error


# -- reading a folder ---------------------------------------------------------------------------------------------

def open_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read the config and all safetensors headers of a model folder, and find its vocabulary tensors.

    Args:
        folder: A folder as `resolve_model` returns it.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The checkpoint; no weights are read, unless a tied model stores both of its vocabulary tensors,
        which are then compared.

    Raises:
        CheckpointError: If a part is missing or damaged, parts contradict each other, or the model holds
            vocabulary tensors that cannot be extended. The message names the part.
    """
    config = read_json(folder / CONFIG_NAME)
    shards = _read_shards(folder)
    tensors = {name: info for shard in shards.values() for name, info in shard.tensors.items()}
    names = embedding_names(folder, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(
        folder=folder, config=config, shards=shards, tensors=tensors, names=names,
        embedding_name=_stored_name(names.embedding, tensors),
        head_name=_stored_name(names.head, tensors) if names.head is not None else None,
    )
    _check(checkpoint)
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        CheckpointError: If the file is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is no complete model folder") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def _read_shards(folder: Path) -> dict[str, Shard]:
    single, index = (folder / WEIGHTS_NAME).is_file(), (folder / INDEX_NAME).is_file()
    if single and index:
        raise CheckpointError(
            f"{folder} has both {WEIGHTS_NAME} and {INDEX_NAME}, and programs differ in which one they load; remove one"
        )
    if single:
        return {WEIGHTS_NAME: read_shard(folder, WEIGHTS_NAME)}
    if index:
        return _read_indexed(folder)
    if any(path for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds pickled weights only; vocabext reads safetensors only: save it with "
            "save_pretrained of a recent transformers first"
        )
    raise CheckpointError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; there are no weights to extend")


def _read_indexed(folder: Path) -> dict[str, Shard]:
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map")
    shards: dict[str, Shard] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or "\\" in file or PurePosixPath(file).is_absolute() \
                or len(PurePosixPath(file).parts) != 1 or file == "..":
            raise CheckpointError(f"{folder / INDEX_NAME} names the shard {file!r}, which is no plain file name; "
                                  "shards lie in the model folder itself")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks the shard {file} that {INDEX_NAME} names; download it again")
        shards[file] = read_shard(folder, file)
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CheckpointError(f"{INDEX_NAME} says that {name} is in {file}, but it is not there")
    for shard in shards.values():
        for name in shard.tensors:
            if weight_map.get(name) != shard.file:
                raise CheckpointError(f"{shard.file} holds {name}, but {INDEX_NAME} says {weight_map.get(name)!r}")
    return shards


def read_shard(folder: Path, file: str) -> Shard:
    """Read and check the header of one safetensors file.

    Args:
        folder: The model folder.
        file: Name of the file in it.

    Raises:
        CheckpointError: If the file is truncated, or its header is no safetensors header.
    """
    path = folder / file
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, fewer than a safetensors file can have; download it again")
    with open(path, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} announces a header of {length} bytes, but the file has {size} bytes; "
                "it is truncated or no safetensors file"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None)
        tensors = {name: _tensor_info(file, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has a damaged safetensors header; download it again") from None
    data_bytes = size - 8 - length
    for name, info in tensors.items():
        _check_tensor(path, name, info, data_bytes)
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_ranges(path, ordered, data_bytes)
    return Shard(file, 8 + length, metadata, ordered)


def _tensor_info(file: str, entry: Mapping[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(value) is int and value >= 0 for value in (start, end, *shape)):
        raise ValueError("sizes are counts")
    return TensorInfo(file, str(entry["dtype"]), shape, start, end)


def _check_tensor(path: Path, name: str, info: TensorInfo, data_bytes: int) -> None:
    if info.start > info.end or info.end > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {info.end} of the data, the file has {data_bytes}; "
            "download it again"
        )
    expected = DTYPE_BYTES.get(info.dtype)
    for size in info.shape:
        expected = expected * size if expected is not None else None
    if expected is not None and expected != info.num_bytes:
        raise CheckpointError(
            f"{path}: {name} has {info.num_bytes} bytes, but shape {list(info.shape)} of {info.dtype} needs {expected}"
        )


def _check_ranges(path: Path, ordered: Mapping[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, info in ordered.items():
        if info.start != position:
            raise CheckpointError(f"{path}: {name} starts at byte {info.start}, the tensor before ends at {position}")
        position = info.end
    if position != data_bytes:
        raise CheckpointError(f"{path} has {data_bytes} bytes of data, but its tensors end at byte {position}")


# -- finding the vocabulary ---------------------------------------------------------------------------------------

def _stored_name(parameter: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Find a parameter among stored names, which may lack or have other prefixes (`model.`, `language_model.`)."""
    if parameter in tensors:
        return parameter
    parts = parameter.split(".")
    for first in range(1, len(parts) - 1):
        suffix = ".".join(parts[first:])
        if suffix in tensors:
            return suffix
    tail = ".".join(parts[-2:])
    found = [name for name in tensors if name == tail or name.endswith(f".{tail}")]
    if len(found) > 1:
        raise CheckpointError(f"{parameter} may be stored as any of {', '.join(sorted(found))}; cannot tell which")
    return found[0] if found else None


def _check(checkpoint: Checkpoint) -> None:
    names = checkpoint.names
    if not checkpoint.vocab_tensors or not (checkpoint.tied or checkpoint.embedding_name):
        raise CheckpointError(f"{checkpoint.folder} stores no {names.embedding}; its weights are of another model")
    if names.head is not None and not checkpoint.tied and checkpoint.head_name is None:
        raise CheckpointError(
            f"the config of {checkpoint.folder} says that {names.head} is not tied to the embedding, but it is not "
            "stored; its weights are of another model"
        )
    for name in checkpoint.vocab_tensors:
        _check_vocab_tensor(checkpoint, name)
    stated = config_vocab_size(checkpoint.config)
    if stated is not None and stated != checkpoint.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG_NAME} says vocab_size {stated}, but {checkpoint.vocab_tensors[0]} has "
            f"{checkpoint.vocab_size} rows; the config belongs to another checkpoint"
        )
    _refuse_other_tables(checkpoint)
    if checkpoint.tied and len(checkpoint.vocab_tensors) == 2:
        first, second = checkpoint.vocab_tensors
        if checkpoint.digest(first) != checkpoint.digest(second):
            raise CheckpointError(
                f"the config says that {second} is tied to {first}, but both are stored and differ; "
                "set tie_word_embeddings to false in config.json if the head is meant to be its own"
            )


def _check_vocab_tensor(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.tensors[name]
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{name} is stored as {info.dtype}; rows can be added to {', '.join(FLOAT_DTYPES)} only, "
            "use a checkpoint whose embedding and head are not quantised"
        )
    if len(info.shape) != 2 or info.shape != checkpoint.vocab_info.shape:
        raise CheckpointError(
            f"{name} has shape {list(info.shape)}, {checkpoint.vocab_tensors[0]} has "
            f"{list(checkpoint.vocab_info.shape)}; both must be [rows, hidden size]"
        )


def _refuse_other_tables(checkpoint: Checkpoint) -> None:
    """Refuse tensors that must grow with the vocabulary and that we have no rule for."""
    rows = checkpoint.vocab_size
    others = [name for name, info in checkpoint.tensors.items()
              if info.shape[:1] == (rows,) and name not in checkpoint.vocab_tensors]
    bias = checkpoint.names.head_bias
    stored_bias = _stored_name(bias, checkpoint.tensors) if bias is not None else None
    if stored_bias is not None:
        raise CheckpointError(f"the output head has a bias ({stored_bias}), and there is no rule for new tokens in it")
    if others and rows not in other_dimensions(checkpoint.config):
        raise CheckpointError(
            f"{', '.join(sorted(others)[:3])} also {'has' if len(others) == 1 else 'have'} {rows} rows, as many as the "
            "vocabulary, and there is no rule for new tokens in it"
        )


def config_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return the vocab_size that the language model uses, None if it is left to the class."""
    nested = config.get("text_config")
    for part in (nested if isinstance(nested, dict) else {}, config):
        if isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return None


def with_vocab_size(config: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """Copy a config with another vocab_size, wherever it is stated, and with nothing else changed.

    Args:
        config: config.json as it is written.
        num_rows: Rows stored in the new checkpoint.
    """
    changed = dict(config)
    nested = changed.get("text_config")
    if isinstance(nested, dict):
        # A wrapper may leave vocab_size to the default of its class; a new number must be written.
        changed["text_config"] = {**nested, "vocab_size": num_rows}
    if "vocab_size" in changed or not isinstance(nested, dict):
        changed["vocab_size"] = num_rows
    return changed


def other_dimensions(config: Mapping[str, Any]) -> set[int]:
    """Sizes of axes that a config implies, apart from the vocabulary.

    A weight whose first axis is one of these may equal the number of rows by accident.
    """
    sizes: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            sizes |= other_dimensions(value)
        elif type(value) is int and not key.startswith("vocab_size") and not key.endswith("_token_id"):
            sizes.add(value)
    hidden, inner = int(config.get("hidden_size") or 0), int(config.get("intermediate_size") or 0)
    heads = int(config.get("num_attention_heads") or 0)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or (hidden // heads if heads else 0))
    # Projections are stored fused in some families: query+key+value, gate+up.
    return sizes | {heads * head, kv_heads * head, (heads + 2 * kv_heads) * head, 2 * inner, 3 * hidden, 4 * hidden}


# -- new rows -----------------------------------------------------------------------------------------------------

def place_rows(embed_VD: "torch.Tensor", new_ND: "torch.Tensor", *, num_used_rows: int) -> "torch.Tensor":
    """Put new rows right after the rows in use, reusing padding before growing the matrix.

    Many checkpoints store more rows than the tokenizer has ids. A new token's id is the next free id, so
    its row belongs at `num_used_rows`, not at the end of the matrix. All other rows are copied bit for
    bit; the matrix never shrinks.

    Args:
        embed_VD: Embedding matrix as stored. Not modified.
        new_ND: One row per new token, in token-id order.
        num_used_rows: How many leading rows the tokenizer already addresses (U).

    Returns:
        A matrix of max(V, U + N) rows, in the dtype of `embed_VD`.

    Raises:
        CheckpointError: If the widths differ, the tokenizer addresses more rows than exist, or a new row
            is not finite in the dtype of `embed_VD`.
    """
    import torch

    num_rows, width = embed_VD.shape
    if new_ND.dim() != 2 or new_ND.shape[1] != width:
        raise CheckpointError(
            f"the new rows have shape {list(new_ND.shape)}, but a row of the model is {width} wide; "
            "they were made for another model"
        )
    if not 0 <= num_used_rows <= num_rows:
        raise CheckpointError(
            f"the tokenizer has {num_used_rows} ids but the embedding matrix has only {num_rows} rows; "
            "this tokenizer belongs to another checkpoint"
        )
    cast_ND = new_ND.to(embed_VD.dtype)
    bad = torch.nonzero(~torch.isfinite(cast_ND).all(dim=1)).flatten().tolist()
    if bad:
        raise CheckpointError(f"{len(bad)} new rows are not finite in {embed_VD.dtype}, the first is row {bad[0]}")
    last = num_used_rows + len(cast_ND)
    placed = embed_VD.new_empty((max(num_rows, last), width))
    placed[:num_rows] = embed_VD
    placed[num_used_rows:last] = cast_ND
    return placed


def write_shard(source_folder: Path, shard: Shard, target: Path, replaced: Mapping[str, "torch.Tensor"]) -> int:
    """Write a copy of a shard with some tensors replaced; all other tensors are copied as bytes.

    Args:
        source_folder: Folder of the shard.
        shard: Its header.
        target: The file to write.
        replaced: New tensors by name, in the dtype of the old ones; they may have more rows.

    Returns:
        Bytes of tensor data written.
    """
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    position = 0
    for name, info in shard.tensors.items():
        shape, size = info.shape, info.num_bytes
        if name in replaced:
            shape, size = tuple(replaced[name].shape), replaced[name].nbytes
        header[name] = {"dtype": info.dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format asks for tensor data at a multiple of 8
    with open(source_folder / shard.file, "rb") as source, open(target, "xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, info in shard.tensors.items():
            if name in replaced:
                file.write(_bytes_of(replaced[name]))
            else:
                for chunk in _byte_range(source, shard.data_start + info.start, info.num_bytes):
                    file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return position


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    import torch

    return tensor.detach().contiguous().view(torch.uint8).numpy().data.cast("B")


def _byte_range(file: BinaryIO, start: int, count: int) -> Iterator[bytes]:
    file.seek(start)
    while count:
        chunk = file.read(min(CHUNK_BYTES, count))
        if not chunk:
            raise CheckpointError(f"{file.name} became shorter while it was read")
        count -= len(chunk)
        yield chunk


# -- rows.safetensors ---------------------------------------------------------------------------------------------

def save_rows(path: Path, tokens: Sequence[NewToken], rows: Rows, header: Mapping[str, Any]) -> None:
    """Write the artifact of `distill`: float32 rows, with their tokens and a header in the metadata, atomically.

    Args:
        path: The file.
        tokens: One per row, in the order of the rows.
        rows: The rows.
        header: What they were made from and how; JSON-ready.
    """
    import torch
    from safetensors.torch import save

    tensors = {"input": rows.input_ND} if rows.output_ND is None else {"input": rows.input_ND, "output": rows.output_ND}
    for name, tensor in tensors.items():
        assert tensor.dim() == 2, f"{name}: {list(tensor.shape)}"
        assert len(tensor) == len(tokens), f"{name}: {list(tensor.shape)}, {len(tokens)} tokens"
    document = {"artifact": ROWS_ARTIFACT, "version": FORMAT_VERSION, **header}
    metadata = {"format": "pt", "header": json.dumps(document, ensure_ascii=False),
                "tokens": json.dumps([token.to_json() for token in tokens], ensure_ascii=False)}
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, "wb") as file:
        file.write(save(plain, metadata=metadata))


def load_rows(path: Path) -> tuple[tuple[NewToken, ...], Rows, dict[str, Any]]:
    """Read the artifact of `distill`.

    Args:
        path: A file that `save_rows` wrote.

    Returns:
        The tokens, their rows, and the header.

    Raises:
        UsageError: If the file is missing, or is no rows file of this version of vocabext.
        CheckpointError: If it is damaged.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    metadata = read_shard(path.parent, path.name).metadata or {}
    if "header" not in metadata or "tokens" not in metadata:
        raise UsageError(f"{path} is a safetensors file, but none that vocabext distill wrote")
    try:
        header: dict[str, Any] = json.loads(metadata["header"])
        if header.get("artifact") != ROWS_ARTIFACT or header.get("version") != FORMAT_VERSION:
            raise UsageError(
                f"{path} holds {header.get('artifact')!r} of version {header.get('version')}, this vocabext reads "
                f"{ROWS_ARTIFACT!r} of version {FORMAT_VERSION}; make the file again"
            )
        tokens = tuple(NewToken.from_json(row) for row in json.loads(metadata["tokens"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path} has damaged metadata; make the file again") from None
    tensors = load_file(path)
    if any(tensor.dim() != 2 or len(tensor) != len(tokens) for tensor in tensors.values()) or "input" not in tensors:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise CheckpointError(f"{path} has {len(tokens)} tokens, but rows of shape {shapes}; make the file again")
    return tokens, Rows(tensors["input"], tensors.get("output")), header
