"""A small real language model: SmolLM2-135M-Instruct, under an adapter trained here.

``python -m fst_dspy.smollm2.train`` makes the adapter; see ``docs/smollm2.md`` for its figures.
"""
