"""What every teacher is: waveforms in, the frames of one layer out, each utterance by itself.

B: utterances, L: samples, T: frames (`T_teacher`), D: dimension, X: of any output.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.download import file_sha256
from mvqkd.device import full_float32
from mvqkd.errors import RecipeError

# Of prepared waveforms (B, L) and their lengths (B,): outputs, each (B, T, X).
Compute = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]


class Teacher(nn.Module):
    """A model that gives one embedding a frame.

    An utterance's embedding does not depend on what else is in its batch. One that is longer
    than ``window_frames`` is embedded in windows of that length, of whose frames the outer
    ``margin_frames`` are left to the neighbouring window. What is taken of a whole utterance
    (`_prepared`, `_in_windows_of`) is taken of all of it, so that how far attention reaches is all
    that differs. For the shipped teacher that changes embeddings of 80 s of speech by less than 1%
    of their variance.
    """

    name: str
    # Those that its embeddings follow from. Empty: it was not loaded from any.
    files: Sequence[Path] = ()
    # Symbols by CTC index, "|" parts words. None: no CTC head.
    vocabulary: list[str] | None = None
    # Of the transformer's output: D, and how many layers there are.
    dim: int
    num_layers: int
    # Samples from one frame to the next, and samples that lie inside the audio for each frame.
    stride: int
    receptive_field: int
    window_frames: int
    margin_frames = 250

    @property
    def frame_shift(self) -> float:
        """Seconds."""
        return self.stride / SAMPLE_RATE

    @property
    def frame_offset(self) -> float:
        """Seconds from the start of the audio to the centre of frame 0."""
        return self.receptive_field / 2 / SAMPLE_RATE

    def num_frames(self, num_samples: int) -> int:
        """`T_teacher`: frames whose receptive field lies wholly inside the audio."""
        return max(0, (num_samples - self.receptive_field) // self.stride + 1)

    def _prepared(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """What is done to whole utterances; padding is 0 afterwards."""
        lengths_B = lengths_B.to(waveforms_BL.device, non_blocking=True)
        inside_BL = torch.arange(waveforms_BL.shape[1], device=waveforms_BL.device)
        return waveforms_BL.masked_fill(inside_BL[None] >= lengths_B[:, None], 0)

    @contextlib.contextmanager
    def _in_windows_of(self, prepared_L: torch.Tensor) -> Iterator[None]:
        """Within, what is computed is of windows of that utterance."""
        yield

    def _layers(
        self, prepared_BL: torch.Tensor, lengths_B: torch.Tensor, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """Output (B, T, D) of each of ``layers``, for utterances of at most ``window_frames``.

        ``lengths_B`` is on the CPU, so that asking for one does not wait for a GPU.
        """
        raise NotImplementedError

    @torch.inference_mode()
    def embed(
        self,
        waveforms_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        layer: int,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of ``layer``, before any final layer norm. Layers above it are not run.

        Args:
          waveforms_BL: 16 kHz, in [-1, 1], padded with anything.
          lengths_B: samples; on the CPU, or where the waveforms are.
          layer: from 1.
          dtype: that matrices are multiplied in; what comes out is float32 in any case.

        Returns:
          (embeddings_BTD, lengths_B in frames, where the argument is); what lies past a length is
          undefined.

        Raises:
          RecipeError: no such layer, or an utterance too short for one frame.
        """
        (embeddings_BTD,), frames_B = self.embed_layers(waveforms_BL, lengths_B, [layer], dtype)
        return embeddings_BTD, frames_B

    @torch.inference_mode()
    def embed_layers(
        self,
        waveforms_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        layers: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As `embed`, for several layers in one pass.

        Returns:
          (embeddings_BTD of each of ``layers``, lengths_B in frames)
        """
        for layer in layers:
            self.check_layer(layer)
        on_cpu_B = lengths_B.cpu()
        frames = [self.num_frames(n) for n in on_cpu_B.tolist()]
        if min(frames) < 1:
            self.check_length("an utterance", int(on_cpu_B.min()))
        prepared_BL = self._prepared(waveforms_BL, on_cpu_B)
        device = waveforms_BL.device.type
        # Float32 is left to who calls: a student in training may be in half precision around this.
        with contextlib.ExitStack() as stack:
            if dtype != torch.float32:
                stack.enter_context(torch.autocast(device, dtype))
            embeddings = self._in_windows(
                lambda x_BL, n_B: self._layers(x_BL, n_B, layers), prepared_BL, on_cpu_B
            )
        return [x_BTD.float() for x_BTD in embeddings], torch.tensor(
            frames, device=lengths_B.device
        )

    def sha256(self) -> str | None:
        """What tells this teacher from another of its name: SHA-256 of those of its ``files``.

        Read once, some seconds for a large teacher. None: it has no files.
        """
        return self._sha256 if self.files else None

    @functools.cached_property
    def _sha256(self) -> str:
        each = "".join(file_sha256(path) for path in self.files)
        return hashlib.sha256(each.encode()).hexdigest()

    def check_length(self, utterance: str, num_samples: int) -> None:
        """
        Raises:
          RecipeError: ``utterance`` is too short for one frame.
        """
        if self.num_frames(num_samples) < 1:
            raise RecipeError(
                f"{utterance}: {num_samples} samples are shorter than one frame of teacher "
                f"{self.name} ({self.receptive_field}); remove it"
            )

    def check_layer(self, layer: int) -> None:
        """
        Raises:
          RecipeError: there is no such layer.
        """
        if not 1 <= layer <= self.num_layers:
            raise RecipeError(f"teacher {self.name}: layer {layer} is not in 1..{self.num_layers}")

    def _in_windows(
        self, compute: Compute, prepared_BL: torch.Tensor, lengths_B: torch.Tensor
    ) -> list[torch.Tensor]:
        """Outputs (B, T, X) of ``compute``, which is given no utterance of more than
        ``window_frames``. ``lengths_B`` is on the CPU."""
        with full_float32():
            if max(map(self.num_frames, lengths_B.tolist())) <= self.window_frames:
                return compute(prepared_BL, lengths_B)
            whole = zip(prepared_BL, lengths_B.tolist())
            alone = [self._windows(compute, x_L[:n]) for x_L, n in whole]
        return [nn.utils.rnn.pad_sequence(outputs, batch_first=True) for outputs in zip(*alone)]

    def _windows(self, compute: Compute, prepared_L: torch.Tensor) -> list[torch.Tensor]:
        """Outputs (T, X) of one utterance, a window after the other."""
        num_frames, pieces, first = self.num_frames(len(prepared_L)), [], 0
        if num_frames <= self.window_frames:
            whole = compute(prepared_L[None], torch.tensor([len(prepared_L)]))
            return [x_1TX[0] for x_1TX in whole]
        window_samples = (self.window_frames - 1) * self.stride + self.receptive_field
        with self._in_windows_of(prepared_L):
            while True:
                samples_L = prepared_L[first * self.stride :][:window_samples]
                is_last = first + self.window_frames >= num_frames
                end = self.num_frames(len(samples_L))
                kept = slice(
                    self.margin_frames if first else 0, end - (0 if is_last else self.margin_frames)
                )
                outputs = compute(samples_L[None], torch.tensor([len(samples_L)]))
                pieces.append([x_1TX[0, kept] for x_1TX in outputs])
                if is_last:
                    return [torch.cat(parts) for parts in zip(*pieces)]
                first += self.window_frames - 2 * self.margin_frames

    def transcribe(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> list[str]:
        """What a CTC head reads; long utterances in windows, as `embed` has them.

        Raises:
          RecipeError: there is none.
        """
        raise RecipeError(f"teacher {self.name}: has no CTC head; leave out its verification")


@contextlib.contextmanager
def kept_layers(encoder: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within, ``encoder`` ends at the highest of ``layers`` (from 1) and the outputs of those
    that are run gather in the table that this gives; all of it is run where none is named."""
    all_layers, outputs = encoder.layers, {}

    def keep(layer: int):
        def hook(module: nn.Module, args, output) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [all_layers[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        if layers:
            encoder.layers = all_layers[: max(layers)]
        yield outputs
    finally:
        encoder.layers = all_layers
        for hook in hooks:
            hook.remove()
