"""What every process needs: settings, logs, traces, a lifeline, the embedded queue server."""
