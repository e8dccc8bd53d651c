"""The page at `/` in a real Chromium, against a real service and a worker with a fake model."""
