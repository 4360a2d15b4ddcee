"""mechkit: mechanistic interpretability with exact, fast sweeps, labelled results and figures.

A name is loaded when it is first asked for, so that `import mechkit` takes no time. `__init__.pyi` has the same names, for
editors and type checkers; `tests/package/test_names.py` compares the two.
"""

import importlib as _importlib
import sys as _sys
import typing as _typing

from mechkit import _drawn
from mechkit._version import __version__ as __version__

_drawn.module = "mechkit.plot._default"  # what draws the results of all other parts

_MODULE_OF = {
    "PromptPairs": "mechkit.prompts",
    "Prompts": "mechkit.prompts",
    "Segment": "mechkit.prompts",
    "Metric": "mechkit.metrics",
    "accuracy": "mechkit.metrics",
    "answer_log_prob": "mechkit.metrics",
    "in_context_score": "mechkit.metrics",
    "kl_divergence": "mechkit.metrics",
    "log_prob": "mechkit.metrics",
    "logit_diff": "mechkit.metrics",
    "loss": "mechkit.metrics",
    "metric_factory": "mechkit.metrics",
    "prob_diff": "mechkit.metrics",
    "Cost": "mechkit.result",
    "Result": "mechkit.result",
    "ActivationCache": "mechkit.hooks",
    "Edit": "mechkit.engine",
    "HookedModel": "mechkit.hooks",
    "SITES": "mechkit.hooks",
    "sweep": "mechkit.engine",
    "Comparison": "mechkit.attribution",
    "Erasure": "mechkit.attribution",
    "OVSVD": "mechkit.attribution",
    "TopTokens": "mechkit.attribution",
    "TunedLens": "mechkit.attribution",
    "ablation": "mechkit.attribution",
    "activation_patching": "mechkit.attribution",
    "atp_star": "mechkit.attribution",
    "attention_flow": "mechkit.attribution",
    "attention_knockout": "mechkit.attribution",
    "attention_patterns": "mechkit.attribution",
    "attention_relevance": "mechkit.attribution",
    "attention_rollout": "mechkit.attribution",
    "attribution_patching": "mechkit.attribution",
    "compare": "mechkit.attribution",
    "composition_scores": "mechkit.attribution",
    "direct_logit_attribution": "mechkit.attribution",
    "dla_erasure_check": "mechkit.attribution",
    "gradient_x_input": "mechkit.attribution",
    "head_scores": "mechkit.attribution",
    "hidden_states": "mechkit.attribution",
    "image_patching": "mechkit.attribution",
    "integrated_gradients": "mechkit.attribution",
    "logit_lens": "mechkit.attribution",
    "neuron_attribution": "mechkit.attribution",
    "ov_circuit": "mechkit.attribution",
    "ov_svd": "mechkit.attribution",
    "patchscope": "mechkit.attribution",
    "pixel_attribution": "mechkit.attribution",
    "qk_circuit": "mechkit.attribution",
    "relp": "mechkit.attribution",
    "token_integrated_gradients": "mechkit.attribution",
    "top_tokens": "mechkit.attribution",
    "verify": "mechkit.attribution",
    "Circuit": "mechkit.circuits",
    "CircuitReport": "mechkit.circuits",
    "EdgeScores": "mechkit.circuits",
    "FaithfulnessCurve": "mechkit.circuits",
    "Graph": "mechkit.circuits",
    "acdc": "mechkit.circuits",
    "edge_attribution": "mechkit.circuits",
    "edge_patching": "mechkit.circuits",
    "evaluate_circuit": "mechkit.circuits",
    "faithfulness_curve": "mechkit.circuits",
    "find_circuit": "mechkit.circuits",
    "learn_mask": "mechkit.circuits",
    "optimal_ablation": "mechkit.circuits",
    "path_patching": "mechkit.circuits",
    "report": "mechkit.plot",
    "Study": "mechkit.studies",
    "GapWarning": "mechkit._warnings",
}
_PACKAGES = ("circuits", "plot", "studies", "tasks", "zoo")  # public as they are: `mk.tasks.ioi`
_MODULES = {*_PACKAGES, *(module.removeprefix("mechkit.") for module in _MODULE_OF.values())}

_EXTRA = {"Study", "studies"}  # need what a plain installation lacks, so that `from mechkit import *` leaves them out

__all__ = [name for name in (*_PACKAGES, *_MODULE_OF) if name not in _EXTRA]


def __getattr__(name: str) -> _typing.Any:
    if name in _MODULE_OF:
        value = getattr(_importlib.import_module(_MODULE_OF[name]), name)
    elif name in _MODULES:
        value = _importlib.import_module(f"mechkit.{name}")
    else:
        raise AttributeError(f"module 'mechkit' has no attribute {name!r}", name=name, obj=_sys.modules[__name__])
    globals()[name] = value  # so that this function is asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_MODULE_OF})
