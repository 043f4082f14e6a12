"""What an answer may be: the types of its fields as grammars, and grammars over tokens."""
