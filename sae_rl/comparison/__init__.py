"""Comparison of runs: reading them, grouping them into arms, and statistics over seeds and prompts."""
