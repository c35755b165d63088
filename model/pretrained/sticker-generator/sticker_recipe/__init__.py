"""The parts of the sticker generators' training script, ``train.py`` in the folder above."""
