"""The LightningModules, by the names that the command line takes."""

from lightning_modules.classifier import AttributeClassifier

__all__ = ["AttributeClassifier"]
