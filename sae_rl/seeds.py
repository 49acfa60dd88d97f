"""Every random choice of a run has a seed of its own, derived from the run's seed and a name for the choice."""

import hashlib


def derive_seed(run_seed: int, *name: object) -> int:
    """A seed of 31 bits, which vLLM accepts. Seeds of different names are unrelated, also for neighbouring steps and runs."""
    text = "/".join(str(part) for part in (run_seed, *name))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
