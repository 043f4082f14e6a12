"""What a run leaves on disk and in trackers, and reads back."""
