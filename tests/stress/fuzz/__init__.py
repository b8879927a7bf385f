"""Fuzzing: what any bytes must come to where the service reads bytes, and a guided search for those that do not."""
