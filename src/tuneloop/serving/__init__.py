"""The data plane: the router (one process, no torch) and the replicas behind it (one process each)."""
