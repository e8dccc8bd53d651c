"""Jobs and where they live: requests, states, the catalog, the queue and image storage."""
