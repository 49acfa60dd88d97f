"""The configuration of a run: its typed tree, the checks between fields, and how Hydra composes it from ``conf/``."""
