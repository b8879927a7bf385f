"""Settings, addresses, durations and the operator's files. The only reader of environment variables and files.

It imports nothing else of this project.
"""
