"""HuBERT as a teacher, by transformers.

B: utterances, L: samples, T: frames (`T_teacher`), D: dimension.

Source: Hsu et al., "HuBERT: Self-Supervised Speech Representation Learning by
Masked Prediction of Hidden Units", 2021 (arXiv 2106.07447).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import HubertConfig, HubertForCTC
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import require

SAMPLE_RATE = 16000


class HubertTeacher(nn.Module):
    """A HuBERT, with a CTC head where it has been fine-tuned.

    An utterance's embedding does not depend on what else is in its batch: padding
    is kept out of attention, position convolution and normalization.
    """

    def __init__(
        self,
        model: HubertForCTC,
        do_normalize: bool,
        vocabulary: list[str] | None = None,
        name: str = "hubert",
    ) -> None:
        super().__init__()
        self.model = model
        self.do_normalize = do_normalize
        # Symbols by CTC index; 0 is blank, "|" parts words. None: no CTC head.
        self.vocabulary = vocabulary
        self.name = name

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def _stride(self) -> int:
        stride = 1
        for s in self.model.config.conv_stride:
            stride *= s
        return stride

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees before the transformer."""
        field, jump = 1, 1
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride):
            field += (kernel - 1) * jump
            jump *= stride
        return field

    @property
    def frame_shift(self) -> float:
        """Seconds."""
        return self._stride / SAMPLE_RATE

    @property
    def frame_offset(self) -> float:
        """Seconds from the start of the audio to the centre of frame 0."""
        return self.receptive_field / 2 / SAMPLE_RATE

    def num_frames(self, num_samples: int) -> int:
        """`T_teacher`: frames whose receptive field lies wholly inside the audio."""
        return max(0, (num_samples - self.receptive_field) // self._stride + 1)

    def _normalized(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance over each utterance; padding is 0."""
        inside_BL = torch.arange(waveforms_BL.shape[1], device=waveforms_BL.device)
        inside_BL = inside_BL[None] < lengths_B[:, None]
        waveforms_BL = waveforms_BL.masked_fill(~inside_BL, 0)
        if not self.do_normalize:
            return waveforms_BL
        mean_B1 = waveforms_BL.sum(1, keepdim=True) / lengths_B[:, None]
        centred_BL = (waveforms_BL - mean_B1) * inside_BL
        variance_B1 = (centred_BL**2).sum(1, keepdim=True) / lengths_B[:, None]
        return centred_BL / (variance_B1 + 1e-7).sqrt()

    def _features(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        extractor = self.model.hubert.feature_extractor
        if self.model.config.feat_extract_norm != "group":
            return extractor(waveforms_BL).transpose(1, 2)
        # Group norm takes its statistics over time, so each utterance goes alone.
        features = [extractor(w_L[None, :n])[0].T for w_L, n in zip(waveforms_BL, lengths_B)]
        return nn.utils.rnn.pad_sequence(features, batch_first=True)

    def hidden_states(
        self,
        waveforms_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        layers: list[int],
        mask_inputs: bool = False,
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Outputs of ``layers`` (from 1), the encoder's final output, and lengths in frames.

        Layers above the highest are not run; the final output is then not the model's.
        """
        hubert = self.model.hubert
        waveforms_BL = self._normalized(waveforms_BL, lengths_B)
        features_BTC = self._features(waveforms_BL, lengths_B)
        frames_B = torch.tensor([self.num_frames(int(n)) for n in lengths_B])
        frames_B = frames_B.to(features_BTC.device)
        inside_BT = torch.arange(features_BTC.shape[1], device=frames_B.device) < frames_B[:, None]
        hidden_BTD = hubert.feature_projection(features_BTC)
        if mask_inputs:
            hidden_BTD = hubert._mask_hidden_states(hidden_BTD, attention_mask=inside_BT.long())
        outputs: dict[int, torch.Tensor] = {}
        hooks, all_layers = [], hubert.encoder.layers
        for layer in layers:
            hook = _Keep(outputs, layer)
            hooks.append(all_layers[layer - 1].register_forward_hook(hook))
        try:
            if layers:
                hubert.encoder.layers = all_layers[: max(layers)]
            final: BaseModelOutput = hubert.encoder(hidden_BTD, attention_mask=inside_BT)
        finally:
            hubert.encoder.layers = all_layers
            for hook in hooks:
                hook.remove()
        return [outputs[layer] for layer in layers], final.last_hidden_state, frames_B

    @torch.inference_mode()
    def embed(
        self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of ``layer``, before any final layer norm.

        Args:
          waveforms_BL: 16 kHz, in [-1, 1], padded with anything.
          lengths_B: samples.
          layer: from 1.

        Returns:
          (embeddings_BTD, lengths_B in frames); what lies past a length is undefined.

        Raises:
          RecipeError: no such layer, or an utterance too short for one frame.
        """
        if not 1 <= layer <= self.num_layers:
            raise RecipeError(f"teacher {self.name}: layer {layer} is not in 1..{self.num_layers}")
        if int(lengths_B.min()) < self.receptive_field:
            raise RecipeError(
                f"teacher {self.name}: an utterance of {int(lengths_B.min())} samples is shorter "
                f"than one frame ({self.receptive_field}); remove it"
            )
        (embeddings_BTD,), _, frames_B = self.hidden_states(waveforms_BL, lengths_B, [layer])
        return embeddings_BTD, frames_B

    def ctc_logits(
        self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor, mask_inputs: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_BTV, lengths_B in frames) of the CTC head."""
        _, final_BTD, frames_B = self.hidden_states(waveforms_BL, lengths_B, [], mask_inputs)
        return self.model.lm_head(self.model.dropout(final_BTD)), frames_B

    @torch.inference_mode()
    def transcribe(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> list[str]:
        """Greedy CTC: best symbol a frame, repeats and blanks out."""
        if self.vocabulary is None:
            raise RecipeError(f"teacher {self.name}: has no CTC head; leave out its verification")
        logits_BTV, frames_B = self.ctc_logits(waveforms_BL, lengths_B)
        best_BT = logits_BTV.argmax(-1)
        texts = []
        for best_T, num_frames in zip(best_BT, frames_B):
            symbols = torch.unique_consecutive(best_T[:num_frames]).tolist()
            text = "".join(self.vocabulary[s] for s in symbols if s != 0)
            texts.append(" ".join(text.replace("|", " ").split()))
        return texts

    def save(self, folder: Path) -> None:
        """transformers' own layout: ``from_pretrained`` reads the folder."""
        transformers_logging.disable_progress_bar()
        self.model.save_pretrained(folder)
        settings = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "do_normalize": self.do_normalize,
            "sampling_rate": SAMPLE_RATE,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if self.vocabulary is not None:
            table = {symbol: index for index, symbol in enumerate(self.vocabulary)}
            (folder / "vocab.json").write_text(json.dumps(table, indent=1) + "\n")


class _Keep:
    def __init__(self, outputs: dict[int, torch.Tensor], layer: int) -> None:
        self._outputs, self._layer = outputs, layer

    def __call__(self, module: nn.Module, args, output) -> None:
        self._outputs[self._layer] = output[0] if isinstance(output, tuple) else output


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("is no table")
    except ValueError as error:
        raise RecipeError(f"{path}: cannot be read ({reason_of(error)}); fetch it again") from error
    return found


def load_hubert(folder: Path, name: str) -> HubertTeacher:
    """A teacher from a folder in transformers' layout.

    Raises:
      RecipeError: files are missing, damaged or do not fit each other.
    """
    config_path = require(folder / "config.json", "give a folder in transformers' layout")
    transformers_logging.disable_progress_bar()
    try:
        config = HubertConfig.from_json_file(config_path)
        model, report = HubertForCTC.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise RecipeError(
            f"{folder}: cannot be loaded ({reason_of(error)}); fetch it again"
        ) from error
    has_head = not any(key.startswith("lm_head") for key in report["missing_keys"])
    missing = [key for key in report["missing_keys"] if not key.startswith("lm_head")]
    # A model fine-tuned for CTC has lost the embedding that pre-training masks with.
    missing = [key for key in missing if not key.endswith("masked_spec_embed")]
    if missing:
        raise RecipeError(f"{folder}: weights lack {missing[0]}; fetch the folder again")
    vocabulary = None
    if has_head:
        path = require(folder / "vocab.json", "a CTC head needs it")
        table = _read_json(path)
        if sorted(table.values()) != list(range(config.vocab_size)):
            raise RecipeError(
                f"{path}: its {len(table)} indexes are not 0 to {config.vocab_size - 1}, as the "
                "CTC head asks for; fetch the folder again"
            )
        vocabulary = sorted(table, key=table.get)
    do_normalize = True
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        do_normalize = _read_json(preprocessor).get("do_normalize", True)
    teacher = HubertTeacher(model, do_normalize, vocabulary, name)
    return teacher.eval()
