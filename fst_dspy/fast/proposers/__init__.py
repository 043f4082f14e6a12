"""Proposers of new texts: the protocol, lessons, reflection by a language model, demos."""
