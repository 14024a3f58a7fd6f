"""Write a model folder of any size: the shape of Llama, random weights, a tokenizer without training.

It serves to time what depends on bytes alone. The tokenizer has as many ids as the matrix has rows, so that new
tokens make the matrix grow.
"""

import itertools
import string
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vocabext.checkpoint.folder import Rows, open_checkpoint, save_rows
from vocabext.checkpoint.manifest import base_record
from vocabext.files.atomic import write_json
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import NewToken

SCALE = 0.02
NOISE = 2**24  # random numbers that are drawn; longer tensors repeat them
SPECIAL = ("<s>", "</s>")


def write_checkpoint(
    folder: Path, *, num_bytes: int, shard_bytes: int, num_rows: int = 32_000, hidden_size: int = 4096,
    intermediate_size: int = 14_336, num_heads: int = 32, num_kv_heads: int = 8,
) -> Path:
    """Write a model of bfloat16 weights with a head of its own, with as many layers as it takes.

    Args:
        folder: Where; made if it is not there.
        num_bytes: Size of the weights, at least.
        shard_bytes: Size of a shard, at most, unless one tensor is larger.
        num_rows: Rows of embedding and head, and ids of the tokenizer.
        hidden_size: Width of a row.
        intermediate_size: Width inside a layer.
        num_heads: Attention heads.
        num_kv_heads: Heads of keys and values.
    """
    sizes = {"vocab_size": num_rows, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
             "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    layers = 1
    while (shapes := _shapes(LlamaConfig(**sizes, num_hidden_layers=layers))) and _size(shapes) < num_bytes:
        layers += 1
    config = LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
                         dtype="bfloat16", architectures=["LlamaForCausalLM"])
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer(num_rows).save_pretrained(folder)
    noise = (torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) * SCALE).bfloat16()
    shards = list(_shards(shapes, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _noisy(noise, shapes[name]) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": _size(shapes)}, "weight_map": weight_map})
    return folder


def _shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}


def _size(shapes: dict[str, torch.Size]) -> int:
    return sum(2 * shape.numel() for shape in shapes.values())


def _shards(shapes: dict[str, torch.Size], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _noisy(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()


def tokenizer(num_ids: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose entries are pairs like `aB`, and pairs of pairs.

    Args:
        num_ids: How many ids it has, a few hundred to 400,000.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    pairs = list(itertools.product(string.ascii_lowercase, string.ascii_uppercase))
    quads = itertools.product(map("".join, pairs), repeat=2)  # always two pairs: merges reach every entry
    merges = list(itertools.islice(itertools.chain(pairs, quads), num_ids - len(vocabulary)))
    vocabulary |= {left + right: i for i, (left, right) in enumerate(merges, len(vocabulary))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def write_rows(path: Path, base: Path, num_new: int) -> tuple[NewToken, ...]:
    """Write a rows file with random input rows for words of letters.

    Args:
        path: The file.
        base: The model they are for.
        num_new: How many.
    """
    known, checkpoint = load_tokenizer(base), open_checkpoint(base)
    words = (" " + "".join(letters) for letters in itertools.product("qjxzkv", repeat=7))
    tokens = tuple(known.new_token(word) for word in itertools.islice(words, num_new))
    rows = torch.randn(num_new, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1)) * SCALE
    made_from = base_record(base, checkpoint.names, model=str(base), first_new_id=known.first_new_id)
    save_rows(path, tokens, Rows(rows), {"method": "random", "options": {}, "base": made_from})
    return tokens
