"""The multi-codebook vector quantizer, its training and its diagnostics."""

from mvqkd.quantizer.diagnostics import check_diagnostics, diagnose, plot_diagnostics
from mvqkd.quantizer.frames import frame_statistics
from mvqkd.quantizer.quantizer import Quantizer, load_quantizer, save_quantizer
from mvqkd.quantizer.trainer import (
    LeastSquaresTrainer,
    QuantizerSettings,
    QuantizerTrainer,
    train_quantizer,
)

__all__ = [
    "LeastSquaresTrainer",
    "Quantizer",
    "QuantizerSettings",
    "QuantizerTrainer",
    "check_diagnostics",
    "diagnose",
    "frame_statistics",
    "load_quantizer",
    "plot_diagnostics",
    "save_quantizer",
    "train_quantizer",
]
