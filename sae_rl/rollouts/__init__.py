"""From prompts to the groups that a step trains on."""
