"""Train the example's language model from nothing.

::

    python examples/train_model.py --minutes 50 -o DIR

needs Debian or Ubuntu (for ``apt-get download`` and ``dpkg-deb``), PyTorch, ``transformers``,
``tokenizers`` and a C++ compiler.  It

1. fetches general English and splits off a held-out part (``training/data.py``),
2. trains a tokenizer on the general English (``training/tokenizer.py``),
3. trains a small Llama on general English and the mining side of CPython's documentation, for as
   long as you say (``training/loop.py``),
4. compares it with a 5-gram on held-out text (``training/evaluate.py``, ``training/ngram.py``), and
5. writes a folder that ``transformers`` and vLLM load, with a model card whose every number was
   measured here (``training/card.py``).

The result differs from run to run: the budget is wall-clock time, so a faster machine learns more.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import python_docs
import torch
import transformers
from tokenizers import Tokenizer
from torch._inductor import config as inductor_config
from training import card, data, evaluate, loop, tokenizer
from training.model import Trainee, build
from training.optim import Optimizer
from transformers import GenerationConfig, LlamaForCausalLM

log = logging.getLogger("train_model")

SEED = 0
MUON_RATE = 0.02
ADAM_RATE = 0.003
WEIGHT_DECAY = 0.05

PROMPTS = (
    "The principal city of the country, situated on",
    "Return a new list containing all items",
    "If the argument is None,",
    "harbor\n",
)


@dataclass(frozen=True)
class Texts:
    """Everything there is to read.

    Attributes:
        sources: General English, with versions and held-out documents.
        mining: Domain documents to train on.
        heldout: Domain documents to evaluate on.
    """

    sources: list[data.Fetched]
    mining: list[str]
    heldout: list[str]

    def general(self) -> list[str]:
        """Return all general documents to train on."""
        return [text for fetched in self.sources for text in fetched.train]

    def general_heldout(self) -> list[str]:
        """Return all general documents to evaluate on."""
        return [text for fetched in self.sources for text in fetched.heldout]

    def english(self) -> list[str]:
        """Return the documents that the tokenizer is trained on."""
        chosen = [fetched for fetched in self.sources if fetched.source.tokenizer]
        return [text for fetched in chosen for text in fetched.train]


def read_texts(deb_dir: Path) -> Texts:
    """Fetch and read everything.

    Args:
        deb_dir: Where Debian archives are, or are downloaded to.

    Returns:
        The texts.
    """
    with tempfile.TemporaryDirectory() as work_dir:
        sources = data.fetch_all(deb_dir, Path(work_dir))
    mining, heldout = python_docs.extract()
    return Texts(sources, [doc.text for doc in mining], [doc.text for doc in heldout])


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a model's weights, rounded to bfloat16, and its configuration.

    Args:
        model: The model in float32; it is left as it is.
        folder: Where to.
    """
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    copy.config.use_cache = True
    copy.save_pretrained(folder)
    copy.config.use_cache = False
    (folder / "model.safetensors").chmod(0o644)


def train(texts: Texts, folder: Path, minutes: float, checkpoint_minutes: float) -> dict[str, Any]:
    """Train tokenizer and model and write both.

    Args:
        texts: What to read.
        folder: Where to write.
        minutes: Wall-clock budget of the model's training.
        checkpoint_minutes: Time between two checkpoints.

    Returns:
        What happened, ready for JSON.
    """
    inductor_config.cpp.dynamic_threads = True
    log.info("training the tokenizer")
    bpe = tokenizer.train(texts.english())
    tokenizer.save(bpe, folder)
    general = loop.Corpus.encode(bpe, texts.general())
    domain = loop.Corpus.encode(bpe, texts.mining)
    log.info("general %d tokens, domain %d tokens", len(general.tokens_N), len(domain.tokens_N))
    model = build(*tokenizer.special_ids(bpe), SEED)
    optimizer = Optimizer(model, muon_rate=MUON_RATE, adam_rate=ADAM_RATE, decay=WEIGHT_DECAY)
    result = loop.train(
        Trainee(model),
        optimizer,
        loop.Stream(general),
        loop.Stream(domain),
        minutes=minutes,
        checkpoint_minutes=checkpoint_minutes,
        checkpoint=lambda: save_model(model, folder),
        seed=SEED,
    )
    save_model(model, folder)
    return result


def seen_documents(corpus: loop.Corpus, tokens: int) -> loop.Corpus:
    """Return the documents that the first ``tokens`` tokens of training came from.

    Args:
        corpus: A training corpus.
        tokens: How many of its tokens were seen, in the order of the first pass.

    Returns:
        Those documents; all of them after a full pass.
    """
    order = corpus.shuffled_order(0)
    lengths = np.diff(corpus.starts)[order]
    return corpus.select(order[: 1 + int(np.searchsorted(np.cumsum(lengths), tokens))])


