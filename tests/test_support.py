"""What `inspect` says can be done with a model is what happens: the same words from every verb, before any work."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from patch_case import make_rows
from planted import failed, skipped
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, tiny_folder, tiny_tokenizer
from tiny_families import FAMILIES, NUM_ROWS, OTHER_KINDS, add_adapter, of_kind, tiny_family
from transformers.utils import is_peft_available

from vocabext.checkpoint.folder import WEIGHTS_NAME, load_rows, open_checkpoint
from vocabext.checkpoint.manifest import read_manifest
from vocabext.cli.inspect import inspect as inspect_command
from vocabext.cli.mine import mine as mine_command
from vocabext.cli.patch import patch as patch_command
from vocabext.corpus import Document
from vocabext.distill import distill_file
from vocabext.errors import CheckpointError, UnsupportedError, UsageError, VocabextError
from vocabext.inspect import inspect_model
from vocabext.mine.stage import mine, write_candidates
from vocabext.model.support import check_loads
from vocabext.options import CollectConfig, DistillConfig, MineConfig
from vocabext.patch.stage import patch
from vocabext.run import RunConfig, run
from vocabext.tokenizer import load_tokenizer
from vocabext.verify import behaviour
from vocabext.verify.stage import verify

TEXTS = (" heart rate", " heart muscle")
CORPUS = "the heart muscle and the heart rate of the heart muscle\n" * 30
@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.verify.stage.NUM_ADVERSARIAL", 20)
    monkeypatch.setattr(behaviour, "STREAMED", 5)
    monkeypatch.setattr(behaviour, "RANDOM_ROWS", 5)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / WEIGHTS_NAME
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def refusals(folder: Path, tmp_path: Path, *, method: str = "distill") -> dict[str, str]:
    """What each verb refuses a model with, without any work done."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    good = tiny_folder(tmp_path / "good")
    make_rows(good, tmp_path / "rows.safetensors", TEXTS)
    candidates = tmp_path / "candidates.jsonl"
    base, config = load_tokenizer(good), MineConfig(dedup=False, budget=2, min_count=2)
    write_candidates(candidates, mine([Document("d", CORPUS)] * 3, base, config), base, model=str(good),
                     config=config, corpus=("d",))
    found = {}
    for verb, call in {
        "inspect": lambda: inspect_model(str(folder)),
        "patch": lambda: patch(tmp_path / "rows.safetensors", str(folder), tmp_path / "new"),
        "run": lambda: run(RunConfig(str(folder), (str(corpus),), tmp_path / "out", mine=config,
                                     distill=DistillConfig(method=method, device="cpu"))),
        "distill": lambda: distill_file(candidates, str(folder), tmp_path / "r.safetensors",
                                        DistillConfig(method="mean")),
    }.items():
        with pytest.raises(VocabextError) as refused:
            call()
        found[verb] = str(refused.value)
    mined = CliRunner().invoke(mine_command, [str(corpus), "--model", str(folder), "--budget", "2", "-o",
                                              str(tmp_path / "mined")])
    assert isinstance(mined.exception, VocabextError)
    found["mine"] = str(mined.exception)
    assert not (tmp_path / "out-work" / "candidates.jsonl").exists()
    return found


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_what_writes_no_text_is_refused_by_what_it_is(tmp_path: Path, name: str) -> None:
    folder = of_kind(tmp_path / "m", name)
    said = refusals(folder, tmp_path)
    assert f"holds {name}, {OTHER_KINDS[name][2]}" in said["inspect"]
    assert len(set(said.values())) == 1, said
    shown = CliRunner().invoke(inspect_command, [str(folder), "--json"], catch_exceptions=False)
    assert (shown.exit_code, json.loads(shown.stdout)["support"]["patch"]) == (0, said["inspect"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi", "gemma3-wrapped", "llava", "qwen2.5-vl",
                                    "mistral3", "gemma3n"])
