"""What comes from elsewhere: GGUF files, quantized models, SmolLM2's package, chat templates."""
