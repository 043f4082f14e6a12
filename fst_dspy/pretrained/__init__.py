"""Models that come from elsewhere in other forms: GGUF files, and SmolLM2 from a Python package."""
