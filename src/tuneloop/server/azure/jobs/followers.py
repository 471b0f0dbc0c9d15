"""Who waits for the end of a job.

`stream` of the SDK prints no log at all when the first thing that it is told is that the job has ended. So a
stream is told once that the job is being finalised, and the truth when it asks again. A stream gets the job
before it asks for details: that is how a new one is known.
"""

from __future__ import annotations

from tuneloop.server.azure.gateway import Gateway

_FOLLOWED = "followed"
FOLLOWED_SECONDS = 180.0
"""`stream` asks at least every 60 seconds; who was told longer ago is somebody else."""


def begins(gateway: Gateway, job: str) -> None:
    """Somebody got the job: what they ask next, they ask for the first time."""
    if gateway.recall(_FOLLOWED, job) is not None:
        gateway.forget(_FOLLOWED, job)


def is_news(gateway: Gateway, job: str, has_ended: bool) -> bool:
    """Whether an answer would tell of a job's end to somebody who was not told before that it runs."""
    now = gateway.now().timestamp()
    told_at = float((gateway.recall(_FOLLOWED, job) or {}).get("at", 0.0))
    is_followed = abs(now - told_at) < FOLLOWED_SECONDS
    if has_ended and is_followed:
        # An end that was told is told: who asks after it is somebody new.
        gateway.forget(_FOLLOWED, job)
    elif not is_followed or abs(now - told_at) > FOLLOWED_SECONDS / 10:
        gateway.remember(_FOLLOWED, job, {"at": now})
    return has_ended and not is_followed
