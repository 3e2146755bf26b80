"""What is measured, as torchmetrics: prevalence rates and classification scores."""

from rl4med_ddpo.metrics.apr import ArtifactPrevalenceRate
from rl4med_ddpo.metrics.attribute_scores import AttributeScores
from rl4med_ddpo.metrics.intervals import wilson_interval

__all__ = ["ArtifactPrevalenceRate", "AttributeScores", "wilson_interval"]
