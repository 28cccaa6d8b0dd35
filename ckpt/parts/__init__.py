"""Tensors of which each rank of a running training has a part: no rank has the whole model.

part     what a rank has of a tensor: boxes of it, and who has the same
whole    the tensors of all ranks' parts, and which ranks give which box of them
placing  where elements go that are counted box by box, and the CRC32s of such bytes
"""
