"""What is measured, as torchmetrics: prevalence rates and classification scores."""

from metrics.apr import ArtifactPrevalenceRate
from metrics.attribute_scores import AttributeScores
from metrics.intervals import wilson_interval

__all__ = ["ArtifactPrevalenceRate", "AttributeScores", "wilson_interval"]
