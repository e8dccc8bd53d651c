"""The routes, one module a resource; each knows HTTP and calls the store, none knows Redis."""
