"""Does an output load? The verdict on it before the first byte is written.

checking        a model's names and shapes, against those of its reader
second_opinion  the installed transformers, where the table has doubts
verdicts        the same in words;  refusals  why it would not load
adapter_reader  an adapter's, against those that PEFT will look for
heads           a head, or embeddings, that the weights lack
stored          files of weights that are published as they are
"""
