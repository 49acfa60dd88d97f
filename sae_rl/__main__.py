"""``python -m sae_rl`` is ``sae-rl``."""

from sae_rl.cli import main

if __name__ == "__main__":
    main()
