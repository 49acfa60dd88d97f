"""Procedural tasks: problems that a program writes, with their verifiers."""
