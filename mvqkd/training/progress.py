"""Where a training run is."""

from __future__ import annotations

from dataclasses import dataclass

# Checkpoints of the last epochs that are kept where the conf does not say.
KEEP_EPOCHS = 30


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimizer; every draw follows from it."""

    epoch: int = 1
    # Of this epoch, that each process has taken.
    batch: int = 0
    # Updates of the weights, left-out ones included.
    step: int = 0
    bad_batches: int = 0
    # Of all processes together.
    speech_seconds: float = 0.0
    train_seconds: float = 0.0
    num_processes: int = 1
