"""Pipeline jobs: submitted, looked at, cancelled.

inputs       inputs of a job and of its node, bindings resolved
outputs      what a job declares, and which of the component's each is
definition   what may not change of a job; a recipe's text
submission   a job of one node, the chat-completion component, turned into our recipe
facts        what only the dialect knows of a job, and how it is found
followers    who waits for the end of a job
links        addresses of logs that carry a secret
view         how a job looks to the SDK
operations   the routes
"""

from tuneloop.server.azure.jobs.operations import routes

__all__ = ["routes"]
