"""The new folder loads wherever the base does: also in transformers 4, whose users have vLLM."""

import json
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from base_folders import CASES, Case, base_folder
from hard_texts import FRAGMENTS, possible
from real_assets import ASSETS
from transformers import AutoTokenizer

from vocabext.tokenizer import extend, load_tokenizer, save_expanded

# An interpreter that has transformers 4: pip install 'transformers==4.57.*' in a virtual environment of its own.
INTERPRETER = os.environ.get("VOCABEXT_TRANSFORMERS4")
# Loads folders, and prints what it makes of texts.
READER = """
import json, sys
from transformers import AutoTokenizer, __version__
assert __version__.startswith("4."), __version__
folders, texts = json.load(sys.stdin)
found = {}
for folder in folders:
    try:
        hf = AutoTokenizer.from_pretrained(folder)
        found[folder] = [[hf.encode(text, add_special_tokens=False) for text in texts], sorted(hf.all_special_tokens)]
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
json.dump(found, sys.stdout)
"""
needs_4 = pytest.mark.skipif(not INTERPRETER, reason="set VOCABEXT_TRANSFORMERS4 to a Python with transformers 4")
TEXTS = [f"The {fragment}. {fragment} and" for fragment in FRAGMENTS[::9]]
NAMES = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}

# What a tokenizer_config.json (or special_tokens_map.json) of the base says about more special tokens.
WRITTEN: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "names of transformers 4": (NAMES, {}),
    "in the map of special tokens": ({}, NAMES),
    "in both": (NAMES, NAMES),
    "objects": ({"additional_special_tokens": [{"content": "<|im_start|>", "lstrip": False, "rstrip": False,
                                                "single_word": False, "normalized": False, "special": True,
                                                "__type": "AddedToken"}]}, {}),
    "single names": ({"extra_special_tokens": {"image_token": "<|im_start|>"}}, {}),
    "single names and a list": ({"extra_special_tokens": {"image_token": "<|im_start|>"}, **NAMES}, {}),
    "names of transformers 5": ({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}, {}),
    "nothing": ({}, {}),
}


def pair(folder: Path, case: Case, special_map: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    """A base folder, and the folder of its expanded tokenizer."""
    more = {"special_tokens_map.json": json.dumps(special_map).encode()} if special_map else {}
    folder.mkdir()
    base = base_folder(folder / "base", case, **more)
    return base, expanded(base, folder / "new")


def expanded(base: Path, folder: Path) -> Path:
    tokenizer = load_tokenizer(base)
    folder.mkdir()
    save_expanded(extend(tokenizer, possible(tokenizer)), base, folder)
    return folder


def qwen(settings: Mapping[str, Any]) -> Case:
    case = CASES["qwen2 json"]
    return Case(case.model_type, case.files, {**case.tokenizer_config, **settings})


@pytest.mark.parametrize("which", WRITTEN)
def test_more_special_tokens_are_written_as_the_base_wrote_them(which: str, tmp_path: Path) -> None:
    settings, special_map = WRITTEN[which]
    base, new = pair(tmp_path / "pair", qwen(settings), special_map)
    written = json.loads((new / "tokenizer_config.json").read_text())
    was_list = isinstance(settings.get("extra_special_tokens"), list)
    assert isinstance(written.get("extra_special_tokens"), list) == was_list  # transformers 4 fails at a list there
    assert not (was_list and "additional_special_tokens" in written)
    if isinstance(settings.get("extra_special_tokens"), dict):
        assert written["extra_special_tokens"] == settings["extra_special_tokens"]
    old, hf = (AutoTokenizer.from_pretrained(path) for path in (base, new))
    assert hf.extra_special_tokens == old.extra_special_tokens
    assert hf.all_special_tokens == old.all_special_tokens


def read_by_4(folders: list[Path]) -> dict[str, Any]:
    assert INTERPRETER is not None
    asked = json.dumps([[str(folder) for folder in folders], TEXTS])
    done = subprocess.run([INTERPRETER, "-c", READER], input=asked, capture_output=True, text=True, check=False,
                          timeout=120, env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_loads(pairs: Mapping[str, tuple[Path, Path]]) -> int:
    """What loads in transformers 4 loads there when it is expanded, and cuts text as it does here."""
    found = read_by_4([folder for folders in pairs.values() for folder in folders])
    for name, (base, new) in pairs.items():
        if isinstance(found[str(base)], str):
            continue
        assert not isinstance(found[str(new)], str), (name, found[str(new)])
        hf = AutoTokenizer.from_pretrained(new)
        assert found[str(new)][0] == [hf.encode(text, add_special_tokens=False) for text in TEXTS], name
        assert found[str(new)][1] == sorted(hf.all_special_tokens), name
    return sum(not isinstance(found[str(base)], str) for base, _ in pairs.values())


@needs_4
def test_what_loads_in_transformers_4_loads_there_when_it_is_expanded(tmp_path: Path) -> None:
    pairs = {which: pair(tmp_path / str(i), qwen(settings), special_map)
             for i, (which, (settings, special_map)) in enumerate(WRITTEN.items())}
    assert check_loads(pairs) == len(WRITTEN) - 1  # a list under the name of transformers 5 does not


@needs_4
def test_every_kind_of_folder_loads_in_transformers_4(tmp_path: Path) -> None:
    names = [name for name in CASES if "json" in name]
    assert check_loads({name: pair(tmp_path / str(i), CASES[name]) for i, name in enumerate(names)}) > 20


@needs_4
def test_real_tokenizers_load_in_transformers_4(tmp_path: Path) -> None:
    archives = sorted((ASSETS / "tokenizers").glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"{ASSETS / 'tokenizers'} holds no tokenizers; set VOCABEXT_ASSETS to run this test")
    pairs = {}
    for archive in archives:
        name = archive.name.removesuffix(".tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
        pairs[name] = tmp_path / name, expanded(tmp_path / name, tmp_path / f"{name}-new")
    assert check_loads(pairs) == len(archives)
