"""Several worker processes on one port: start, restart, replace, signal and stop them.

Must not import grpc, a driver or pydantic: the supervisor has to stay small and must not fail.
"""
