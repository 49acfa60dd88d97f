"""The commands of ``sae-rl``. They are the only place that puts the other parts together."""
