"""What each word after ``sae-rl`` does: the one place that puts the other parts together."""
