"""Settings, addresses, durations and the operator's files; imports nothing else of this project.

The only reader of environment variables and files.
"""
