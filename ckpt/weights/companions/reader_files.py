"""Files that the tokenizers of transformers 4.57.6, 5.24.0 name.

Made by scripts/tables/reader_files.py; tests/oracle/test_model_folder.py compares it
with the installed transformers."""

VERSIONS = ("4.57.6", "5.24.0")
VOCABULARY_FILES = (
    "artists.json",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "genres.json",
    "lyrics.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.bin",
    "vocab.json",
    "vocab.pkl",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
)
