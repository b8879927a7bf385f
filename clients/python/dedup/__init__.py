"""Callers of the dedup service: `dedup.v1` holds the generated messages and stubs of the contract."""
