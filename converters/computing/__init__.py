"""Tensors that are computed while they are written: merged adapters, dequantized codes.

computed     a tensor and the formula that makes it
inputs       what formulas read
arrangement  tensors cut, joined and transposed;  gathering  their elements
blas         matrix products that give the same bits every time
"""
