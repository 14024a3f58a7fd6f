"""A checkpoint whose weights hold the adapter: for engines without adapters, and for whoever wants no second file."""

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from vocabext.checkpoint.architecture import Quiet
from vocabext.checkpoint.folder import open_checkpoint
from vocabext.checkpoint.manifest import ADAPTER_FOLDER, ORIGINALS_FOLDER, read_manifest, write_manifest
from vocabext.files.folders import new_folder
from vocabext.model.adapter import load_adapter
from vocabext.model.frozen import load_model

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def merge_adapter(folder: Path, output: Path, *, force: bool = False, trust_remote_code: bool = False) -> None:
    """Write a healed checkpoint again with its adapter in the weights.

    vocabext.json says that it is merged; nothing in the new folder restores the base.

    Args:
        folder: A checkpoint that `heal` has made; only read.
        output: The folder to make, an absolute path.
        force: Whether a folder that is there is replaced.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UsageError: If the adapter does not fit.
    """
    manifest, stored = read_manifest(folder), open_checkpoint(folder, trust_remote_code=trust_remote_code)
    model = load_model(folder, device="cpu", dtype=DTYPES.get(stored.dtype, "float32"),
                       trust_remote_code=trust_remote_code, runs=False)
    merged = load_adapter(model, folder / ADAPTER_FOLDER).merge_and_unload()
    with new_folder(output, force=force) as target, TemporaryDirectory(dir=target) as scratch:
        names = {path.name for pattern in WEIGHTS for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.name not in (*names, ADAPTER_FOLDER, ORIGINALS_FOLDER):
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / path.name)
        with Quiet():
            merged.save_pretrained(scratch)
        for pattern in WEIGHTS:
            for path in Path(scratch).glob(pattern):
                path.rename(target / path.name)
        shutil.rmtree(scratch)
        new = open_checkpoint(target, trust_remote_code=trust_remote_code)
        tensors = {name: replace(record, file=new.tensors[name].file) for name, record in manifest.tensors.items()
                   if name in new.tensors}
        write_manifest(target, replace(
            manifest, originals=None, tensors=tensors,
            adapter={**manifest.adapter, "folder": None, "merged": True}))
        Path(scratch).mkdir()  # which `TemporaryDirectory` removes
