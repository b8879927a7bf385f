"""The tests, importable as a package: `python -m tests.stress.chaos.run` works from the root of the repository."""
