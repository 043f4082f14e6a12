"""The user's side: a program's texts as a candidate, its metric, the adapter it runs with."""
