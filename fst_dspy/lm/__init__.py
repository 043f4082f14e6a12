"""DSPy's view of the model: requests, the engine, the LM, and the providers that train it."""
