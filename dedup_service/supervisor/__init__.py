"""Several processes on one port: starts them, starts the dead ones again, hands signals on, and ends last.

It knows nothing of claims, and imports neither gRPC nor a driver: what supervises must be small and must not fail.
"""
