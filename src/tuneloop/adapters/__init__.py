"""The world behind the ports. Only `tuneloop.daemon` imports these."""
