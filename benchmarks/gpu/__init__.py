"""Figures of one GPU: see `__main__`."""
