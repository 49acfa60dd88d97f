"""How good a policy is: samples of held-out prompts, what they say about it, and what is left of them on disk."""
