"""A model folder: its config, its shards, and the tensors that hold one row per token id.

Headers alone tell everything that `inspect` and `patch` must decide; see `vocabext.checkpoint.shards` for the files.

Shapes: V rows of the vocabulary as stored, U rows the tokenizer addresses, N new rows, D hidden size.
"""

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vocabext.checkpoint.architecture import EmbeddingNames, embedding_names, find_misfit, with_inner
from vocabext.checkpoint.shards import DTYPE_BYTES as DTYPE_BYTES  # other modules import it from here
from vocabext.checkpoint.shards import Shard, TensorInfo, read_shard
from vocabext.checkpoint.vocabulary import (
    EMBEDDING,
    FLOAT_DTYPES,
    HEAD,
    QUANTISED_FILES,
    RowTensor,
    find_row_tensors,
    quantisation,
)
from vocabext.errors import CheckpointError, UnsupportedError, UsageError, in_one_line
from vocabext.files.atomic import atomic_file
from vocabext.files.jsonl import FORMAT_VERSION
from vocabext.files.ranges import Extent
from vocabext.tokens import NewToken

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ROWS_ARTIFACT = "rows"
MAX_NAME_BYTES = 255  # longer names no file system has
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
# The files that a download from the hub takes: no pickles, and no other copies of the weights.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Rows:
    """What distillation makes: one vector per new token, in the order of the tokens.

    Attributes:
        input_ND: Rows for the input embedding, float32.
        output_ND: Rows for an untied output head, float32; None if distillation made none.
        bias_N: Entries for the bias of the head; None if it has none, and in a rows file: `patch` makes them.
    """

    input_ND: "torch.Tensor"
    output_ND: "torch.Tensor | None" = None
    bias_N: "torch.Tensor | None" = None


@dataclass(frozen=True)
class RowsFile:
    """A rows file whose tokens and header were read, and whose rows were not.

    Attributes:
        path: The file.
        tokens: One per row, in the order of the rows.
        header: What distillation made the rows from, and how.
        tensors: Where the tensor `input`, and `output` if there is one, lies.
        data_start: Offset of the first tensor byte in the file.
    """

    path: Path
    tokens: tuple[NewToken, ...]
    header: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_start: int


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose parts agree. Holds headers, not weights.

    Attributes:
        folder: The folder.
        config: config.json as it is written.
        shards: The safetensors files that hold the model, by name.
        tensors: Every stored tensor.
        names: The vocabulary parameters, by the names of the model class.
        row_tensors: Every stored tensor with one row per token id, by stored name.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    names: EmbeddingNames
    row_tensors: dict[str, RowTensor]

    @property
    def embedding_name(self) -> str | None:
        """Stored name of the input embedding; None if a tied model stores only its head."""
        return self._stored(EMBEDDING)

    @property
    def head_name(self) -> str | None:
        """Stored name of the output head; None if it is not stored."""
        return self._stored(HEAD)

    def _stored(self, role: str) -> str | None:
        return next((name for name, tensor in self.row_tensors.items() if tensor.role == role), None)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.names.tied

    @property
    def vocab_tensors(self) -> tuple[str, ...]:
        """Stored names of embedding and head; a tied model may store only one of them."""
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
        """Read one tensor by its stored name.

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
        return self.extent(name).sha256()

    def extent(self, name: str) -> Extent:
        """Return where a tensor's bytes lie."""
        info = self.tensors[name]
        return Extent(self.folder / info.file, self.shards[info.file].data_start + info.start, info.num_bytes)

    def rows(self, name: str, first: int, end: int) -> Extent:
        """Return where rows `[first, end)` of a tensor lie."""
        size = self.tensors[name].row_bytes
        return self.extent(name).part(first * size, (end - first) * size)


# -- finding a model ----------------------------------------------------------------------------------------------

# Files that transformers, or vocabext, looks for by name and can do without.
READ_BY_NAME = ("*config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.json",
                "merges.txt", "vocab.txt", "tekken.json", "tokenizer.model", "special_tokens_map.json",
                "added_tokens.json", "chat_template.*")


