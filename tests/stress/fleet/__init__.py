"""The mixed-fleet check: services in several languages behind one route, whose work must be done once."""
