"""Experts of DeepSpeed-MoE and AutoEP, which each rank has some of.

groups        the optimizer's groups under ZeRO-1 and 2, those of each expert-parallel rank apart
teams         the sub-groups of ZeRO-3, partitioned over the ranks that share them
fused         AutoEP's tensors, whose first axis counts experts
expert_files  the 16-bit experts of all layers
native        the reader of files that do not tell by their names whether experts are in them
reader        all of it as a ``Source``, under the names of the whole model
"""
