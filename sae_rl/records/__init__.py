"""What a run writes down: metrics, rollouts, evaluation samples, and the lines on the terminal."""
