"""A base model with adapters merged in, and what a reader needs beside it.

merged_model     the output
choice           which adapters, of which weights
ground           the base that they are merged into;  trained_class  the class it was trained as
base_companions, merged_config  the files beside it
conv1d, replication  layers that PEFT treats in their own way
"""
