"""What the client commands end with; every other error is 1, and bad usage 2."""

ERROR = 1
DUPLICATE = 3
PAYLOAD_MISMATCH = 4
NOT_FOUND = 5
NOT_HELD = 6
# What the worst finding of the doctor makes of it.
FOUND_WARNING = 7
FOUND_CRITICAL = 8
# What a shell makes of SIGINT.
INTERRUPTED = 130
