"""Fuzzing: the promises about every parser that reads untrusted bytes, and a search for inputs that break them."""
