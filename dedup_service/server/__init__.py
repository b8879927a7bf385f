"""The server process: life cycle, listeners, TLS, health, reload and the engines. Must not import drivers."""
