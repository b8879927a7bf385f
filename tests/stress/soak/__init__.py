"""The soak: a mixed load for minutes on the real service and a real Redis, while its memory has to stay flat."""
