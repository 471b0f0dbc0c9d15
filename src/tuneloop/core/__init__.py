"""What everything stands on: nouns, states, errors, names, chat, ports, settings.

Imports nothing above it.
"""
