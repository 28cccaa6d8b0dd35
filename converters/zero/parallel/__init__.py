"""States that were split up by more than ZeRO: by layers (pipeline), or by experts.

reader               the rows of ``converters.detect``
folder_files         the files of a tag, by every number in their names
one_save             whether they are of one save
joined_source        from parameters to a ``Source``

pipeline             layers on stages, each a ZeRO checkpoint of its own
tied_modules         which stage's copy of a module is the model's
pipeline_without_zero, layer_order  a pipeline in fp32, whose optimizer state has numbers
slice_mappings       BF16_Optimizer without ``param_shapes``

experts              DeepSpeed-MoE and AutoEP under stages 1 and 2, or BF16_Optimizer
expert_groups        the param groups of all ranks, matched by name
expert_files         the 16-bit weights of experts
auto_ep              stacked experts;  auto_ep_partitions  the same under stage 3
"""
