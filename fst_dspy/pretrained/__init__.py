"""Models that come from elsewhere in other forms: GGUF files, SmolLM2 from a package, their chats."""
