"""Tokenizers in folders: what transformers makes of them, and writing one that it leaves as it is."""

import fnmatch
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vocabext.checkpoint.folder import read_json, resolve_model
from vocabext.checkpoint.manifest import refuse_expanded
from vocabext.checkpoint.named_ids import named_ids
from vocabext.errors import TokenizerError, UsageError, in_one_line
from vocabext.tokenizer.base import BaseTokenizer, ExpandedTokenizer, given_rows, plain_copy
from vocabext.tokenizer.scheme import SUPPORTED
from vocabext.tokens import Expansion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# From these files a reader would make a tokenizer without the new tokens, or with other special tokens.
STALE_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tekken*.json", "*.model", "*.model.v*", "*.spm", "*.tiktoken",
               "tokenizer.*.json", "special_tokens_map.json", "added_tokens.json")
# Settings that a model class acts upon, or that name files which `patch` does not carry over.
DROPPED_SETTINGS = ("auto_map", "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy",
                    "fast_tokenizer_files", "mistral_format")
AS_WRITTEN = "tokenization_as_written"
AS_WRITTEN_CODE = '''"""Take tokenizer.json as it is.

For some model types transformers rebuilds the tokenizer from code of its own, whatever class
tokenizer_config.json names, unless `auto_map` names one. It does; this file is only run by those who
load the folder with trust_remote_code=True.
"""

from transformers import PreTrainedTokenizerFast


class TokenizerAsWritten(PreTrainedTokenizerFast):
    """The tokenizer of tokenizer.json."""
'''


def is_stale(name: str) -> bool:
    """Tell whether a reader would make another tokenizer from a file of this name."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in STALE_FILES)


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False, heed_files: bool = True) -> "BaseTokenizer":
    """Load the effective tokenizer of a model folder or hub id.

    Args:
        model: The folder or hub id.
        trust_remote_code: Whether code that comes with the model may run.
        heed_files: Whether to reserve ids that other files of the folder name, and to keep their bans and stops.

    Raises:
        UsageError: If the folder does not exist.
        TokenizerError: If there is no tokenizer, or it cannot be extended; says which.
        CheckpointError: If a file beside it is damaged.
    """
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        if not Path(model).expanduser().is_dir():
            raise UsageError(f"the model folder {model} does not exist")
        model = Path(model).expanduser()
    elif not Path(model).is_dir():
        model = resolve_model(model)  # the whole model: files beside the tokenizer name ids
    hf = load_hf_tokenizer(model, trust_remote_code=trust_remote_code)
    if not heed_files:
        return BaseTokenizer(hf)
    named = named_ids(Path(model))
    if isinstance(hf.eos_token_id, int):
        named.rules.anywhere.setdefault(hf.eos_token_id, "eos_token of the tokenizer")
    return BaseTokenizer(hf, named)


def load_base(folder: Path, *, trust_remote_code: bool = False) -> "BaseTokenizer":
    """Load the tokenizer of a model that is to be expanded.

    Raises:
        UsageError: If the model was expanded already.
        TokenizerError: If its tokenizer cannot be extended.
        CheckpointError: If ids of plain text have no row, or a file is damaged.
    """
    refuse_expanded(folder)
    base = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if base.named.num_rows is not None:
        given_rows(base, base.named.num_rows)
    return base


def load_base_of(folder: Path, first_new_id: int, *, trust_remote_code: bool = False) -> "BaseTokenizer":
    """Load the tokenizer of a base that an expanded checkpoint was made from.

    Args:
        folder: The base.
        first_new_id: Where the new tokens begin; up to 0.2.0 they began behind the tokenizer's own ids, whatever other
            files name.
        trust_remote_code: Whether code that comes with the base may run.
    """
    base = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if base.num_own_ids == first_new_id != base.first_new_id:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code, heed_files=False)
    return base


def load_hf_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load a tokenizer as transformers loads it, whether or not it can be extended. Nothing else calls transformers.

    Raises:
        TokenizerError: If there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (Path(model) / "tekken.json").is_file() and (Path(model) / "tokenizer.json").is_file():
        options["mistral_format"] = False  # only the other one can be extended
    try:
        hf = AutoTokenizer.from_pretrained(str(model), **options)
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        reason = in_one_line(error)
        names = [path.name for path in Path(model).iterdir()] if Path(model).is_dir() else ["tokenizer.json"]
        if not any(name == "tokenizer.json" or is_stale(name) for name in names):
            reason = "there is no tokenizer.json in it; copy the tokenizer files that belong to the model there"
        raise TokenizerError(f"{model} has no tokenizer that transformers can load: {reason}") from error
    if getattr(hf, "backend_tokenizer", None) is None:
        raise TokenizerError(f"the tokenizer of {model} is {type(hf).__name__}, which has no tokenizer.json form; "
                             f"supported are {SUPPORTED}")
    return hf


def check_made_for(header: Mapping[str, Any], base: "BaseTokenizer", source: object) -> None:
    """Refuse an artifact whose first new id is another one than that of the model in use, `base`.

    Raises:
        UsageError: If the header names another number of base ids.
    """
    made_for = header.get("base")
    recorded = made_for.get("num_used_ids") if isinstance(made_for, dict) else None
    if isinstance(made_for, dict) and recorded not in (None, base.first_new_id):
        raise UsageError(f"{source} was made for {made_for.get('model')} with {recorded} token ids, but this model has "
                         f"{base.first_new_id}; use the model it was made for, or mine again")


def load_expanded(folder: Path, expansion: Expansion) -> ExpandedTokenizer:
    """Load the tokenizer of an expanded checkpoint as transformers loads it, whatever that turns out to be.

    Raises:
        TokenizerError: If transformers cannot load it.
    """
    hf = load_hf_tokenizer(folder, trust_remote_code=False)
    return ExpandedTokenizer(plain_copy(hf.backend_tokenizer), hf, expansion)


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
        TokenizerError: If `AutoTokenizer` would load another tokenizer than this function wrote.
    """
    (folder / "tokenizer.json").write_text(expanded.backend.to_str(pretty=True), "utf-8")
    path = base_folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    _write_config(_settings(config, expanded.hf), folder)
    if list(_found_otherwise(expanded.backend, base_folder, folder)):
        # transformers goes by the model type, whatever class is named, unless the folder has a class of its own.
        (folder / f"{AS_WRITTEN}.py").write_text(AS_WRITTEN_CODE, "utf-8")
        auto_map = {"AutoTokenizer": [None, f"{AS_WRITTEN}.TokenizerAsWritten"]}
        _write_config({**_settings(config, expanded.hf), "auto_map": auto_map}, folder)
        for part, wanted, found in _found_otherwise(expanded.backend, base_folder, folder):
            raise TokenizerError(f"transformers loads another {part} than was written: {found} instead of {wanted}")
    return sorted(path.name for path in base_folder.iterdir() if is_stale(path.name))


