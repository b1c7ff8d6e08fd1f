"""GGUF files as checkpoints: metadata to configuration, tensors expanded to bf16 one by one."""
