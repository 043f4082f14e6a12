"""Speed: every figure a ratio of two things timed in turn, in one process, on the same inputs.

    python -m benchmarks.speed --out benchmarks/results/speed.json

``Row`` says what a figure is and what it should be; ``measure`` takes the times; the other modules
are the parts (a) to (f).
"""
