"""Losses: the pruned transducer loss and the distillation losses."""

from mvqkd.losses.codebook import JointCodebookLoss

__all__ = ["JointCodebookLoss"]
