"""mechkit: mechanistic interpretability with exact, fast sweeps, labelled results and pictures that one can trust."""

import typing as _typing

from mechkit import circuits as circuits
from mechkit import plot as plot
from mechkit import tasks as tasks
from mechkit import zoo as zoo
from mechkit._gap import GapWarning as GapWarning
from mechkit._version import __version__ as __version__
from mechkit.attribution import OVSVD as OVSVD
from mechkit.attribution import Comparison as Comparison
from mechkit.attribution import Erasure as Erasure
from mechkit.attribution import TopTokens as TopTokens
from mechkit.attribution import TunedLens as TunedLens
from mechkit.attribution import ablation as ablation
from mechkit.attribution import activation_patching as activation_patching
from mechkit.attribution import atp_star as atp_star
from mechkit.attribution import attention_flow as attention_flow
from mechkit.attribution import attention_patterns as attention_patterns
from mechkit.attribution import attention_relevance as attention_relevance
from mechkit.attribution import attention_rollout as attention_rollout
from mechkit.attribution import attribution_patching as attribution_patching
from mechkit.attribution import compare as compare
from mechkit.attribution import composition_scores as composition_scores
from mechkit.attribution import direct_logit_attribution as direct_logit_attribution
from mechkit.attribution import dla_erasure_check as dla_erasure_check
from mechkit.attribution import gradient_x_input as gradient_x_input
from mechkit.attribution import head_scores as head_scores
from mechkit.attribution import hidden_states as hidden_states
from mechkit.attribution import integrated_gradients as integrated_gradients
from mechkit.attribution import logit_lens as logit_lens
from mechkit.attribution import neuron_attribution as neuron_attribution
from mechkit.attribution import ov_circuit as ov_circuit
from mechkit.attribution import ov_svd as ov_svd
from mechkit.attribution import patchscope as patchscope
from mechkit.attribution import qk_circuit as qk_circuit
from mechkit.attribution import relp as relp
from mechkit.attribution import token_integrated_gradients as token_integrated_gradients
from mechkit.attribution import top_tokens as top_tokens
from mechkit.attribution import verify as verify
from mechkit.circuits import Circuit as Circuit
from mechkit.circuits import CircuitReport as CircuitReport
from mechkit.circuits import EdgeScores as EdgeScores
from mechkit.circuits import FaithfulnessCurve as FaithfulnessCurve
from mechkit.circuits import Graph as Graph
from mechkit.circuits import acdc as acdc
from mechkit.circuits import edge_attribution as edge_attribution
from mechkit.circuits import edge_patching as edge_patching
from mechkit.circuits import evaluate_circuit as evaluate_circuit
from mechkit.circuits import faithfulness_curve as faithfulness_curve
from mechkit.circuits import find_circuit as find_circuit
from mechkit.circuits import learn_mask as learn_mask
from mechkit.circuits import optimal_ablation as optimal_ablation
from mechkit.circuits import path_patching as path_patching
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
from mechkit.metrics import metric_factory as metric_factory
from mechkit.metrics import prob_diff as prob_diff
from mechkit.prompts import PromptPairs as PromptPairs
from mechkit.prompts import Prompts as Prompts
from mechkit.result import Cost as Cost
from mechkit.result import Result as Result

if _typing.TYPE_CHECKING:
    from mechkit import sweeps as sweeps
    from mechkit.plot import report as report
    from mechkit.sweeps import Study as Study

_LATE = ("Study", "report", "sweeps")  # these import what is slow to import: plotly, pydantic


def __getattr__(name: str) -> _typing.Any:
    if name == "report":
        return plot.report
    if name in ("Study", "sweeps"):
        import importlib

        found = importlib.import_module("mechkit.sweeps")
        return found if name == "sweeps" else found.Study
    raise AttributeError(f"module 'mechkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LATE]
