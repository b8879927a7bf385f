"""The contract on the wire: messages to and from the domain, and the one table of errors. It knows no store."""