def test_what_inspect_says_yes_to_is_patched_and_verified(tmp_path: Path, family: str) -> None:
    base = tiny_family(tmp_path / "base", family)
    found = inspect_model(str(base)).support
    assert found.patch is None
    assert (found.run is None) == (family != "gemma3n")
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    result = verify(tmp_path / "new", str(base))
    assert (failed(result), "loads in transformers, same logits" in skipped(result)) == ([], False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_a_wrapper_that_inspect_says_yes_to_is_distilled_and_measured(tmp_path: Path, family: str) -> None:
    base = tiny_family(tmp_path / "base", family)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{CORPUS[:200]} and rate {i}"}) + "\n" for i in range(40)))
    outcomes = run(RunConfig(str(base), (str(corpus),), tmp_path / "new",
                            mine=MineConfig(dedup=False, budget=2, min_count=2),
                             distill=DistillConfig(device="cpu", dtype="float32", rounds=1)))
    assert [outcome.state for outcome in outcomes] == ["made"] * 6


# -- tensors that are not the class's ------------------------------------------------------------------------------

@pytest.mark.parametrize(("prefix", "cure"), [
    ("_orig_mod.", "model._orig_mod"), ("module.", "model.module"), ("base_model.model.", "merge_and_unload"),
    ("model._orig_mod.", "model._orig_mod")])
def test_tensors_named_by_a_wrapper_are_refused_with_the_cure(tmp_path: Path, prefix: str, cure: str) -> None:
    folder = tiny_family(tmp_path / "m", "llama")
    rename(folder, lambda name: prefix + name)
    said = refusals(folder, tmp_path)
    assert len(set(said.values())) == 1, said
    assert "21 missing (lm_head.weight" in said["inspect"]
    assert f"21 unknown to it ({prefix}" in said["inspect"]
    assert cure in said["inspect"]


def test_an_adapter_that_is_not_merged_is_refused_with_the_cure(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "m", "llama")
    rename(folder, lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))
    with pytest.raises(CheckpointError, match=r"2 missing \(model.layers.0.self_attn.q_proj.weight.*merge_and_unload"):
        open_checkpoint(folder)


def edited(change: Callable[[dict[str, torch.Tensor]], object], family: str = "llama") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        tensors = load_file(tiny_family(folder, family) / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
        return folder

    return build


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("build", "said"), [
    (edited(lambda t: t.pop(UP)), "1 missing (model.layers.1.mlp.up_proj.weight)"),
    (edited(lambda t: t.update({"score.weight": torch.zeros(2, 64)})), r"1 unknown to it (score.weight)"),
    (edited(lambda t: t.update({UP: torch.zeros(3, 64)})), f"1 of another shape ({UP} is [3, 64] instead of [96, 64])"),
    (edited(lambda t: t.pop("model.layers.0.mlp.experts.1.down_proj.weight"), "qwen3-moe"), "1 of another shape"),
    (edited(lambda t: [t.pop(name) for name in list(t) if "vision" in name], "gemma3-wrapped"), "32 missing"),
])
def test_tensors_that_would_be_random_or_dropped_are_refused(tmp_path: Path, build: Callable[[Path], Path], said: str
                                                             ) -> None:
    folder = build(tmp_path / "m")
    with pytest.raises(CheckpointError) as refused:
        inspect_model(str(folder))
    assert said in str(refused.value)


@pytest.mark.parametrize("change", [
    lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),  # tied, stored twice
    lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}),  # ignored by the class
    lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)],  # the body's own names
])
def test_tensors_that_transformers_knows_what_to_do_with_are_accepted(tmp_path: Path, change: Any) -> None:
    assert inspect_model(str(edited(change, "llama-tied")(tmp_path / "m"))).support.patch is None


# -- quantised bodies ----------------------------------------------------------------------------------------------

def parts(**dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.ones(6, 1).to(dtype) for name, dtype in dtypes.items()}


