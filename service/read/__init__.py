"""What a job looks like from outside: views, ETA, events, downloads, long polls."""
