"""The files beside weights.

surroundings      all of them, for a conversion
absent_tokenizer  that a model of text has no tokenizer
model_folder      those that ``from_pretrained`` wants
run_folder        the tokenizer in the folder of a run
model_code        Python files of a model
module_folders    modules of sentence-transformers
replaced_folder   what an output may take the place of
reader_files      names of tokenizer files, as transformers has them
json_files        reads JSON of any of them
"""
