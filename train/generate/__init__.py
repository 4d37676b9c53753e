"""Judge a trained model by its answers: ``python -m train.generate``.

A checkpoint and a set of shards come in. Questions go out with the wanted and the generated answer side by side, and
the share of exact matches. The questions come from the shards themselves, so the model gets the tokens, positions and
pixels that training uses. Nothing is trained here, and nothing in the trainer imports this room.
"""
