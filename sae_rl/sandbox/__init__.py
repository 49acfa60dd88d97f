"""Runs programs that nobody has reviewed, in namespaces of their own and under limits."""