def resolve_model(model: str) -> Path:
    """Turn a folder or a hub id into a folder.

    Args:
        model: A folder, or a hub id such as `org/name`, which is downloaded (no pickles) into the hub cache.

    Returns:
        The folder. It holds a config.json.

    Raises:
        UsageError: If `model` is neither.
        CheckpointError: If the hub does not answer or does not have it, or the folder has no config.json.
    """
    path = Path(model)
    if path.is_dir():
        folder = path
    elif path.exists():
        raise UsageError(f"{model} is a file; a model is a folder with config.json and safetensors, or a hub id")
    # Where a folder OWNER exists here, OWNER/NAME is rather a mistyped path than a hub id.
    elif HUB_ID.fullmatch(model) and not model.endswith((".safetensors", ".json")) \
            and (path.parent == Path() or not path.parent.exists()):
        folder = _download(model)
    else:
        raise UsageError(f"the model folder {model} does not exist")
    _check_links(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise _adapter(folder) or CheckpointError(f"{folder} has no {CONFIG_NAME}; it is no model folder")
    return folder


def _adapter(folder: Path) -> UnsupportedError | None:
    """Return the error for a folder that holds an adapter in place of a model; None if it holds none."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "a model that it does not name"
    return UnsupportedError(f"{folder} is an adapter of {base}; merge it first (peft: merge_and_unload), then pass the "
                            "merged folder")


def _check_links(folder: Path) -> None:
    """Refuse a link to nowhere with a name that readers look for: they would go on as if there were no such file."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and any(fnmatch.fnmatch(path.name, name) for name in READ_BY_NAME):
            raise CheckpointError(f"{path} is a link to nowhere ({path.readlink()}); the model is not complete, "
                                  "download it again")


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
    except Exception as error:  # three HTTP libraries have connection errors of their own
        raise CheckpointError(
            f"{model} is no folder here, and it cannot be had from the hub ({in_one_line(error, 200)}); "
            "download it where there is a network, and pass the folder"
        ) from error


# -- reading a folder ---------------------------------------------------------------------------------------------

def open_checkpoint(folder: Path, *, trust_remote_code: bool = False, complete: bool = True) -> Checkpoint:
    """Read the config and all safetensors headers of a model folder, and find its vocabulary tensors.

    Args:
        folder: A folder as `resolve_model` returns it.
        trust_remote_code: Whether code that comes with the model may run.
        complete: Whether to refuse a model that lacks tensors of its class, or has others.

    Returns:
        The checkpoint. The function reads no weights, except where a tied model stores both of its vocabulary tensors:
        it compares these.

    Raises:
        CheckpointError: If a part is missing or damaged, parts contradict each other, or the tensors are not those
            of the model class. The message names the part.
        UnsupportedError: If it is no causal language model, or its vocabulary tensors cannot be extended.
    """
    config = read_json(folder / CONFIG_NAME)
    shards = read_shards(folder)
    tensors = {name: info for shard in shards.values() for name, info in shard.tensors.items()}
    _check_layers(folder, config, len(tensors))
    names = embedding_names(folder, trust_remote_code=trust_remote_code)
    quantised = quantisation(config) is not None or any((folder / name).is_file() for name in QUANTISED_FILES)
    misfit = find_misfit(folder, tensors, quantised=quantised,
                         trust_remote_code=trust_remote_code) if complete else None
    if misfit is not None and misfit.wrapped:  # before `find_row_tensors` reports one of the odd names as a fault
        raise CheckpointError(misfit.said)
    checkpoint = Checkpoint(folder=folder, config=config, shards=shards, tensors=tensors, names=names,
                            row_tensors=find_row_tensors(folder, config, names, tensors))
    if misfit is not None:
        raise CheckpointError(misfit.said)
    _check_tied(checkpoint)
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


def read_shards(folder: Path) -> dict[str, Shard]:
    """Read the headers of all shards of a model folder, by file name.

    Raises:
        CheckpointError: If files and index do not agree, or one is damaged.
    """
    single, index = (folder / WEIGHTS_NAME).is_file(), (folder / INDEX_NAME).is_file()
    if single and index:
        raise CheckpointError(
            f"{folder} has both {WEIGHTS_NAME} and {INDEX_NAME}, and programs differ in which one they load; remove one"
        )
    if single:
        return {WEIGHTS_NAME: read_shard(folder, WEIGHTS_NAME)}
    if index:
        return _read_indexed(folder)
    pickles = [path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern)]
    if all(name.startswith("adapter_model.") for name in pickles) and (adapter := _adapter(folder)) is not None:
        raise adapter
    if pickles:
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
    for odd in (file for file in weight_map.values() if not _is_plain_name(file)):
        raise CheckpointError(f"{folder / INDEX_NAME} names the shard {odd!r:.200}, which is no plain file name; "
                              "shards lie in the model folder itself")
    for file in dict.fromkeys(weight_map.values()):
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


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and len(os.fsencode(file)) <= MAX_NAME_BYTES and file.isprintable() \
        and "\\" not in file and file != ".." and PurePosixPath(file).parts == (file,)


