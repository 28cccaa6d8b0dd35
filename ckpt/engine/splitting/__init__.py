"""Tensors of which each rank of a running training has a part:
no rank has the whole model.

split_tensors  what this rank has of each tensor: tensor parallelism, experts, pipelines
part           a part as other ranks are told of it: boxes of a tensor, and who has the same
whole          the tensors of all ranks' parts, and which ranks give which box of them
placing        where elements go that are counted box by box, and the CRC32s of such bytes
"""
