"""The joint loop: its state, its parts, its steps, stop and resume."""
