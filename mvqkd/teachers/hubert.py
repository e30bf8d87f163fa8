"""HuBERT, wav2vec 2.0 and WavLM as teachers, by transformers.

All three are convolutions over the waveform, then a transformer, and their parts have the same
names in transformers. WavLM differs in its attention, wav2vec 2.0 in what it was trained for.

B: utterances, L: samples, T: frames (`T_teacher`), D: dimension, V: symbols, C: channels, t:
outputs of a convolution, P: pieces.

Source: Hsu et al., "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction
of Hidden Units", 2021 (arXiv 2106.07447); Baevski et al., "wav2vec 2.0: A Framework for
Self-Supervised Learning of Speech Representations", 2020 (arXiv 2006.11477); Chen et al., "WavLM:
Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing", 2021 (arXiv
2110.13900).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import HubertForCTC, PreTrainedModel, Wav2Vec2ForCTC, WavLMForCTC
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from mvqkd.data import SAMPLE_RATE
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import read_json, require
from mvqkd.teachers.base import Teacher, kept_layers

# By the model_type of a config.json.
FAMILIES: dict[str, type[PreTrainedModel]] = {
    "hubert": HubertForCTC,
    "wav2vec2": Wav2Vec2ForCTC,
    "wavlm": WavLMForCTC,
}
# A symbol that fairseq, too, leaves out of transcripts; it stands for nothing that is said.
END_OF_SENTENCE = "</s>"
# Names of weights that embeddings follow from, of HuBERT and its kin, and of Whisper's encoder.
# Others that a model has no place for are of heads, decoders and adapters, and of the mask. (The
# head for telling speakers has a feature_extractor too, a matrix.)
_OF_EMBEDDINGS = re.compile(
    r"(^|\.)(feature_extractor\.conv_layers|feature_projection|encoder)\.|^(layers|conv\d)\."
)


class _GivenStatistics(nn.Module):
    """A group norm of one channel a group that is told its mean and variance (C,)."""

    def __init__(self, norm: nn.GroupNorm, mean_C: torch.Tensor, variance_C: torch.Tensor) -> None:
        super().__init__()
        self._norm, self._mean_C, self._variance_C = norm, mean_C, variance_C

    def forward(self, x_BCt: torch.Tensor) -> torch.Tensor:
        norm = self._norm
        return F.batch_norm(
            x_BCt.float(), self._mean_C, self._variance_C, norm.weight, norm.bias, eps=norm.eps
        )


def _channel_statistics(
    conv: nn.Conv1d, wave_L: torch.Tensor, piece: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (C,) over all of ``conv(wave_L)``, of which ``piece`` outputs at a time are
    in memory."""
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    num_outputs = (len(wave_L) - kernel) // stride + 1
    counts, means, variances = [], [], []
    for first in range(0, num_outputs, piece):
        last = min(first + piece, num_outputs) - 1
        samples_L = wave_L[first * stride : last * stride + kernel]
        variance_C, mean_C = torch.var_mean(conv(samples_L[None, None])[0].float(), 1, correction=0)
        counts.append(last + 1 - first)
        means.append(mean_C.double())
        variances.append(variance_C.double())
    means_PC, variances_PC = torch.stack(means), torch.stack(variances)
    share_P1 = torch.tensor(counts, dtype=torch.float64, device=wave_L.device)[:, None]
    share_P1 = share_P1 / num_outputs
    mean_C = (share_P1 * means_PC).sum(0)
    variance_C = (share_P1 * (variances_PC + (means_PC - mean_C) ** 2)).sum(0)
    return mean_C.float(), variance_C.float()


