"""SAE in other trainers, one module for each: see docs/other_trainers.md."""
