"""What a component does: activation patching, ablation."""

from mechkit.attribution.ablation import ablation as ablation
from mechkit.attribution.activation_patching import activation_patching as activation_patching
from mechkit.attribution.attribution_patching import attribution_patching as attribution_patching
from mechkit.attribution.direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
