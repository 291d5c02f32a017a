"""Drawing for many at a time: the scheduler that requests share passes in, and what a server is made of."""
