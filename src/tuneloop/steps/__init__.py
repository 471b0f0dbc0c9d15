"""Steps: one process each. `python -m tuneloop.steps DIR` runs what DIR/step.json says."""
