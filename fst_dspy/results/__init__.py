"""What a compile did and found, and how it is shown."""
