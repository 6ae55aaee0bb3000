"""Containment: a backend's code runs in a worker process, and whatever it does there is its own result.

What a worker cannot survive it is replaced after. What the run itself cannot survive is a backend that kills the parent
by its number, fills the disk, or takes more device memory than there is while somebody else needs it: a worker has the
rights of the user who started the run.
"""

from conformance.contain.jobs import Cancelled, DeviceLost, Job, Limits, SubjectRef, SuiteError, WorkerEnded
from conformance.contain.worker import Worker

__all__ = ["Cancelled", "DeviceLost", "Job", "Limits", "SubjectRef", "SuiteError", "Worker", "WorkerEnded"]