U8, I8, I32, F32, F8 = torch.uint8, torch.int8, torch.int32, torch.float32, torch.float8_e4m3fn
# What stands in the place of a weight, by method.
LAYOUTS: dict[str, tuple[dict[str, Any], Mapping[str, torch.Tensor]]] = {
    "bitsandbytes-4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {
        **parts(weight=U8, weight__absmax=U8, weight__quant_map=F32, weight__nested_absmax=F32,
                weight__nested_quant_map=F32), "weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=U8)}),
    "bitsandbytes-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True},
                       parts(weight=I8, SCB=F32, weight_format=U8)),
    "gptq": ({"quant_method": "gptq", "bits": 4}, parts(qweight=I32, qzeros=I32, scales=F32, g_idx=I32, bias=F32)),
    "awq": ({"quant_method": "awq", "bits": 4}, parts(qweight=I32, qzeros=I32, scales=F32)),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"},
                           parts(weight_packed=I32, weight_scale=F32, weight_shape=I32)),
    "fp8": ({"quant_method": "fp8"}, parts(weight=F8, weight_scale_inv=F32)),
    "hqq": ({"quant_method": "hqq"}, parts(W_q=U8, scale=F32, zero=F32, shape=I32, nbits=I32)),
}


def quantised(folder: Path, method: str, family: str = "llama", *, head: bool = False) -> Path:
    """Save a model whose projections are stored as a method stores them."""
    settings, packed = LAYOUTS[method]
    tiny_family(folder, family)
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS_NAME).items():
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            tensors |= {name.removesuffix("weight") + part: value.clone() for part, value in packed.items()}
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    edit_json(folder / "config.json", quantization_config=settings)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("method", LAYOUTS)
def test_a_quantised_body_is_patched(tmp_path: Path, method: str, family: str) -> None:
    base = quantised(tmp_path / "base", method, family)
    assert inspect_model(str(base)).support.patch is None
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    assert failed(verify(tmp_path / "new", str(base), load_weights=False)) == []


