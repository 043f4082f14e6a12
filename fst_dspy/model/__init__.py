"""The local model: weights and their versions, and tokens sampled from them."""
