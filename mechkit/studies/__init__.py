"""Studies over models, tasks and techniques: on one machine or on Ray, resumed after anything, read back as one table.

- `study.py`: what a user has. `_spec.py`, `_registry.py`, `_problems.py`: a statement, what it may name, what is wrong with it.
- `_job.py`, `_shards.py`: a job, and how it is cut into shards. `_planner.py`: which of them are left. `_keys.py`: what decides
  the numbers.
- `_run.py`: the loop. `_executors.py`: where units of work (`_work.py`) are computed. `_worker.py`: computes one, with its model
  and prompts (`_materials.py`).
- `_store.py`, `_files.py`, `_records.py`: what is kept, and its checksums. `_status.py`, `_table.py`: what is read back.
"""

# ruff: noqa: E402 - what the imports need is looked for first, so that what is missing is named in one sentence

from mechkit._extras import need_studies

need_studies("mechkit.Study")

from mechkit.studies._executors import InProcess as InProcess
from mechkit.studies._executors import Processes as Processes
from mechkit.studies._executors import Ray as Ray
from mechkit.studies._files import StoreError as StoreError
from mechkit.studies._run import RunReport as RunReport
from mechkit.studies._status import JobStatus as JobStatus
from mechkit.studies._status import Status as Status
from mechkit.studies._table import Table as Table
from mechkit.studies.study import Study as Study
