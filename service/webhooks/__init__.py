"""Webhooks: callers are told over HTTP what became of their jobs, signed, and again until heard."""
