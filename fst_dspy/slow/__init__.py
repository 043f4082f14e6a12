"""The slow channel: advantages, and one GRPO step on given rows."""
