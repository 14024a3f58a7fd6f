"""Tokenizers in folders: what transformers makes of them, and writing one that it leaves as it is."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vocabext.errors import TokenizerError, UsageError
from vocabext.expansion import Expansion
from vocabext.manifest import has_manifest
from vocabext.tokenizer.base import BaseTokenizer, ExpandedTokenizer, plain_backend
from vocabext.tokenizer.scheme import SUPPORTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files from which other readers would rebuild the tokenizer without the new tokens.
STALE_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "spiece.model",
               "sentencepiece.bpe.model", "vocab.txt", "qwen.tiktoken", "tiktoken.model")  # fmt: skip


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> "BaseTokenizer":
    """Load the effective tokenizer of a model folder or hub id.

    Raises:
        UsageError: If the folder does not exist.
        TokenizerError: If there is no tokenizer, or one that cannot be extended; says which.
    """
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        if not Path(model).expanduser().is_dir():
            raise UsageError(f"the model folder {model} does not exist")
        model = Path(model).expanduser()
    hf = _auto_tokenizer(model, trust_remote_code=trust_remote_code)
    try:
        return BaseTokenizer(hf)
    except TokenizerError as error:
        if Path(model).is_dir() and has_manifest(Path(model)):
            raise TokenizerError(f"{model} is an expanded checkpoint already, and its tokenizer cannot be extended "
                                 "again; start from its base (vocabext.json names it)") from error
        raise


def _auto_tokenizer(model: str | Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        known = ("tokenizer.json", *STALE_FILES)
        if Path(model).is_dir() and not any((Path(model) / name).is_file() for name in known):
            reason = "there is no tokenizer.json in it; copy the tokenizer files that belong to the model there"
        raise TokenizerError(f"{model} has no tokenizer that transformers can load: {reason}") from error
    if getattr(hf, "backend_tokenizer", None) is None:
        raise TokenizerError(f"the tokenizer of {model} is {type(hf).__name__}, which has no tokenizer.json form; "
                             f"supported are {SUPPORTED}")
    return hf


def check_made_for(header: Mapping[str, Any], base: "BaseTokenizer", path: Path) -> None:
    """Refuse an artifact whose new ids are numbered from another place.

    Args:
        header: The header of the artifact.
        base: The tokenizer that it is to be used with.
        path: The artifact, for the message.

    Raises:
        UsageError: If the header names another number of base ids.
    """
    made_for = header.get("base")
    made_for = made_for if isinstance(made_for, dict) else {}
    recorded = made_for.get("num_used_ids")
    if recorded not in (None, base.num_used_ids):
        raise UsageError(f"{path} was made for {made_for.get('model')} with {recorded} token ids, but this model has "
                         f"{base.num_used_ids}; use the model it was made for, or mine again")


def load_expanded(folder: Path, expansion: Expansion) -> ExpandedTokenizer:
    """Load the tokenizer of an expanded checkpoint as transformers loads it, whatever that turns out to be.

    Args:
        folder: The expanded checkpoint.
        expansion: The new tokens that its manifest names.

    Raises:
        TokenizerError: If transformers cannot load it.
    """
    hf = _auto_tokenizer(folder, trust_remote_code=False)
    return ExpandedTokenizer(plain_backend(hf), hf, expansion)


def save_expanded(expanded: ExpandedTokenizer, base_folder: Path, folder: Path) -> list[str]:
    """Write the tokenizer into a checkpoint folder and check what transformers makes of it.

    Args:
        expanded: The tokenizer.
        base_folder: The base model's folder, for its tokenizer_config.json.
        folder: An existing folder to write into.

    Returns:
        Names of files of the base that must not be carried over: other readers would rebuild the
        tokenizer from them, without the new tokens.

    Raises:
        TokenizerError: If `AutoTokenizer` would load something else than what was written.
    """
    from transformers import AutoTokenizer

    expanded.backend.save(str(folder / "tokenizer.json"))
    path = base_folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # A model class would rebuild the pre-tokenizer from its own code; this one takes the file as it is.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("auto_map", "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        config.pop(name, None)
    hf = expanded.hf
    for name, value in hf.special_tokens_map.items():
        if isinstance(value, str):
            config[name] = value
    config["model_input_names"] = list(hf.model_input_names)
    config["padding_side"] = hf.padding_side
    config["clean_up_tokenization_spaces"] = bool(hf.clean_up_tokenization_spaces)
    if hf.model_max_length < 10**12:
        config["model_max_length"] = hf.model_max_length
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    loaded = AutoTokenizer.from_pretrained(str(folder))
    for part, wanted, found in _differences(expanded.backend, loaded.backend_tokenizer):
        raise TokenizerError(f"transformers loads another {part} than was written: {found} instead of {wanted}")
    return [name for name in STALE_FILES if (base_folder / name).exists()]


def _differences(wanted: Tokenizer, found: Tokenizer) -> Iterator[tuple[str, str, str]]:
    left, right = json.loads(wanted.to_str()), json.loads(found.to_str())
    for part in ("model", "pre_tokenizer", "normalizer", "post_processor", "decoder"):
        if left[part] != right[part]:
            yield part, json.dumps(left[part])[:200], json.dumps(right[part])[:200]
    ids = [{a["content"]: a["id"] for a in spec["added_tokens"]} for spec in (left, right)]
    if ids[0] != ids[1]:
        yield "list of added tokens", str(ids[0])[:200], str(ids[1])[:200]
