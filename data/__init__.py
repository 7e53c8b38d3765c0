"""Data sets: text to tokens (`prepare.py` in each folder), and the tokens' files opened for training."""
