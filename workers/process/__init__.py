"""Worker processes: where each one runs, how it is wired, who restarts it."""
