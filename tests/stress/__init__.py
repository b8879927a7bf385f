"""Long checks under faults, load and random input. Each is a command, with a short form in the test suite."""
