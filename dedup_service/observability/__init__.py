"""Logs, metrics and traces, put around calls and stores by `observers`.

Imports neither stores nor api.
"""
