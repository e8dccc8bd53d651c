"""The page at `/`, driven in a real Chromium against a real service and a worker with a fake model."""
