"""Metrics: one number a prompt, read off the logits.

A metric says which positions it reads in each prompt and which tokens it needs there, so that the engine unembeds those
alone. Metrics are computed in float32 at least, whatever the model's dtype.

- `_metric.py`: what a metric is, and to which prompts it belongs.
- `_answers.py`: metrics of answers that are one token each, and the divergence from another run.
- `_joint.py`: several metrics read off the same runs.
- `_sequences.py`: metrics of several tokens of each prompt: the loss, the log-probability of an answer of several tokens.
"""

from mechkit.metrics._answers import accuracy as accuracy
from mechkit.metrics._answers import kl as kl
from mechkit.metrics._answers import kl_divergence as kl_divergence
from mechkit.metrics._answers import log_prob as log_prob
from mechkit.metrics._answers import logit_diff as logit_diff
from mechkit.metrics._answers import prob_diff as prob_diff
from mechkit.metrics._joint import joint as joint
from mechkit.metrics._joint import metrics_for as metrics_for
from mechkit.metrics._metric import AnyMetric as AnyMetric
from mechkit.metrics._metric import CallableMetric as CallableMetric
from mechkit.metrics._metric import MadeOf as MadeOf
from mechkit.metrics._metric import Metric as Metric
from mechkit.metrics._metric import as_metric as as_metric
from mechkit.metrics._metric import makes_metrics as makes_metrics
from mechkit.metrics._metric import metric_factory as metric_factory
from mechkit.metrics._metric import metric_for as metric_for
from mechkit.metrics._metric import one_a_prompt as one_a_prompt
from mechkit.metrics._sequences import answer_log_prob as answer_log_prob
from mechkit.metrics._sequences import in_context_score as in_context_score
from mechkit.metrics._sequences import loss as loss
