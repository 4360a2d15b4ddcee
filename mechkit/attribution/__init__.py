"""What a component does: activation patching, ablation."""

from mechkit.attribution.ablation import ablation as ablation
from mechkit.attribution.activation_patching import activation_patching as activation_patching
from mechkit.attribution.atp_star import atp_star as atp_star
from mechkit.attribution.attention_attribution import attention_flow as attention_flow
from mechkit.attribution.attention_attribution import attention_relevance as attention_relevance
from mechkit.attribution.attention_attribution import attention_rollout as attention_rollout
from mechkit.attribution.attribution_patching import attribution_patching as attribution_patching
from mechkit.attribution.comparison import Comparison as Comparison
from mechkit.attribution.comparison import compare as compare
from mechkit.attribution.comparison import verify as verify
from mechkit.attribution.direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
from mechkit.attribution.erasure import Erasure as Erasure
from mechkit.attribution.erasure import dla_erasure_check as dla_erasure_check
from mechkit.attribution.head_circuits import OVSVD as OVSVD
from mechkit.attribution.head_circuits import ov_circuit as ov_circuit
from mechkit.attribution.head_circuits import ov_svd as ov_svd
from mechkit.attribution.head_circuits import qk_circuit as qk_circuit
from mechkit.attribution.head_scores import composition_scores as composition_scores
from mechkit.attribution.head_scores import head_scores as head_scores
from mechkit.attribution.integrated_gradients import integrated_gradients as integrated_gradients
from mechkit.attribution.relp import relp as relp
