"""Worker processes, which claim, encode, denoise and deliver images, and their supervisor."""
