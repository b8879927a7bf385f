"""The history check: what clients saw of servers under faults, held against the promises of a claim."""
