"""What every process needs: settings, logs, traces, the lifeline, the embedded queue server."""
