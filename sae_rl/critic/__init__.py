"""The critic before training: its pre-training, and the card that says what its values mean."""
