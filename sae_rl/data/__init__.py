"""Where prompts come from: procedural tasks, files, and the sampler that hands them out."""
