"""Logs, metrics and traces. `observers` puts them around calls and stores; nothing else knows of them.

Imports neither stores nor api.
"""
