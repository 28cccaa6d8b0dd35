"""Rules for frameworks that cut every model alike,
by the name that ``--tp-rules`` takes.

    megatron-gpt   Megatron's GPT with its MLP in one piece (GELU), also as a pipeline
    gpt-neox       GPT-NeoX, whose layers have ``attention`` for ``self_attention``
    llama          Megatron's Llama, whose gates and inputs are one tensor, each cut (SwiGLU);
                   and AutoTP of a Llama, Mistral or Qwen of transformers

A bias of a row-parallel layer is on every rank, as are norms. Megatron cuts the
vocabulary, AutoTP leaves the embedding whole. How AutoTP cut the head depends on its
version, so no rule says it. Sources: Megatron-LM ``core/tensor_parallel/layers.py``,
GPT-NeoX ``megatron/mpu/layers.py``, DeepSpeed 0.16 ``module_inject/auto_tp.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NORMS = {r".*(layernorm|norm|position_embeddings)\..*": "replicated"}
_HALVES = {"dim": 0, "parts": 2}
_PIPELINE_NORM = {r"\d+\.(weight|bias)": "replicated"}
_REPLICATED_BIAS = {r".*(attention\.dense|dense_4h_to_h)\.bias": "replicated"}
_ROWS = {r".*(attention\.dense|dense_4h_to_h)\.weight": "dim 1"}
_COLUMNS = {
    r".*query_key_value\..*": "dim 0",
    r".*dense_h_to_4h\..*": "dim 0",
    r".*(word_embeddings|output_layer|lm_head|final_linear)\.weight": "dim 0",
}
_BUFFERS = {r".*rotary_emb\..*": "replicated"}

RULES: Mapping[str, Mapping[str, Any]] = {
    "megatron-gpt": {
        **_BUFFERS,
        **_NORMS,
        **_PIPELINE_NORM,
        **_REPLICATED_BIAS,
        **_ROWS,
        **_COLUMNS,
    },
    "gpt-neox": {**_BUFFERS, **_NORMS, **_REPLICATED_BIAS, **_ROWS, **_COLUMNS},
    "llama": {
        **_BUFFERS,
        **_NORMS,
        **_PIPELINE_NORM,
        **_REPLICATED_BIAS,
        **_ROWS,
        r".*dense_h_to_4h\..*": _HALVES,
        r".*(query_key_value)\..*": "dim 0",
        r".*(word_embeddings|output_layer)\.weight": "dim 0",
        r".*(o_proj|down_proj)\.weight": "dim 1",
        r".*(o_proj|down_proj)\.bias": "replicated",
        r".*(q|k|v|gate|up)_proj\.(weight|bias)": "dim 0",
        r".*embed_tokens\.weight": "replicated",
    },
}
