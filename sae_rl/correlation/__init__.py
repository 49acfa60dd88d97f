"""How well estimators agree with Monte-Carlo advantages, and what that means for the gradient."""
