"""The names of tensors in an output.

naming                 wrappers taken off, and what the user asks for
doubles                tensors that a hook joined
ties                   which tied names are written;  stored_ties  those of files of weights
packed                 codes of a quantization
sentence_transformers  the weights of each module
"""
