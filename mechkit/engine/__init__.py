"""Exact replay: many what-if questions of one run, answered by computing only what an edit can reach. See README.md here."""

from mechkit.engine._causality import agree_before_difference as agree_before_difference
from mechkit.engine._causality import masks_of as masks_of
from mechkit.engine._causality import sees as sees
from mechkit.engine._checks import check_can_run as check_can_run
from mechkit.engine._checks import check_tokens as check_tokens
from mechkit.engine._chunk import Derived as Derived
from mechkit.engine._chunk import Recordings as Recordings
from mechkit.engine._edits import Cell as Cell
from mechkit.engine._edits import Edit as Edit
from mechkit.engine._gradients import GradientRuns as GradientRuns
from mechkit.engine._gradients import attached_hooks as attached_hooks
from mechkit.engine._gradients import frozen_parameters as frozen_parameters
from mechkit.engine._gradients import metric_values as metric_values
from mechkit.engine._measure import call_metric as call_metric
from mechkit.engine._measure import check_metric as check_metric
from mechkit.engine._measure import check_parts as check_parts
from mechkit.engine._measure import logits_at_hand as logits_at_hand
from mechkit.engine._measure import metric_of_run as metric_of_run
from mechkit.engine._measure import metric_of_some as metric_of_some
from mechkit.engine._measure import read_metric as read_metric
from mechkit.engine._memory import Budget as Budget
from mechkit.engine._operations import Operation as Operation
from mechkit.engine._operations import Set as Set
from mechkit.engine._replay import Replayer as Replayer
from mechkit.engine._sweep import Answers as Answers
from mechkit.engine._sweep import sweep as sweep
