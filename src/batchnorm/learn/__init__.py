"""Batch normalization to learn: exercises that check themselves."""
