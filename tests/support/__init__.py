"""What the tests start and drive: real servers on free ports, ended by who started them."""
