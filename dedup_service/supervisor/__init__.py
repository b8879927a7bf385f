"""Worker processes on one port: start, restart, replace, signal and stop.

Must not import grpc or a driver: the supervisor must stay small and reliable.
"""
