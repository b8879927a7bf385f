"""The soak: minutes of mixed load on the service and a real Redis, during which memory must stay flat."""
