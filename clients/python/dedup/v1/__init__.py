"""The contract of the dedup service, version 1: messages and stubs, generated from protos/dedup/v1/dedup.proto."""
