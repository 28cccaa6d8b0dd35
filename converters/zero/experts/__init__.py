"""Experts on several ranks: DeepSpeed-MoE, and AutoEP, which stacks them.

reader         the rows of ``converters.detect``
flat_groups    stages 1 and 2;  sub_groups  AutoEP under stage 3
unpartitioned  the optimizers of a training without ZeRO;  whole_optimizers  its weights
native_stages  DeepSpeed-MoE in a pipeline;  joined_stages  stages as one model
native_lanes   DeepSpeed-MoE on tensor-parallel ranks, cut or whole
folded         AutoEP and AutoTP at once;  folded_lanes  what their files say of experts
lanes          the files by model-parallel rank;  lane_sources  each as a checkpoint
whole_model    the model file as if all experts were in it
expert_groups  the param groups of all ranks, matched by name
expert_files   the 16-bit weights of experts
auto_ep        which experts a rank has, and the stacks of all
"""
