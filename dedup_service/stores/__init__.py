"""The stores behind `ClaimStore`, one folder each; `registry` chooses by URL. They know neither gRPC nor protobuf."""
