"""Distillation of a context into the weights, an arm of its own."""
