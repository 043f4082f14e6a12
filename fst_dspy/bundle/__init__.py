"""A trained program as a folder that can be trusted."""
