"""Experts on several ranks: DeepSpeed-MoE, and AutoEP, which stacks them.

reader         the rows of ``converters.detect``
flat_groups    stages 1 and 2;  sub_groups  AutoEP under stage 3;  unpartitioned  without ZeRO
folded         AutoEP and AutoTP at once;  folded_lanes  their files
whole_model    the model file as if all experts were in it
expert_groups  the param groups of all ranks, matched by name
expert_files   the 16-bit weights of experts
auto_ep        which experts a rank has, and the stacks of all
"""
