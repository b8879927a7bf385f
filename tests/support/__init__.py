"""Processes, peers and helpers for the tests. Real servers listen on free ports; their creator ends them."""
