"""The results that commands print,
as frozen dataclasses: their fields are the keys of ``--json``.

checkpoints  show: one checkpoint, its adapters, its quantized weights
conversion   to-fp32, and what was proven of weights
shares       a command that wrote a share
runs         ls, verify, latest, pin, prune
upkeep       doctor, slim, collect
inspection   stats, diff
hub          push, pull

``ckpt.results`` turns them into JSON, docs/json.md explains each key. reshard,
to-universal and from-universal print ``ckpt.rewrite.result``.
"""
