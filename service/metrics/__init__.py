"""Prometheus metrics: of requests as they're handled, and of the pool at each scrape."""
