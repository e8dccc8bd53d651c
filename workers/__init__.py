"""The worker process: claim, encode, denoise, deliver; and the supervisor that keeps it alive."""
