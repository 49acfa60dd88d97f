"""The study of docs/study.md: its matrix, and the program that runs it. ``python -m benchmarks.study --help``."""
