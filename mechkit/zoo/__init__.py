"""Models whose circuit is known, because their weights are written down by hand: ground truth for attribution methods.

Each function returns a `Known`: the model, prompts, a metric, which heads and MLPs play which role, and which edges are the
circuit.
"""

from mechkit.zoo._build import Known as Known
from mechkit.zoo._copied_patch import copied_patch as copied_patch
from mechkit.zoo._cue import cancellation as cancellation
from mechkit.zoo._cue import writer_and_eraser as writer_and_eraser
from mechkit.zoo._greater_than import greater_than as greater_than
from mechkit.zoo._induction import induction as induction
from mechkit.zoo._linear import linear as linear
from mechkit.zoo._saturated import saturated_attention as saturated_attention
from mechkit.zoo._serial_ioi import serial_ioi as serial_ioi
