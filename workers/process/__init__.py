"""Worker processes: their devices, their wiring and their supervisor."""
