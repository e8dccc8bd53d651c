"""Processes on this machine: `up`, its children and its lock, and how a command finds a server."""
