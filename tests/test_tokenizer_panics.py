"""Texts at which the regex engine of `tokenizers` panics: one line, whoever encodes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_tokenizers import as_hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from vocabext.cli.main import cli
from vocabext.errors import TokenizerError
from vocabext.serve.model import Encoder
from vocabext.tokenizer import BaseTokenizer, extend

# A split expression that takes exponential time where the others take quadratic: no megabytes are needed.
HOPELESS = "x" * 40 + "!"


def hopeless() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(x+x+)+y| ?\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def expanded() -> Any:
    base = BaseTokenizer(as_hf(hopeless()))
    return extend(base, [base.new_token("heart")])


@pytest.mark.parametrize("encode", [
    lambda: BaseTokenizer(as_hf(hopeless())).encode(HOPELESS),
    lambda: BaseTokenizer(as_hf(hopeless())).encode_batch(["fine", HOPELESS]),
    lambda: BaseTokenizer(as_hf(hopeless())).scheme.encode_units(["fine", HOPELESS]),
    lambda: BaseTokenizer(as_hf(hopeless())).encode_with_places([HOPELESS]),
    lambda: expanded().encode(HOPELESS),
    lambda: Encoder(hopeless(), 256).encode(HOPELESS),
    lambda: Encoder(hopeless(), 256).cut(HOPELESS),
], ids=["encode", "batch", "units", "places", "expanded", "serve", "cut"])
def test_a_text_at_which_the_regex_engine_gives_up_is_named_in_one_line(encode: Callable[[], Any]) -> None:
    with pytest.raises(TokenizerError, match=r"^the tokenizer gave up \(.*retry-limit.*\) at .*: 41 characters that "
                                             r"begin with 'x+'; cut it into shorter texts, or leave it out$"):
        encode()


def test_mine_ends_with_one_line_at_such_a_text(tmp_path: Path) -> None:
    as_hf(hopeless()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 256}))
    (tmp_path / "corpus.txt").write_text(f"a heart\n\n{HOPELESS}\n")
    done = CliRunner().invoke(cli, ["mine", str(tmp_path / "corpus.txt"), "--model", str(tmp_path / "model"),
                                    "--budget", "3", "-o", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 1
    assert "the tokenizer gave up" in done.stderr
    assert "Traceback" not in done.stderr
    assert isinstance(done.exception, SystemExit)
