"""The heavy libraries, one per file: vLLM, DeepSpeed and transformers. Never Ray."""
