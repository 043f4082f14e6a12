"""The first part of the page: what was gained, by which prompts, and why they were chosen."""
