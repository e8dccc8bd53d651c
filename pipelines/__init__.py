"""Image requests in, images out: families of models and where their weights live."""
