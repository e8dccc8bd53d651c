"""From a validated body to a queued job."""