def _check_layers(folder: Path, config: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse a config with more layers than tensors, before `embedding_names` builds a class with a million layers."""
    for part in with_inner(config):
        for key in LAYER_KEYS:
            if isinstance(part.get(key), int) and not 0 <= part[key] <= num_tensors:
                raise CheckpointError(f"{folder / CONFIG_NAME} says {key} {part[key]}, but {num_tensors} tensors are "
                                      "stored; the config belongs to another checkpoint")


def _check_tied(checkpoint: Checkpoint) -> None:
    if checkpoint.tied and len(checkpoint.vocab_tensors) == 2:
        first, second = checkpoint.vocab_tensors
        if checkpoint.digest(first) != checkpoint.digest(second):
            raise CheckpointError(
                f"the config says that {second} is tied to {first}, but both are stored and differ; "
                "set tie_word_embeddings to false in config.json if the head is meant to be its own"
            )


# -- rows.safetensors ---------------------------------------------------------------------------------------------

def save_rows(path: Path, tokens: Sequence[NewToken], rows: Rows, header: Mapping[str, Any]) -> None:
    """Write the artifact of `distill`: float32 rows, with their tokens and a header in the metadata, atomically.

    Args:
        path: The file.
        tokens: One per row, in the order of the rows.
        rows: The rows.
        header: What distillation made them from, and how; JSON-ready.

    Raises:
        CheckpointError: If there is not one row for each token, or there is a bias.
    """
    import torch
    from safetensors.torch import save

    if rows.bias_N is not None:
        raise CheckpointError("a rows file holds no bias; `patch` makes it")
    tensors = {"input": rows.input_ND} if rows.output_ND is None else {"input": rows.input_ND, "output": rows.output_ND}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or len(tensor) != len(tokens):
            raise CheckpointError(f"the {name} rows have the shape {list(tensor.shape)}, but there are {len(tokens)} "
                                  "tokens; pass a matrix with one row for each")
    document = {"artifact": ROWS_ARTIFACT, "version": FORMAT_VERSION, **header}
    metadata = {"format": "pt", "header": json.dumps(document, ensure_ascii=False),
                "tokens": json.dumps([token.to_json() for token in tokens], ensure_ascii=False)}
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, "wb") as file:
        file.write(save(plain, metadata=metadata))


def load_rows(path: Path) -> tuple[tuple[NewToken, ...], Rows, dict[str, Any]]:
    """Read the artifact of `distill`, a file that `save_rows` wrote.

    Returns:
        The tokens, their rows, and the header.

    Raises:
        UsageError: If the file is missing, or is no rows file of this version of vocabext.
        CheckpointError: If it is damaged.
    """
    from safetensors.torch import load_file

    file = open_rows(path)
    tensors = load_file(path)
    return file.tokens, Rows(tensors["input"], tensors.get("output")), file.header


def open_rows(path: Path) -> RowsFile:
    """Read tokens and header of the artifact of `distill`; raises what `load_rows` raises."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    shard = read_shard(path.parent, path.name)
    metadata = shard.metadata or {}
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
        facts = header.get("per_token", [])
        if not isinstance(header.get("options", {}), dict) or not all(isinstance(fact, dict) for fact in facts):
            raise ValueError("options and facts are objects")
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has damaged metadata; make the file again") from None
    shapes = {name: list(info.shape) for name, info in shard.tensors.items()}
    if any(len(shape) != 2 or shape[0] != len(tokens) for shape in shapes.values()) or "input" not in shapes:
        raise CheckpointError(f"{path} has {len(tokens)} tokens, but rows of shape {shapes}; make the file again")
    for name, info in shard.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path} stores {name} as {info.dtype}; rows are numbers of one of "
                                  f"{', '.join(FLOAT_DTYPES)}; make the file again")
    return RowsFile(path, tokens, header, shard.tensors, shard.data_start)
