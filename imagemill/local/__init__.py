"""Local processes: `up`, its children and its lock, and how commands find a server."""
