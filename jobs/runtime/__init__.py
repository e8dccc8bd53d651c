"""What every process needs: settings, logs, traces, a lifeline to its parent, the embedded server."""
