"""The keys that DeepSpeed itself gives a model file, beside whatever a user adds to it.

Source: DeepSpeed 0.19.8 ``runtime/engine.py``: ``_common_checkpoint_state``,
``_save_checkpoint``, ``_checkpoint_parallel_metadata``.
"""

MODEL_KEYS = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
        *("shared_params", "frozen_param_fragments", "lr_scheduler"),
        *("data_sampler", "random_ltd"),
        *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions"),
        *("ds_config", "ds_version"),
        *("num_experts", "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info"),
    }
)
# Those of older versions, and of files that hold the optimizer's state as well.
OTHER_MODEL_KEYS = frozenset(
    {
        *("csr_tensor_module_names", "optimizer_state_dict", "loss_scaler"),
        *("global_steps_at_last_save", "batch_size", "ds_checkpoint_info"),
    }
)