@pytest.mark.parametrize("method", LAYOUTS)
def test_a_quantised_head_is_refused_by_its_name(tmp_path: Path, method: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^lm_head(\.weight)? is (quantised \(there is lm_head\.|stored as)"):
        open_checkpoint(quantised(tmp_path / "base", method, head=True))


def test_parts_with_as_many_rows_as_the_vocabulary_are_no_table_of_it(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base", "bitsandbytes-4")
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors["model.layers.0.mlp.up_proj.weight.absmax"] = torch.zeros(NUM_ROWS, dtype=U8)
    tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"] = torch.zeros(NUM_ROWS)
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    assert open_checkpoint(folder).vocab_size == NUM_ROWS


def test_a_tensor_that_is_missing_in_a_quantised_body_is_missed(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base", "gptq")
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name},
              folder / WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        open_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes-4", "hqq"])
def test_a_model_whose_library_is_missing_is_extended_by_means_alone(tmp_path: Path, method: str) -> None:
    folder = quantised(tmp_path / "base", method)
    found = inspect_model(str(folder)).support
    assert found.patch is None
    assert str(found.run).startswith(f"{folder} is quantised by {method.split('-')[0]}, and transformers cannot load")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{CORPUS[:200]} and rate {i}"}) + "\n" for i in range(40)))
    config = {"mine": MineConfig(dedup=False, budget=2, min_count=2)}
    with pytest.raises(UsageError) as refused:
        run(RunConfig(str(folder), (str(corpus),), tmp_path / "new", **config))
    assert str(refused.value) == found.run
    assert not (tmp_path / "new-work").exists() or not list((tmp_path / "new-work").iterdir())
    outcomes = run(RunConfig(str(folder), (str(corpus),), tmp_path / "new", distill=DistillConfig(method="mean"),
                             **config))
    assert [outcome.state for outcome in outcomes] == [*["made"] * 4, f"not made: {found.run}"]


def test_a_class_that_computes_otherwise_is_extended_by_means_and_not_measured(tmp_path: Path) -> None:
    folder, corpus = tiny_family(tmp_path / "m", "minicpm3"), tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{CORPUS[:200]} and rate {i}"}) + "\n" for i in range(40)))
    outcomes = run(RunConfig(str(folder), (str(corpus),), tmp_path / "new", distill=DistillConfig(method="mean"),
                             mine=MineConfig(dedup=False, budget=2, min_count=2)))
    assert [outcome.state for outcome in outcomes[:-1]] == ["made"] * 4
    assert outcomes[-1].state.startswith("not made: the logits of MiniCPM3ForCausalLM")


@pytest.mark.parametrize(("family", "window", "message"), [
    ("minicpm3", 24, "the logits of MiniCPM3ForCausalLM"),
    ("llama", 200, r"--window is 200, but the model takes 128 positions"),
])
def test_what_shows_only_with_the_weights_is_refused_before_mining(
    tmp_path: Path, family: str, window: int, message: str
) -> None:
    folder, corpus = tiny_family(tmp_path / "m", family), tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{CORPUS[:200]} and rate {i}"}) + "\n" for i in range(40)))
    with pytest.raises(UsageError, match=message):
        run(RunConfig(str(folder), (str(corpus),), tmp_path / "new",
                            mine=MineConfig(dedup=False, budget=2, min_count=2),
                      collect=CollectConfig(window=window)))
    assert not (tmp_path / "new-work").exists()


def test_the_rows_of_means_are_those_of_the_stored_rows(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", dtype=torch.bfloat16)
    base, config = load_tokenizer(folder), MineConfig(dedup=False, budget=2, min_count=2)
    write_candidates(tmp_path / "c.jsonl", mine([Document("d", CORPUS)] * 3, base, config), base, model=str(folder),
                     config=config, corpus=("d",))
    distill_file(tmp_path / "c.jsonl", str(folder), tmp_path / "r.safetensors", DistillConfig(method="mean"))
    tokens, rows, _ = load_rows(tmp_path / "r.safetensors")
    embedding_VD = load_file(folder / WEIGHTS_NAME)["model.embed_tokens.weight"].float()
    torch.testing.assert_close(rows.input_ND, torch.stack([embedding_VD[list(t.run)].mean(0) for t in tokens]))


# -- adapters and other pairs of files -----------------------------------------------------------------------------

def test_an_adapter_given_as_a_model_is_named_with_its_base(tmp_path: Path) -> None:
    add_adapter(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    said = refusals(tmp_path / "adapter", tmp_path)
    assert set(said.values()) == {f"{tmp_path / 'adapter'} is an adapter of org/base; merge it first (peft: "
                                  "merge_and_unload), then pass the merged folder"}


def test_an_adapter_with_a_config_beside_it_is_named_all_the_same(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / WEIGHTS_NAME).unlink()
    add_adapter(folder)
    assert {"is an adapter of org/base" in said for said in refusals(folder, tmp_path).values()} == {True}


def test_of_two_files_that_need_each_other_both_are_carried_or_neither(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    add_adapter(base)
    for name, weights in (("lora", "adapter_model.safetensors"), ("pickled", "adapter_model.bin")):
        add_adapter(base / name, weights)
    (base / "original").mkdir()
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}})
    for name in ("pytorch_model-1.bin", "original/consolidated.00.pth", "openvino_model.bin"):
        (base / name).write_bytes(b"weights")
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "original/params.json",
                 "openvino_model.xml", "tf_model.h5.index.json"):
        (base / name).write_text(index)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    result = patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    out = {"adapter_config.json", "adapter_model.safetensors", "pickled/adapter_config.json",
           "pickled/adapter_model.bin", "pytorch_model-1.bin", "original/consolidated.00.pth", "openvino_model.bin",
           "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "original/params.json",
           "openvino_model.xml", "tf_model.h5.index.json"}
    assert set(result.files.left_out) == set(read_manifest(tmp_path / "new").files.left_out) == out
    assert not {name for name in out if (tmp_path / "new" / name).exists()}
    assert {path.name for path in (tmp_path / "new" / "lora").iterdir()} == {"adapter_config.json",
                                                                             "adapter_model.safetensors"}
    assert "an adapter beside the model" in result.files.left_out["adapter_model.safetensors"]
    assert failed(verify(tmp_path / "new", str(base))) == []


def test_patch_says_why_each_file_is_left_out(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    add_adapter(base)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    shown = CliRunner().invoke(patch_command, [str(tmp_path / "rows.safetensors"), "--model", str(base), "-o",
                                               str(tmp_path / "new")], catch_exceptions=False)
    assert "adapter_config.json (describes an adapter that is left out" in shown.stdout


def test_an_adapter_that_transformers_would_load_with_the_model_keeps_it_from_being_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_folder(tmp_path / "base")
    add_adapter(base)
    if not is_peft_available():
        assert inspect_model(str(base)).support.run is None
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: True)
    assert "has an adapter beside the model" in str(inspect_model(str(base)).support.run)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    checks = {check.name: check for check in verify(tmp_path / "new", str(base)).checks}
    said = checks["loads in transformers, same logits"]  # the base would be read with the adapter, the new one not
    assert (said.verdict, "has an adapter beside the model" in said.detail) == ("not checked", True)


# -- rows, indices, tokenizers -------------------------------------------------------------------------------------

def test_too_few_rows_for_the_tokenizer_are_told_before_mining(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", num_rows=280)
    said = inspect_model(str(folder)).support
    assert said.patch == said.run
    assert "the tokenizer has 290 ids but the embedding matrix has only 280 rows" in str(said.patch)
    with pytest.raises(CheckpointError) as refused:
        run(RunConfig(str(folder), (str(tmp_path),), tmp_path / "new"))
    assert str(refused.value) == said.patch


@pytest.mark.parametrize("metadata", [None, {}])
def test_an_index_without_its_total_is_used_or_refused_with_the_cure(tmp_path: Path, metadata: Any) -> None:
    base = tiny_folder(tmp_path / "base", sharded=True)
    edit_json(base / "model.safetensors.index.json", metadata=metadata)
    found = inspect_model(str(base)).support
    assert found.patch is None
    assert (found.run is None) == (metadata is not None)
    if metadata is None:
        assert 'add "metadata": {"total_size":' in str(found.run)
    make_rows(base, tmp_path / "rows.safetensors", TEXTS)
    patch(tmp_path / "rows.safetensors", str(base), tmp_path / "new")
    assert failed(verify(tmp_path / "new", str(base))) == []


def test_a_tokenizer_alone_can_be_mined_for(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "corpus.txt").write_text(CORPUS)
    mined = CliRunner().invoke(mine_command, [str(tmp_path / "corpus.txt"), "--model", str(folder), "--budget", "2",
                                              "--min-count", "2", "--no-dedup", "-o", str(tmp_path / "mined")],
                               catch_exceptions=False)
    assert mined.exit_code == 0, mined.stderr


def test_the_table_says_what_can_be_done(tmp_path: Path) -> None:
    shown = CliRunner().invoke(inspect_command, [str(tiny_folder(tmp_path / "m"))], catch_exceptions=False).stdout
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith(("mine and patch", "distill and eval"))
            ] == ["yes", "yes"]
    refused = CliRunner().invoke(inspect_command, [str(of_kind(tmp_path / "t5", "T5ForConditionalGeneration"))],
                                 catch_exceptions=False)
    assert "mine and patch" in refused.stdout
    assert "no: " in refused.stdout
    assert "an encoder-decoder" in refused.stdout


def test_what_can_be_loaded_is_asked_before_text_is_generated(tmp_path: Path) -> None:
    folder = quantised(tmp_path / "base", "gptq")
    with pytest.raises(UsageError, match="is quantised by gptq"):
        check_loads(folder)


@pytest.mark.slow
def test_every_family_of_the_tests_is_one_that_inspect_says_yes_to(tmp_path: Path) -> None:
    refused = {family: inspect_model(str(tiny_family(tmp_path / family, family))).support.patch for family in FAMILIES}
    assert not any(refused.values()), refused
