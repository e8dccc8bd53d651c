"""Prometheus metrics: requests as they pass, and the pool at each scrape."""
