"""The numbers of tensors, looked at while they pass: nothing is kept but sums.

blocks             tensors, read side by side in threads, in blocks
tensor_statistics  smallest, largest, mean, norm, NaN: of one tensor, or of several
tensor_distance    how far two tensors are from each other
numbers            which element types have numbers, and these as float64
"""
