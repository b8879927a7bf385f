"""Worker processes on one port: start, restart, replace, signal and stop.

Must not import grpc, a driver or pydantic: the supervisor must stay small and reliable.
"""
