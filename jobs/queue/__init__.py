"""The queue in Redis: its keys, its atomic moves and its reads."""
