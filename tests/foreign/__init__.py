"""Suites that no one here wrote, run against us: torch's module and operator databases, and onnx's backend cases."""
