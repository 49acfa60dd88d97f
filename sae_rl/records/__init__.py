"""The records of a run: metrics, rollouts, samples of evaluations, and the lines on the console."""
