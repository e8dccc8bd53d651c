"""What a job is and where it lives: requests, states, the catalog, the queue and the images."""
