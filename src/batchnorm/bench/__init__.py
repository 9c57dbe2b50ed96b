"""Benchmarks: implementations of batch normalization next to each other, relative to a copy of the same bytes, the byte limit."""
