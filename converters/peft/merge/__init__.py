"""A model with its adapters merged in, computed tensor by tensor as PEFT computes it.

model          every tensor of the merged model, located or computed
origins        where its values are before any adapter;  base_ties  names tied to what is left out
sites          the layer that an adapter changes
changes        what an adapter does to a layer: lora_changes, other_changes
cells          a weight, piece by piece
lora, lycoris, vectors  the formulas
"""
