"""What is gepa's own: plug-ins of its kinds, its strategies, events and its view of a program."""
