"""HookedModel, sites, caches, and the replay engine. The only part of mechkit that imports transformer_lens."""

from mechkit.hooks._cache import ActivationCache as ActivationCache
from mechkit.hooks._checks import check_can_run as check_can_run
from mechkit.hooks._checks import check_metric as check_metric
from mechkit.hooks._checks import check_tokens as check_tokens
from mechkit.hooks._edits import Cell as Cell
from mechkit.hooks._edits import Edit as Edit
from mechkit.hooks._gradients import GradientRuns as GradientRuns
from mechkit.hooks._gradients import attached_hooks as attached_hooks
from mechkit.hooks._gradients import frozen_parameters as frozen_parameters
from mechkit.hooks._gradients import metric_values as metric_values
from mechkit.hooks._memory import Budget as Budget
from mechkit.hooks._model import HookedModel as HookedModel
from mechkit.hooks._norms import FrozenNorm as FrozenNorm
from mechkit.hooks._precision import widen as widen
from mechkit.hooks._replay import record as record
from mechkit.hooks._sites import SITES as SITES
from mechkit.hooks._sites import Site as Site
from mechkit.hooks._sites import get_site as get_site
from mechkit.hooks._sites import parse_hook_name as parse_hook_name
from mechkit.hooks._sweep import Answers as Answers
from mechkit.hooks._sweep import sweep as sweep
from mechkit.hooks._validate import ValidationReport as ValidationReport
