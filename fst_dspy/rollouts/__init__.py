"""The program run many times at once, scored."""
