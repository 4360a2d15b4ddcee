"""Studies over models, tasks and techniques: on one machine or on Ray, resumed after anything, read back as one table."""

# ruff: noqa: E402 - what the imports need is looked for first, so that what is missing is named in one sentence

from mechkit._extras import need_studies

need_studies("mechkit.Study")

from mechkit.sweeps._executors import InProcess as InProcess
from mechkit.sweeps._executors import Processes as Processes
from mechkit.sweeps._executors import Ray as Ray
from mechkit.sweeps._files import StoreError as StoreError
from mechkit.sweeps._run import RunReport as RunReport
from mechkit.sweeps._status import JobStatus as JobStatus
from mechkit.sweeps._status import Status as Status
from mechkit.sweeps._table import Table as Table
from mechkit.sweeps.study import Study as Study
