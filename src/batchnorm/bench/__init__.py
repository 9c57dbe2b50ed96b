"""Side-by-side measurement against the byte limit: how far batch normalization is from a copy of the bytes that it must move."""
