"""Tiny random models of every family that checkpoints are patched for, built from transformers' configs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from fuzz import every
from safetensors.torch import save_file
from tiny_checkpoints import tiny_tokenizer
from transformers import PreTrainedModel

NUM_ROWS = 296  # free rows behind the 290 ids of the tokenizer, and room for a matrix to grow
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0,
         "eos_token_id": 1, "pad_token_id": None}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}


def _text(name: str, **config: Any) -> Callable[[int], PreTrainedModel]:
    def build(num_rows: int) -> PreTrainedModel:
        settings = getattr(transformers, f"{name}Config")(vocab_size=num_rows, **{**SHAPE, **config})
        return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(settings)

    return build


def _gpt2(num_rows: int) -> PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=num_rows, n_embd=64, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=1))


def _wrapped(name: str, text: dict[str, Any], **config: Any) -> Callable[[int], PreTrainedModel]:
    def build(num_rows: int) -> PreTrainedModel:
        settings = getattr(transformers, f"{name}Config")(text_config={**SHAPE, **text, "vocab_size": num_rows},
                                                          **config)
        return getattr(transformers, f"{name}ForConditionalGeneration")(settings)

    return build


def _per_layer(build: Callable[..., Any], extra: int = 0) -> Callable[[int], PreTrainedModel]:
    """A model with per-layer embeddings; `extra` rows more or fewer than the vocabulary has."""
    return lambda num_rows: build(vocab_size_per_layer_input=num_rows + extra)(num_rows)


GEMMA3N = {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2,
           "intermediate_size": [96, 96], "layer_types": ["sliding_attention", "full_attention"],
           "activation_sparsity_pattern": [0.0, 0.0], "sliding_window": 32}
GEMMA4 = {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "global_head_dim": 32,
          "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}}

FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": _text("Llama", tie_word_embeddings=False),
    "llama-tied": _text("Llama", tie_word_embeddings=True),
    "mistral": _text("Mistral", sliding_window=64),
    "mixtral": _text("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _text("Qwen2", tie_word_embeddings=True),
    "qwen2-moe": _text("Qwen2Moe", shared_expert_intermediate_size=48, **EXPERTS),
    "qwen3": _text("Qwen3", tie_word_embeddings=True),
    "qwen3-moe": _text("Qwen3Moe", **EXPERTS),
    "gemma2": _text("Gemma2", sliding_window=64, query_pre_attn_scalar=32),
    "gemma3": lambda num_rows: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        vocab_size=num_rows, **{**SHAPE, "sliding_window": 64})),
    "gemma3-wrapped": _wrapped("Gemma3", {"sliding_window": 64}, vision_config=VISION, mm_tokens_per_image=4),
    "gemma3n": _per_layer(lambda **sizes: lambda num_rows: transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(vocab_size=num_rows, **{**SHAPE, **GEMMA3N, **sizes}))),
    "gemma3n-shorter-table": _per_layer(lambda **sizes: lambda num_rows: transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(vocab_size=num_rows, **{**SHAPE, **GEMMA3N, **sizes})), extra=-3),
    "gemma4": _per_layer(lambda **sizes: lambda num_rows: transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(vocab_size=num_rows, **{**SHAPE, **GEMMA4, **sizes}))),
    "gpt2": _gpt2,
    "gpt-neox": _text("GPTNeoX", tie_word_embeddings=False),
    "olmo2": _text("Olmo2"),
    "phi": _text("Phi"),  # its head has a bias
    "phi3": _text("Phi3"),
    "falcon": lambda num_rows: transformers.FalconForCausalLM(transformers.FalconConfig(
        vocab_size=num_rows, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1)),
    "gemma4-wrapped": _wrapped("Gemma4", {**GEMMA4, "vocab_size_per_layer_input": NUM_ROWS, "pad_token_id": 0},
                               vision_config=None, audio_config=None),
    "llava": _wrapped("Llava", {"model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"},
                      image_token_index=3),
    "qwen2.5-vl": _wrapped("Qwen2_5_VL", MROPE, vision_config={
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [0]}),
    "mistral3": _wrapped("Mistral3", {"model_type": "mistral", "sliding_window": 64},
                         vision_config={**VISION, "model_type": "pixtral", "head_dim": 16}),
}
# One for each way of naming, tying, scaling and extending tensors; `make fuzz` takes all of them.
FEW = ["llama", "llama-tied", "qwen2-moe", "gemma3n-shorter-table", "gemma4-wrapped", "gpt2", "phi", "falcon"]
every_family = every("family", FAMILIES, few=FEW)


def _plain(name: str, head: str = "ForCausalLM", **config: Any) -> Callable[[int], PreTrainedModel]:
    """A class whose config has names of its own."""
    def build(num_rows: int) -> PreTrainedModel:
        settings = getattr(transformers, f"{name}Config")(vocab_size=num_rows, bos_token_id=0, eos_token_id=1, **config)
        return getattr(transformers, f"{name}{head}")(settings)

    return build


WINDOW = 16
BLOCKS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# What a reader of text must get right: windows and chunks shorter than it, scaled and bounded logits, scaled rows,
# positions that are learned or only biases of attention, states that run on, and several of these in one model.
READERS: dict[str, Callable[[int], PreTrainedModel]] = {
    "mistral-window": _text("Mistral", sliding_window=WINDOW),
    "qwen2-window": _text("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "gemma2-window": _text("Gemma2", sliding_window=WINDOW, query_pre_attn_scalar=32, final_logit_softcapping=2.0),
    "gemma3-window": _text("Gemma3Text", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "gpt-oss": _text("GptOss", sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "llama4-chunks": _text("Llama4Text", attention_chunk_size=WINDOW, intermediate_size_mlp=96, num_local_experts=2,
                           no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"]),
    "granite": _text("Granite", logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.2),
    "granite-moe": _text("GraniteMoe", logits_scaling=6.0, num_local_experts=4, num_experts_per_tok=2),
    "cohere": _text("Cohere", logit_scale=0.0625),
    "cohere2": _text("Cohere2", logit_scale=0.25, sliding_window=WINDOW, sliding_window_pattern=2),
    "gpt-neo": _plain("GPTNeo", attention_types=[[["global", "local"], 1]], window_size=WINDOW, hidden_size=64,
                      num_layers=2, num_heads=2, max_position_embeddings=128),
    "nanochat": _text("NanoChat", final_logit_softcapping=2.0),
    "falcon-h1": _text("FalconH1", lm_head_multiplier=0.25, embedding_multiplier=3.0, mamba_d_ssm=64, mamba_n_heads=4,
                       mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16),
    "recurrent-gemma": _text("RecurrentGemma", attention_window_size=WINDOW, logits_soft_cap=2.0, lru_width=64,
                             block_types=("recurrent", "attention")),
    "lfm2": _text("Lfm2", layer_types=["conv", "full_attention"]),
    "bloom": _plain("Bloom", hidden_size=64, n_layer=2, n_head=2),
    "mpt": _plain("Mpt", d_model=64, n_layers=2, n_heads=2, max_seq_len=128),
    "falcon-alibi": _plain("Falcon", alibi=True, **BLOCKS),
    "falcon-rotary": _plain("Falcon", alibi=False, **BLOCKS),
    "opt": _plain("OPT", ffn_dim=96, word_embed_proj_dim=32, max_position_embeddings=128, **BLOCKS),
    "xglm": _plain("XGLM", d_model=64, ffn_dim=96, num_layers=2, attention_heads=2, max_position_embeddings=128),
    "mamba": _plain("Mamba", hidden_size=64, num_hidden_layers=2, state_size=8),
    "rwkv": _plain("Rwkv", hidden_size=64, num_hidden_layers=2, context_length=128),
}

# They compute more between their states, or what they read, and their logits than is understood.
UNREADABLE: dict[str, Callable[[int], PreTrainedModel]] = {
    "bert-decoder": _plain("Bert", "LMHeadModel", is_decoder=True, intermediate_size=96, max_position_embeddings=128,
                           **BLOCKS),
    "modernbert-decoder": _text("ModernBertDecoder", local_attention=WINDOW, pad_token_id=0, cls_token_id=0,
                                sep_token_id=1, layer_types=["sliding_attention", "full_attention"]),
    "minicpm3": _text("MiniCPM3", num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16,
                      qk_nope_head_dim=16, v_head_dim=32),
}


# Its table has 289 rows: the last of the 290 ids has none, and must be in no new token.
GAP_IN_TABLE = _per_layer(lambda **sizes: lambda num_rows: transformers.Gemma3nForCausalLM(
    transformers.Gemma3nTextConfig(vocab_size=num_rows, **{**SHAPE, **GEMMA3N, **sizes})), extra=-7)


def tiny_family(folder: Path, family: str, *, num_rows: int = NUM_ROWS, noise: float = 0.02) -> Path:
    """Save a tiny model of a family with the tiny tokenizer (290 ids); more noise lets its layers do more."""
    torch.manual_seed(0)
    model = {**FAMILIES, **READERS, **UNREADABLE}[family](num_rows).eval()
    with torch.no_grad():  # zero biases and equal norms would hide a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- models of other kinds, which are refused ---------------------------------------------------------------------

BERT = {"vocab_size": NUM_ROWS, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 64}
T5 = {"vocab_size": NUM_ROWS, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": NUM_ROWS, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64}
WHISPER = {**{key: value for key, value in BART.items() if key != "max_position_embeddings"}, "num_mel_bins": 8,
           "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 0,
           "eos_token_id": 1, "decoder_start_token_id": 0}

# A class, its config, and what it is called.
OTHER_KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LlamaForSequenceClassification": ("Llama", SHAPE, "a sequence classifier"),
    "LlamaForTokenClassification": ("Llama", SHAPE, "a token classifier"),
    "LlamaForQuestionAnswering": ("Llama", SHAPE, "a model that marks answers in a text"),
    "LlamaModel": ("Llama", SHAPE, "a body without an output head"),
    "GPT2DoubleHeadsModel": ("GPT2", {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64},
                             "no causal language model"),
    "BertForMaskedLM": ("Bert", BERT, "a masked language model"),
    "BertModel": ("Bert", BERT, "an encoder"),
    "BertLMHeadModel": ("Bert", BERT,
                        "a model in which a word sees what follows it (its config does not say is_decoder)"),
    "XLNetLMHeadModel": ("XLNet", {"d_model": 64, "n_layer": 1, "n_head": 2, "d_inner": 96},
                         "a model in which a word sees what follows it (its config says attn_type 'bi')"),
    "Gemma3ForCausalLM": ("Gemma3Text", {**SHAPE, "use_bidirectional_attention": True},
                          "a model in which a word sees what follows it (its config says use_bidirectional_attention"),
    "T5ForConditionalGeneration": ("T5", T5, "an encoder-decoder"),
    "BartForConditionalGeneration": ("Bart", BART, "an encoder-decoder"),
    "WhisperForConditionalGeneration": ("Whisper", WHISPER, "an encoder-decoder"),
}


def of_kind(folder: Path, name: str) -> Path:
    """Save a tiny model of a class that writes no text from left to right."""
    config, settings, _ = OTHER_KINDS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{config}Config")(
        **{"vocab_size": NUM_ROWS, **settings}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


ADAPTER = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}


def add_adapter(folder: Path, weights: str = "adapter_model.safetensors") -> None:
    """Put an adapter into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 64)}, folder / weights, {"format": "pt"})
