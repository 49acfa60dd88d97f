"""One heavy library per file: vLLM, DeepSpeed, transformers, peft. Nothing here imports Ray."""
