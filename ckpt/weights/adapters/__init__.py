"""Adapters of PEFT in a checkpoint.

adapter_folder     the adapters in a checkpoint, and the folder that PEFT loads
written_adapter, saved_tensors     one of them as it is written, and which tensors it is
adapter_config     its configuration, found or asked for
stored_adapter, stored_vocabulary  what PEFT itself saved beside the states
base_model, named_base, base_names, vocabulary  the base model it is of
base_agreement, config_doubts  whether base and configuration are those of the training
idle_options       options without effect
"""
