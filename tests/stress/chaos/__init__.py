"""The history check: records what clients see of servers under faults, and checks it against the promises."""
