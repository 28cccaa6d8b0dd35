"""Tiny live PEFT models, one for each kind of adapter: what the rules are tested against."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HIDDEN, VOCABULARY = 16, 40


def llama(tied: bool = False, bias: bool = False, head: str = "causal") -> Any:
    """A llama of two layers, about 5,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attention_bias=bias,
        pad_token_id=0,
        num_labels=3,
    )
    model = LlamaForCausalLM if head == "causal" else LlamaForSequenceClassification
    return model(config)


def gpt2() -> Any:
    """A GPT-2 of one layer: layers of transposed weights, tied embeddings, biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": HIDDEN}
    return GPT2LMHeadModel(GPT2Config(**size, n_layer=1, n_head=2))


def _lora(**options: Any) -> Any:
    from peft import LoraConfig

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | options
    return LoraConfig(task_type=options.pop("task_type", "CAUSAL_LM"), **options)


def _of(kind: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        import peft

        targets = {} if "num_virtual_tokens" in options else {"target_modules": ["q_proj"]}
        return getattr(peft, kind)(**({"task_type": "CAUSAL_LM"} | targets | options))

    return config


Case = tuple[Callable[[], Any], Callable[[], Any]]
KINDS: dict[str, Case] = {
    "lora": (llama, _lora),
    "rslora": (llama, lambda: _lora(use_rslora=True, rank_pattern={"down_proj": 2})),
    "dora": (llama, lambda: _lora(use_dora=True)),
    "dora-embedding": (llama, lambda: _lora(use_dora=True, target_modules=["embed_tokens"])),
    "embedding": (llama, lambda: _lora(target_modules=["embed_tokens", "v_proj"])),
    "head": (llama, lambda: _lora(target_modules=["lm_head", "embed_tokens"])),
    "tied-embedding": (lambda: llama(tied=True), lambda: _lora(target_modules=["embed_tokens"])),
    "pattern": (llama, lambda: _lora(target_modules=r"model\.(embed_tokens|layers\.0\..*_proj)")),
    "all-linear": (llama, lambda: _lora(target_modules="all-linear")),
    "saved-modules": (
        llama,
        lambda: _lora(modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]),
    ),
    "tied-saved": (
        lambda: llama(tied=True),
        lambda: _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "tokens": (llama, lambda: _lora(trainable_token_indices=[1, 5])),
    "tokens-and-embedding": (
        llama,
        lambda: _lora(target_modules=["lm_head"], trainable_token_indices={"embed_tokens": [3]}),
    ),
    "tied-tokens": (lambda: llama(tied=True), lambda: _lora(trainable_token_indices=[1, 5])),
    "biases": (
        lambda: llama(bias=True, head="classes"),
        lambda: _lora(task_type="SEQ_CLS", bias="all"),
    ),
    "lora-biases": (lambda: llama(bias=True), lambda: _lora(bias="lora_only")),
    "bias-of-b": (
        lambda: llama(bias=True),
        lambda: _lora(lora_bias=True, target_modules=["q_proj"]),
    ),
    "classes": (lambda: llama(head="classes"), lambda: _lora(task_type="SEQ_CLS")),
    "gpt2": (
        gpt2,
        lambda: _lora(target_modules=["c_attn", "wte"], fan_in_fan_out=True),
    ),
    "gpt2-head": (gpt2, lambda: _lora(target_modules=["lm_head", "c_attn"], fan_in_fan_out=True)),
    "adalora": (llama, _of("AdaLoraConfig", init_r=4, target_r=2, total_step=10)),
    "loha": (llama, _of("LoHaConfig", r=2)),
    "lokr": (llama, _of("LoKrConfig", r=2)),
    "ia3": (
        llama,
        _of("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "vera": (llama, _of("VeraConfig", r=4)),
    "vera-no-projection": (llama, _of("VeraConfig", r=4, save_projection=False)),
    "oft": (llama, _of("OFTConfig", oft_block_size=4, r=0)),
    "boft": (llama, _of("BOFTConfig", boft_block_size=4)),
    "hra": (llama, _of("HRAConfig", r=4)),
    "miss": (llama, _of("MissConfig", r=4)),
    "ln-tuning": (llama, _of("LNTuningConfig", target_modules=["input_layernorm"])),
    "fourierft": (llama, _of("FourierFTConfig", n_frequency=10)),
    "randlora": (llama, _of("RandLoraConfig", r=4)),
    "pvera": (llama, _of("PveraConfig", r=4)),
    "vblora": (llama, _of("VBLoRAConfig", r=4, num_vectors=8, vector_length=4, topk=2)),
    "poly": (llama, _of("PolyConfig", r=4)),
    "c3a": (llama, _of("C3AConfig", block_size=4)),
    "road": (llama, _of("RoadConfig", group_size=4)),
    "waveft": (llama, _of("WaveFTConfig", n_frequency=10)),
    "delora": (llama, _of("DeloraConfig", r=4)),
    "gralora": (llama, _of("GraloraConfig", r=4, gralora_k=2)),
    "hira": (llama, _of("HiraConfig", r=4)),
    "glora": (llama, _of("GloraConfig", r=4)),
    "lily": (llama, _of("LilyConfig", r=4)),
    "deft": (llama, _of("DeftConfig", r=4)),
    "adamss": (llama, _of("AdamssConfig", r=4)),
    "beft": (llama, _of("BeftConfig")),
    "osf": (llama, _of("OSFConfig")),
    "peanut": (llama, _of("PeanutConfig")),
    "peanut-deep": (llama, _of("PeanutConfig", depth=1)),
    "psoft": (llama, _of("PsoftConfig", r=4)),
    "psoft-plain": (llama, _of("PsoftConfig", r=4, psoft_mag_a=False, psoft_mag_b=False)),
    "supertuning": (llama, _of("SupertuningConfig")),
    "supertuning-low-rank": (llama, _of("SupertuningConfig", r=2)),
    "prompt-classes": (
        lambda: llama(head="classes"),
        _of("PromptTuningConfig", num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    "trained-tokens": (
        llama,
        _of("TrainableTokensConfig", token_indices=[2, 4], target_modules=["embed_tokens"]),
    ),
    "prompt": (llama, _of("PromptTuningConfig", num_virtual_tokens=3)),
    "prefix": (llama, _of("PrefixTuningConfig", num_virtual_tokens=3)),
    "prefix-projection": (
        llama,
        _of(
            "PrefixTuningConfig",
            num_virtual_tokens=3,
            prefix_projection=True,
            encoder_hidden_size=8,
        ),
    ),
    "p-tuning": (llama, _of("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8)),
}


def model(kind: str, **adapters: Any) -> Any:
    """The PEFT model of a kind, every parameter of the adapter random; further adapters by name."""
    import peft

    base, config = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base(), config())
        for name, other in adapters.items():
            made.add_adapter(name, other)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return made


def saved(made: Any, folder: Path) -> Path:
    """What ``save_pretrained`` of the live model writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return folder
