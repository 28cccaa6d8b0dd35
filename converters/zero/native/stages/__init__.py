"""The stages that a pipeline is written for.

stage_layers       their layers, as a user or an engine says them;  example_stages  of so many
partition_methods  how DeepSpeed parts layers
layer_files        the files of layers, of each tensor-parallel rank
"""
