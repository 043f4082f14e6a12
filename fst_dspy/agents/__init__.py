"""Programs that act: environments by TRL's contract as DSPy modules, their turns, their reward."""
