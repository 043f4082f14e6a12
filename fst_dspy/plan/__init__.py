"""What a compile will take of memory and time, and the settings that follow from it."""
