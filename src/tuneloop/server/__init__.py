"""The HTTP server: one JSON error shape, the token and caller checks, and the API."""
