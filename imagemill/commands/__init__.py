"""The commands: what each one reads, asks the server for, and prints."""
