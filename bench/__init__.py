"""Measurements: what the engine and the queue are worth, beside what one would use instead."""
