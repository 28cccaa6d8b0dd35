"""DeepSpeed-MoE: experts that lie in files of their own, and in groups of the optimizer's.

groups        the optimizer's groups, those of each expert-parallel rank apart
expert_files  the 16-bit experts of all layers
reader        all of it as a ``Source``, under the names that experts have in the whole model
"""
