"""The dedup service: a gRPC server that admits each transaction at most once."""

__version__ = "0.1.0"
