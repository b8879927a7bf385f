"""Plays the HTTP profile of docs/client-contract.md against a running service. Must not import other packages of ours.

It knows the contract and not the clients, so that it judges our clients and others alike.
"""
