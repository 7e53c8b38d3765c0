"""Data sets: text to tokens (`prepare.py` in each folder), and token files opened for training."""
