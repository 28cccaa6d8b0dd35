"""Converts a tiny model of each architecture, and loads it with the transformers that runs this.

    python scripts/tables/try_architectures.py                 the architectures of ARCHITECTURES
    python scripts/tables/try_architectures.py --all           every class that can be built small
    python scripts/tables/try_architectures.py BertModel ...   these

For each class: a model of random weights, a ZeRO-2 checkpoint of it made by torch.save, ``ckpt
to-fp32``, ``from_pretrained``. Prints what the conversion said of the names, and what loading
found: names missing, unexpected or of another shape, and tensors with other values.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(Path(__file__).parent)]

from architecture_builds import RESCUES, classes, configured, fields_of, time_limit  # noqa: E402
from made_checkpoints import of_model  # noqa: E402

from ckpt.weights.conversion import convert  # noqa: E402
from converters.errors import CheckpointError  # noqa: E402

LARGEST = 30_000_000  # parameters of a model that is tried
SMALL = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 160),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}
WITHOUT = ({}, {"head_dim"}, {"num_key_value_heads"}, {"hidden_size"}, {"head_dim", "hidden_size"})
# What people train, and what was tried by hand before: one class of each.
ARCHITECTURES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM"),
    *("Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM"),
    *("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "PhiForCausalLM", "Phi3ForCausalLM"),
    *("PhimoeForCausalLM", "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTNeoXForCausalLM"),
    *("GPTJForCausalLM", "GPTBigCodeForCausalLM", "OPTForCausalLM", "BloomForCausalLM"),
    *("FalconForCausalLM", "MptForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM"),
    *("CohereForCausalLM", "Cohere2ForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM"),
    *("OlmoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "JambaForCausalLM"),
    *("MambaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Ernie4_5ForCausalLM"),
    *("Ernie4_5_MoeForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM"),
    *("GptOssForCausalLM", "MiniMaxForCausalLM", "SmolLM3ForCausalLM", "Llama4ForCausalLM"),
    *("LlavaForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"),
    *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    *("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
    *("PaliGemmaForConditionalGeneration", "MllamaForConditionalGeneration"),
    *("InternVLForConditionalGeneration", "Mistral3ForConditionalGeneration"),
    *("AriaForConditionalGeneration", "Idefics3ForConditionalGeneration"),
    *("VoxtralForConditionalGeneration", "Qwen2AudioForConditionalGeneration"),
    *("BertModel", "BertForSequenceClassification", "RobertaForMaskedLM", "DistilBertForMaskedLM"),
    *("DebertaV2ForSequenceClassification", "ElectraForPreTraining", "ModernBertForMaskedLM"),
    *("XLMRobertaForTokenClassification", "LlamaForSequenceClassification"),
    *("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "BartForConditionalGeneration"),
    *("MBartForConditionalGeneration", "MarianMTModel", "PegasusForConditionalGeneration"),
    *("LEDForConditionalGeneration", "WhisperForConditionalGeneration", "CLIPModel"),
    *("ViTForImageClassification", "SegformerForImageClassification", "SiglipModel"),
    *("Wav2Vec2ForCTC", "Swinv2ForImageClassification"),
)


def tiny(cls: Any) -> Any:
    """A small model of a class with random weights; raises what its last attempt raised."""
    config = tiny_configuration(cls)
    with time_limit():
        return cls(config)


def tiny_configuration(cls: Any) -> Any:
    """The configuration of a small model; raises what its last attempt raised."""
    fields = [(path, value) for path, value, _ in fields_of(cls.config_class)]
    problem: Exception = RuntimeError("no fields")
    for rescue in RESCUES:
        for without in WITHOUT:
            small = {
                path: SMALL[name]
                for path, value in fields
                if (name := path.rpartition(".")[2]) in SMALL
                and type(value) is int
                and name not in without
            }
            try:
                config = configured(cls.config_class, {**small, **rescue})
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls(config).parameters())
                if size > LARGEST:
                    raise RuntimeError(f"{size:,} parameters even when small")
                return config
            except Exception as error:
                problem = error
    raise problem


def tried(name: str, cls: Any, work: Path) -> tuple[str, str]:
    """What became of a class: a word, and a line."""
    torch.manual_seed(0)
    try:
        model = tiny(cls)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.normal_(0, 0.02)
    state = {n: v.detach().clone() for n, v in model.state_dict().items() if hasattr(v, "shape")}
    source = of_model(work / "checkpoint", model)
    try:
        conversion = convert.prepare(source, work / "model")
        facts = convert.run(conversion)
    except CheckpointError as error:
        return "refused", str(error)

    try:
        loaded, info = cls.from_pretrained(
            work / "model", output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:
        return "does not load", f"{facts['verdict']} | {type(error).__name__}: {str(error)[:200]}"
    values = loaded.state_dict()
    unlike = [n for n, v in state.items() if not torch.equal(values[n].float(), v.float())]
    counts = {key: len(value) for key, value in info.items() if value}
    good = not counts and not unlike
    claimed = facts["loads"]
    word = "right" if good and claimed else "not checked" if good and claimed is None else "WRONG"
    line = f"{facts['verdict']} | {counts or 'no missing, no unexpected'}; unlike {unlike[:2]}"
    return word, line + "".join(f" | {note}" for note in facts["notes"])


def main() -> int:
    """Tries the classes and prints a line each; 1 if any is wrong."""
    known, wishes = classes(), [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    names = wishes or (list(known) if "--all" in sys.argv else list(ARCHITECTURES))
    words: Counter[str] = Counter()
    for name in names:
        work = Path(tempfile.mkdtemp(prefix="ckpt-try-"))
        try:
            word, line = tried(name, known[name], work) if name in known else ("not there", "")
        finally:
            shutil.rmtree(work)
        words[word] += 1
        print(f"{word}\t{name}\t{line}", flush=True)
    print(json.dumps({"transformers": transformers.__version__, **words}))
    return 1 if set(words) & {"WRONG", "refused", "does not load"} else 0


if __name__ == "__main__":
    sys.exit(main())
