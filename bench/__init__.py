"""Benchmarks of the engine, the queue and the service, compared with the alternatives."""
