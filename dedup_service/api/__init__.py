"""The contract on the wire: messages to and from the domain, the endpoint around each call, and the error table.

Must not import stores.
"""
