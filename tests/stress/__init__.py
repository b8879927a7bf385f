"""Long checks under faults, load and random input: each a command of its own, and a short form in the test suite."""
