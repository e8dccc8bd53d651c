"""One module per command or group of commands: flags, requests to the server, output."""
