"""The queue in Redis: every key, every atomic move, and the reads."""
