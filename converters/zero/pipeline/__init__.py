"""Pipelines: layers dealt out to stages.

reader          the row of ``converters.detect``
lane_files      the files of each tensor-parallel rank
stages          each a ZeRO checkpoint of its own, with the layer files beside them
tied_modules    which stage's copy of a module is the model's
slice_mappings  BF16_Optimizer without ``param_shapes``
unpartitioned   a pipeline in fp32 without ZeRO;  layer_order  whose state is whose, by shape
"""