def measure(texts: Texts, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the model in a folder.

    Args:
        texts: What was read, and what was held out.
        folder: Model and tokenizer.
        result: What :func:`train` returned.

    Returns:
        ``evaluation`` and ``samples``, ready for JSON.
    """
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    general = loop.Corpus.encode(bpe, texts.general())
    domain = loop.Corpus.encode(bpe, texts.mining)
    heldout = {"domain": texts.heldout, "general": texts.general_heldout()}
    evaluation = evaluate.compare(
        model,
        {
            "seen": seen_documents(general, result["general_tokens_seen"]).joined(
                seen_documents(domain, result["domain_tokens_seen"])
            ),
            "domain": domain,
            "all": general.joined(domain),
        },
        {
            name: (loop.Corpus.encode(bpe, documents), sum(map(byte_length, documents)))
            for name, documents in heldout.items()
        },
    )
    prompts = {text: bpe.encode(text).ids for text in PROMPTS}
    samples = evaluate.continuations(model, prompts, length=60, seed=SEED)
    return {
        "evaluation": evaluation,
        "samples": {prompt: bpe.decode(ids) for prompt, ids in samples.items()},
    }


def byte_length(text: str) -> int:
    """Return the length of a text in UTF-8."""
    return len(text.encode())


def describe(texts: Texts, folder: Path, minutes: float, hardware: str) -> dict[str, Any]:
    """Collect what is known without training.

    Args:
        texts: What was read.
        folder: The model.
        minutes: The budget given.
        hardware: The machine in words.

    Returns:
        The rest of ``training.json``.
    """
    weights = folder / "model.safetensors"
    model = LlamaForCausalLM.from_pretrained(folder)
    return {
        "command": f"python examples/train_model.py --minutes {minutes:g} -o DIR",
        "hardware": hardware,
        "corpus_python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "parameters": model.num_parameters(),
        "weight_bytes": weights.stat().st_size,
        "settings": {
            "seed": SEED,
            "tokens_per_step": loop.TOKENS_PER_STEP,
            "short_row": loop.SHORT_ROW,
            "context": tokenizer.CONTEXT,
            "long_percent": 100 * (1 - loop.LONG_ROWS_FROM),
            "muon_rate": MUON_RATE,
            "adam_rate": ADAM_RATE,
            "weight_decay": WEIGHT_DECAY,
        },
        "sources": [
            {
                "package": fetched.source.package,
                "version": fetched.version,
                "licence": fetched.source.licence,
                "tokenizer": fetched.source.tokenizer,
                "documents": len(fetched.train),
                "bytes": sum(map(byte_length, fetched.train)),
            }
            for fetched in texts.sources
        ],
        "domain": {
            "documents": len(texts.mining),
            "bytes": sum(map(byte_length, texts.mining)),
        },
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the example's language model.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=50, help="training time (default: 50)")
    parser.add_argument(
        "--deb-dir",
        type=Path,
        default=Path.home() / ".cache" / "vocabext-example",
        help="folder of Debian archives; what is missing is downloaded to it",
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=10, help="time between saves")
    parser.add_argument("--hardware", default=platform.machine(), help="the machine, in words")
    parser.add_argument("--evaluate-only", action="store_true", help="keep the model in the folder")
    parser.add_argument("--force", action="store_true", help="replace the model in the folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process where left out.

    Returns:
        The exit status: 0, or 1 after a one-line error.
    """
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    transformers.utils.logging.disable_progress_bar()
    folder: Path = args.output
    record_path = folder / "training.json"
    exists = (folder / "model.safetensors").exists()
    try:
        if exists and not args.force and not args.evaluate_only:
            raise data.DataError(f"{folder} holds a model; use --force to replace it")
        if args.evaluate_only and not record_path.exists():
            raise data.DataError(f"{folder} holds no finished training")
        folder.mkdir(parents=True, exist_ok=True)
        texts = read_texts(args.deb_dir)
        if args.evaluate_only:
            result = json.loads(record_path.read_text(encoding="utf-8"))["training"]
        else:
            result = train(texts, folder, args.minutes, args.checkpoint_minutes)
        record = {
            **describe(texts, folder, result["minutes"], args.hardware),
            "training": result,
        }
        write_json(record_path, record)
        log.info("evaluating")
        record |= measure(texts, folder, result)
        write_json(record_path, record)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "README.md").write_text(card.write(record, config), encoding="utf-8")
    except (data.DataError, python_docs.ExtractError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
