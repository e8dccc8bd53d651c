"""Webhooks: signed notifications about jobs over HTTP, retried until they're received."""
