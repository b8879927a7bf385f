"""The stores behind `ClaimStore`, one folder each. `registry` chooses one by the scheme of the store URL.

They import neither gRPC nor protobuf, and only a store's own folder imports its driver.
"""
