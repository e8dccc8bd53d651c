"""HTTP concerns shared by all routes: bodies, credentials, preconditions, errors, OpenAPI."""