class HubertTeacher(Teacher):
    """A HuBERT or one of its kin, with a CTC head where it has been fine-tuned.

    Padding is kept out of attention, position convolution and normalization.
    """

    # A minute, for which the attention weights of a layer of X-Large take 0.6 GB.
    window_frames = 3000

    def __init__(
        self,
        model: PreTrainedModel,
        do_normalize: bool,
        vocabulary: list[str] | None = None,
        name: str = "hubert",
    ) -> None:
        super().__init__()
        # One of FAMILIES, whose head has random weights where ``vocabulary`` is None.
        self.model = model
        self.do_normalize = do_normalize
        self.vocabulary = vocabulary
        self.name = name

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def stride(self) -> int:
        return math.prod(self.model.config.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees before the transformer."""
        field, jump = 1, 1
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride):
            field += (kernel - 1) * jump
            jump *= stride
        return field

    def _prepared(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance over each utterance, if the checkpoint asks for it."""
        lengths_B = lengths_B.to(waveforms_BL.device, non_blocking=True)
        waveforms_BL = super()._prepared(waveforms_BL, lengths_B)
        if not self.do_normalize:
            return waveforms_BL
        inside_BL = torch.arange(waveforms_BL.shape[1], device=waveforms_BL.device)
        inside_BL = inside_BL[None] < lengths_B[:, None]
        mean_B1 = waveforms_BL.sum(1, keepdim=True) / lengths_B[:, None]
        centred_BL = (waveforms_BL - mean_B1) * inside_BL
        variance_B1 = (centred_BL**2).sum(1, keepdim=True) / lengths_B[:, None]
        return centred_BL / (variance_B1 + 1e-7).sqrt()

    def _features(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        extractor = self.model.base_model.feature_extractor
        if self.model.config.feat_extract_norm != "group":
            return extractor(waveforms_BL).transpose(1, 2)
        # Group norm takes its statistics over time, so each utterance goes alone.
        features = [extractor(w_L[None, :n])[0].T for w_L, n in zip(waveforms_BL, lengths_B)]
        return nn.utils.rnn.pad_sequence(features, batch_first=True)

    @contextlib.contextmanager
    def _in_windows_of(self, prepared_L: torch.Tensor) -> Iterator[None]:
        """A group norm over time has the statistics of the whole utterance."""
        if self.model.config.feat_extract_norm != "group":
            yield
            return
        first = self.model.base_model.feature_extractor.conv_layers[0]
        # As many outputs as a window has, which are in memory then too.
        piece = self.window_frames * self.stride // first.conv.stride[0]
        norm, statistics = first.layer_norm, _channel_statistics(first.conv, prepared_L, piece)
        first.layer_norm = _GivenStatistics(norm, *statistics)
        try:
            yield
        finally:
            first.layer_norm = norm

    def _encode(
        self,
        prepared_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        layers: Sequence[int],
        mask_inputs: bool | torch.Tensor,
        residual_dtype: torch.dtype | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Outputs of ``layers``, final output, frames.

        Args:
          residual_dtype: of what each layer adds to; None: as autocast has it.
        """
        body = self.model.base_model
        features_BTC = self._features(prepared_BL, lengths_B)
        frames_B = torch.tensor([self.num_frames(n) for n in lengths_B.tolist()])
        frames_B = frames_B.to(features_BTC.device, non_blocking=True)
        inside_BT = torch.arange(features_BTC.shape[1], device=frames_B.device) < frames_B[:, None]
        hidden_BTD = body.feature_projection(features_BTC)
        if isinstance(hidden_BTD, tuple):  # all but HuBERT give what they projected too
            hidden_BTD = hidden_BTD[0]
        if residual_dtype is not None:
            hidden_BTD = hidden_BTD.to(residual_dtype)
        if isinstance(mask_inputs, torch.Tensor):
            masked_D = body.masked_spec_embed.to(hidden_BTD.dtype)
            hidden_BTD = torch.where(mask_inputs[..., None], masked_D, hidden_BTD)
        elif mask_inputs:
            hidden_BTD = body._mask_hidden_states(hidden_BTD, attention_mask=inside_BT.long())
        with kept_layers(body.encoder, layers) as outputs, warnings.catch_warnings():
            # WavLM's, of a mask of another type than its position bias, which torch converts.
            warnings.filterwarnings("ignore", message="Support for mismatched")
            final: BaseModelOutput = body.encoder(hidden_BTD, attention_mask=inside_BT)
        return [outputs[layer] for layer in layers], final.last_hidden_state, frames_B

    def hidden_states(
        self,
        waveforms_BL: torch.Tensor,
        lengths_B: torch.Tensor,
        layers: list[int],
        mask_inputs: bool | torch.Tensor = False,
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Outputs of ``layers`` (from 1), the encoder's final output, and lengths in frames.

        Layers above the highest are not run; the final output is then not the model's.

        Args:
          mask_inputs: whether to mask as the model's configuration says, in training mode; or,
            in any mode, the frames (B, T) to mask.
        """
        prepared_BL = self._prepared(waveforms_BL, lengths_B)
        return self._encode(prepared_BL, lengths_B, layers, mask_inputs)

    def _layers(
        self, prepared_BL: torch.Tensor, lengths_B: torch.Tensor, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        # Under autocast without layer norm at the input, dozens of layers would add to bfloat16.
        return self._encode(prepared_BL, lengths_B, layers, False, torch.float32)[0]

    def ctc_logits(
        self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor, mask_inputs: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_BTV, lengths_B in frames) of the CTC head."""
        prepared_BL = self._prepared(waveforms_BL, lengths_B)
        return self._logits(prepared_BL, lengths_B, mask_inputs)

    def _logits(
        self, prepared_BL: torch.Tensor, lengths_B: torch.Tensor, mask_inputs: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, final_BTD, frames_B = self._encode(prepared_BL, lengths_B, [], mask_inputs)
        return self.model.lm_head(self.model.dropout(final_BTD)), frames_B

    @torch.inference_mode()
    def transcribe(self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor) -> list[str]:
        """Greedy CTC: best symbol a frame, repeats and blanks out."""
        if self.vocabulary is None:
            return super().transcribe(waveforms_BL, lengths_B)
        on_cpu_B = lengths_B.cpu()
        frames = [self.num_frames(n) for n in on_cpu_B.tolist()]
        (logits_BTV,) = self._in_windows(
            lambda x_BL, n_B: [self._logits(x_BL, n_B, False)[0]],
            self._prepared(waveforms_BL, on_cpu_B),
            on_cpu_B,
        )
        best_BT = logits_BTV.argmax(-1)
        said = [
            "" if index == self.model.config.pad_token_id or symbol == END_OF_SENTENCE else symbol
            for index, symbol in enumerate(self.vocabulary)
        ]
        texts = []
        for best_T, num_frames in zip(best_BT, frames):
            symbols = torch.unique_consecutive(best_T[:num_frames]).tolist()
            texts.append(" ".join("".join(said[s] for s in symbols).replace("|", " ").split()))
        return texts

    def save(self, folder: Path) -> None:
        """transformers' own layout: ``from_pretrained`` reads the folder."""
        transformers_logging.disable_progress_bar()
        model = self.model.base_model if self.vocabulary is None else self.model
        model.save_pretrained(folder)
        settings = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "do_normalize": self.do_normalize,
            "sampling_rate": SAMPLE_RATE,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if self.vocabulary is not None:
            table = {symbol: index for index, symbol in enumerate(self.vocabulary)}
            (folder / "vocab.json").write_text(json.dumps(table, indent=1) + "\n")


def load_hubert(folder: Path, family: str, name: str) -> HubertTeacher:
    """A teacher from a folder in transformers' layout.

    Args:
      family: one of FAMILIES.

    Raises:
      RecipeError: files are missing, damaged or do not fit each other.
    """
    model_class = FAMILIES[family]
    model, report = load_pretrained(model_class, folder)
    config = model.config
    has_head = not any(key.startswith("lm_head") for key in report["missing_keys"])
    # An adapter (of models for translation) comes between the encoder and the head.
    has_head = has_head and not getattr(config, "add_adapter", False)
    # A model fine-tuned for CTC has lost the embedding that pre-training masks with.
    check_weights(folder, report, may_lack=("lm_head", "masked_spec_embed"))
    vocabulary = _read_vocabulary(folder, config.vocab_size) if has_head else None
    do_normalize = True
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        options = read_json(preprocessor, "fetch it again")
        do_normalize = options.get("do_normalize", True)
        sampling_rate = options.get("sampling_rate", SAMPLE_RATE)
        if sampling_rate != SAMPLE_RATE:
            raise RecipeError(
                f"{preprocessor}: the teacher hears a sampling_rate of {sampling_rate}, and audio "
                f"has {SAMPLE_RATE} here; give another teacher"
            )
    else:
        logging.warning(
            f"{folder}: has no preprocessor_config.json; each utterance is normalized to zero mean "
            'and unit variance, unless you put that file there with {"do_normalize": false}'
        )
    return HubertTeacher(model, do_normalize, vocabulary, name).eval()


def load_pretrained(
    model_class: type[PreTrainedModel], folder: Path, **options
) -> tuple[PreTrainedModel, dict]:
    """``from_pretrained`` in float32 with transformers' report of the keys that it missed.

    Raises:
      RecipeError: files are missing, damaged or of another size than config.json says, or a pickle
        among them holds more than tensors; it is not run.
    """
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # It lists every key that a folder has for another head.
    transformers_logging.set_verbosity_error()
    try:
        config = model_class.config_class.from_json_file(folder / "config.json")
        return model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            weights_only=True,  # whatever the default becomes
            **options,
        )
    except pickle.UnpicklingError as error:  # which tells how to run it all the same
        name = re.search(r"GLOBAL (\S+)", str(error))
        cause = f"holds {name[1]}, which is no weight" if name else "is damaged, or no weights"
        raise RecipeError(
            f"{folder}: its pickled weights are refused and not run: the file {cause}; fetch it "
            "again from whom you trust, as safetensors where they have it"
        ) from error
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise RecipeError(
            f"{folder}: cannot be loaded ({reason_of(error)}); fetch it again"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_weights(folder: Path, report: dict, may_lack: tuple[str, ...] = ()) -> None:
    """
    Raises:
      RecipeError: the weights lack something, or hold something that embeddings would follow from
        and that the model lacks.
    """
    for key in sorted(report["missing_keys"]):
        if not any(part in key for part in may_lack):
            raise RecipeError(f"{folder}: weights lack {key}; fetch the folder again")
    for key in sorted(report["unexpected_keys"]):
        if _OF_EMBEDDINGS.search(key):
            raise RecipeError(
                f"{folder}: weights hold {key}, for which config.json has no place; fetch the "
                "folder again"
            )


def _read_vocabulary(folder: Path, size: int) -> list[str]:
    """Symbols by index of vocab.json, and of added_tokens.json where there is one."""
    path = require(folder / "vocab.json", "a CTC head needs it")
    table = read_json(path, "fetch it again")
    added = folder / "added_tokens.json"
    if added.exists() and len(table) < size:
        table |= read_json(added, "fetch it again")
    indexes = [index for index in table.values() if isinstance(index, int)]
    if len(table) != size or sorted(indexes) != list(range(size)):
        raise RecipeError(
            f"{path}: its {len(table)} indexes are not 0 to {size - 1}, as the CTC head asks for; "
            "fetch the folder again"
        )
    return sorted(table, key=table.get)
