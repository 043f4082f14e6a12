"""The fast channel: a population of candidates, proposers, GEPA's iterations, trials."""
