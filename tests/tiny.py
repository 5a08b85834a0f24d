"""The shipped recipe made small, for tests that train."""

TINY_MODEL = [
    "model.embed_size=16",
    "model.image_encoder.channels=[8, 8]",
    "model.text_encoder.word_dim=8",
    "model.set_prediction.head_dim=4",
    "train.batch_size=20",
    "train.epochs=3",
]
"""Overrides that make the shipped recipe train in a second or two, through the same code."""
