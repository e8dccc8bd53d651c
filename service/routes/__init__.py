"""The routes, one module per resource. They handle HTTP and call the store, never Redis."""
