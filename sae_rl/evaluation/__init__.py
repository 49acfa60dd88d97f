"""Evaluation of a policy on held-out prompts: sampling, statistics, and the files that it writes."""
