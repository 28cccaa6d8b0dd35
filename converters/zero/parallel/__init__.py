"""DeepSpeed's tensor parallelism: state files of several model-parallel ranks,
as one model.

lanes            the files of each model-parallel rank, read as a checkpoint of its own
lane_states      the optimizer's state of each, by name
cuts             how the shards of a parameter lie in it
affine_map       cuts out of DeepSpeed's affine map
patterns         cuts out of its lists of patterns
rules            cuts out of a file of the user's;  shipped_rules  those of some frameworks
degrees          the same cuts for another number of ranks;  auto_tp  as AutoTP cuts heads
engine_cuts      the cuts of the engine that will load what is written
cut_table        which of these says how a parameter is cut
merged_weights   the shards of all ranks as the weights of the model
vocabulary       rows that pad a vocabulary
merged_source    lanes as one ``Source``, with the optimizer's state by name
reader           the row of ``converters.detect``
"""
