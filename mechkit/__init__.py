"""mechkit: mechanistic interpretability with exact, fast sweeps, labelled results and pictures that one can trust."""

from mechkit import plot as plot
from mechkit import tasks as tasks
from mechkit._version import __version__ as __version__
from mechkit.attribution import ablation as ablation
from mechkit.attribution import activation_patching as activation_patching
from mechkit.attribution import attribution_patching as attribution_patching
from mechkit.attribution import direct_logit_attribution as direct_logit_attribution
from mechkit.hooks import SITES as SITES
from mechkit.hooks import ActivationCache as ActivationCache
from mechkit.hooks import Edit as Edit
from mechkit.hooks import HookedModel as HookedModel
from mechkit.hooks import sweep as sweep
from mechkit.metrics import Metric as Metric
from mechkit.metrics import accuracy as accuracy
from mechkit.metrics import kl_divergence as kl_divergence
from mechkit.metrics import log_prob as log_prob
from mechkit.metrics import logit_diff as logit_diff
from mechkit.metrics import prob_diff as prob_diff
from mechkit.prompts import PromptPairs as PromptPairs
from mechkit.prompts import Prompts as Prompts
from mechkit.result import Cost as Cost
from mechkit.result import Result as Result
