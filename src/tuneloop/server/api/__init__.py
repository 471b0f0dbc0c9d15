"""Routes under /api, one module per noun.

Thin: they read a request, call the workspace, and shape the answer.
"""