def _settings(config: Mapping[str, Any], hf: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the settings with which transformers takes tokenizer.json as it is."""
    settings = {name: value for name, value in config.items() if name not in DROPPED_SETTINGS}
    # A model class would rebuild the pre-tokenizer from its own code; this class takes the file as it is.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.update({name: value for name, value in hf.special_tokens_map.items() if isinstance(value, str)})
    extra = [str(token) for token in getattr(hf, "extra_special_tokens", None) or []]
    # Readers before transformers 5 know one of these names, and fail at a list under the other.
    if extra and not isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = extra
    settings["model_input_names"] = list(hf.model_input_names)
    settings["padding_side"] = hf.padding_side
    settings["clean_up_tokenization_spaces"] = bool(hf.clean_up_tokenization_spaces)
    if hf.model_max_length < 10**12:
        settings["model_max_length"] = hf.model_max_length
    return settings


def _write_config(settings: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def _found_otherwise(wanted: Tokenizer, base_folder: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the parts of a tokenizer that transformers loads from a folder otherwise than `wanted` has them.

    It borrows the base's config.json for that, since the model type in it decides as well.
    """
    config, here = base_folder / "config.json", folder / "config.json"
    borrowed = config.is_file() and not here.exists()
    if borrowed:
        shutil.copyfile(config, here)
    try:
        yield from _differences(wanted, load_hf_tokenizer(folder).backend_tokenizer)
    finally:
        if borrowed:
            here.unlink()


def _differences(wanted: Tokenizer, found: Tokenizer) -> Iterator[tuple[str, str, str]]:
    texts = wanted.to_str(), found.to_str()
    if texts[0] == texts[1]:  # mostly so, and parsing both texts is slow
        return
    left, right = map(json.loads, texts)
    for part in ("model", "pre_tokenizer", "normalizer", "post_processor", "decoder"):
        if left[part] != right[part]:
            yield part, json.dumps(left[part])[:200], json.dumps(right[part])[:200]
    ids = [{a["content"]: a["id"] for a in spec["added_tokens"]} for spec in (left, right)]
    if ids[0] != ids[1]:
        yield "list of added tokens", str(ids[0])[:200], str(ids[1])[:200]
