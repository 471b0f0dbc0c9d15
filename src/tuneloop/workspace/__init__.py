"""The rules of the workspace, one file per noun. Knows ports, never adapters; starts nothing itself:
`reconcile` is the only loop that starts and stops things."""
