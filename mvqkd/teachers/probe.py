"""Is a teacher any use for some speech? For each layer, what codebooks keep of it, and how much of
the language a linear map finds in it.

A linear CTC probe on frozen embeddings (one matrix from the embedding of a frame to characters) is
fitted to a few minutes of transcribed speech, and judged by the characters that it gets wrong in
utterances that it has not seen. The same probe on filterbanks says what needs no teacher at all: a
layer whose probe is hardly better has nothing to teach of this language.

B: utterances, T: frames, D: dimension, V: symbols.

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016
(arXiv 1610.01644); the choice among layers by one standard error: Breiman, Friedman, Olshen and
Stone, "Classification and Regression Trees", 1984, section 3.4.3.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet, Fbank
from torch import nn
from torch.nn import functional as F

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.audio import load_audio, transcript_of
from mvqkd.data.labels import speed_of
from mvqkd.decoding.scoring import Result, wer_interval, word_error_rate
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer.frames import frame_statistics
from mvqkd.quantizer.study import unseen_rrl
from mvqkd.quantizer.trainer import QuantizerSettings
from mvqkd.teachers.base import Teacher
from mvqkd.teachers.ctc import plain_text
from mvqkd.teachers.embeddings import Part, SampleSettings, open_sample, sample_layers

# Utterances, of which some are kept from the probe, and one at least tells when to stop.
_LEAST_UTTERANCES = 10
# One of so many utterances tells when to stop fitting, and it is asked so many times.
_NTH_FOR_STOPPING, _LOOKS = 8, 20
# Half the width of a 95% interval in standard errors.
_DEVIATIONS = 1.96


@dataclass
class ProbeSettings:
    """What is looked at, and how the probe is fitted.

    Attributes:
      minutes: of speech, drawn at random from what is given.
      unseen_share: of the utterances, kept from fitting; at most a fifth.
      layers: of the teacher, from 1; none: all of them.
      max_bad_share: of the utterances, that may be broken; they are left out and listed.
      max_duration: seconds of speech that go through the teacher at a time.
      steps, batch_size, lr, weight_decay: of the probe; utterances a step, AdamW, the rate falls
        to 0 in a straight line.
      max_error_share: of the filterbanks' error, or of 100% where that is less. A teacher whose
        best layer has more errors carries nothing of the language.
      seed: of the utterances and their order.
    """

    minutes: float = 10
    unseen_share: float = 0.2
    layers: list[int] = field(default_factory=list)
    max_bad_share: float = 0.05
    max_duration: float = 50
    steps: int = 400
    batch_size: int = 8
    lr: float = 0.01
    weight_decay: float = 0.1
    max_error_share: float = 0.8
    seed: int = 1


def pick_speech(cuts: CutSet, settings: ProbeSettings) -> CutSet:
    """``settings.minutes`` of transcribed utterances at their own speed, at 16 kHz.

    Raises:
      RecipeError: there are too few.
    """
    # Copies at another speed of what the probe is fitted to are not unseen.
    usable = [cut for cut in cuts if transcript_of(cut).strip() and speed_of(cut) == 1]
    order = np.random.default_rng(settings.seed).permutation(len(usable))
    ends = itertools.accumulate(usable[i].duration for i in order)
    chosen = [usable[i] for i, end in zip(order, ends) if end <= 60 * settings.minutes]
    if len(chosen) < _LEAST_UTTERANCES:
        raise RecipeError(
            f"probe.minutes: {len(chosen)} utterances with transcripts in {settings.minutes:g} "
            f"minutes, at least {_LEAST_UTTERANCES} are needed; give more speech or more minutes"
        )
    return CutSet.from_cuts(
        cut if cut.sampling_rate == SAMPLE_RATE else cut.resample(SAMPLE_RATE) for cut in chosen
    )


def text_of(cut) -> str:
    """The characters that count, in capitals, words parted by one space."""
    return plain_text(plain_text(transcript_of(cut)).upper())


def probe_teacher(
    cuts: CutSet,
    teacher: Teacher,
    work_dir: Path,
    settings: ProbeSettings,
    quantizer: QuantizerSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Measure each layer; all of them come from one pass of the speech through the teacher.

    Args:
      cuts: what `pick_speech` gave.
      work_dir: holds the embeddings of all layers meanwhile, 4 bytes a value; in the end, where
        some of ``cuts`` cannot be read or are too short, ``bad-utterances.txt``.
      quantizer: of the codebooks whose RRL is measured.
    Returns:
      plain JSON values: ``teacher``; ``settings`` and ``quantizer``; ``minutes``,
      ``num_utterances``, ``num_unseen``, ``num_symbols``; ``filterbanks``, with ``error`` (%
      of characters) and its 95% interval ``low``, ``high``; ``layers``, a list of the same with
      ``layer`` and ``rrl``; ``layer``, the one to take; ``carries_language``.
    Raises:
      RecipeError: no such layer, too little speech, or too many bad utterances.
    """
    layers = settings.layers or list(range(1, teacher.num_layers + 1))
    for layer in layers:
        teacher.check_layer(layer)
    texts = {cut.id: text_of(cut) for cut in cuts}
    num_unseen = max(1, round(settings.unseen_share * len(texts)))
    sample = SampleSettings(
        len(texts),
        num_unseen,
        settings.max_duration,
        settings.seed,
        max_bad_share=settings.max_bad_share,
    )
    rows = []
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=".probe-") as folder:
        paths = {layer: Path(folder) / f"layer-{layer}.h5" for layer in layers}
        listing = work_dir / "bad-utterances.txt"
        sample_layers(cuts, teacher, paths, sample, device, listing, "the key probe")
        with open_sample(paths[layers[0]]) as (train, unseen, _):
            ids = (train.utterances, unseen.utterances)
        good = {*ids[0], *ids[1]}
        cuts = CutSet.from_cuts(cut for cut in cuts if cut.id in good)
        symbols = sorted({character for name in ids[0] for character in texts[name]})
        filterbanks = _filterbanks(cuts)
        baseline = probe_error(
            *([filterbanks[name] for name in part] for part in ids),
            *([texts[name] for name in part] for part in ids),
            symbols,
            settings,
            device,
        )
        logging.info(f"filterbanks: {baseline['error']:.1f}% of characters wrong")
        for layer in layers:
            with open_sample(paths[layer]) as (train, unseen, _):
                frames = [_by_utterance(part) for part in (train, unseen)]
            row = probe_error(
                *frames,
                *([texts[name] for name in part] for part in ids),
                symbols,
                settings,
                device,
            )
            rrl, problem = unseen_rrl(paths[layer], quantizer, device)
            if problem:
                logging.warning(f"layer {layer}: {problem}")
            rows.append({"layer": layer, "rrl": rrl[max(rrl, key=int)], **row})
            logging.info(
                f"layer {layer}: RRL {rows[-1]['rrl']:.3f}, {row['error']:.1f}% of characters wrong"
            )
            paths[layer].unlink()
    best = min(row["error"] for row in rows)
    # A probe that says nothing has 100%.
    no_use = settings.max_error_share * min(100.0, baseline["error"])
    return {
        "teacher": teacher.name,
        "settings": dataclasses.asdict(settings),
        "quantizer": dataclasses.asdict(quantizer),
        "minutes": sum(cut.duration for cut in cuts) / 60,
        "num_utterances": len(cuts),
        "num_unseen": len(ids[1]),
        "num_symbols": len(symbols),
        "filterbanks": baseline,
        "layers": rows,
        "layer": layer_to_take(rows),
        "carries_language": best <= no_use,
    }


def layer_to_take(rows: Sequence[Mapping[str, float]]) -> int:
    """Of the layers whose ``error`` is within a standard error of the least, that of which
    codebooks keep most (the least ``rrl``)."""
    best = min(rows, key=lambda row: row["error"])
    standard_error = (best["high"] - best["low"]) / (2 * _DEVIATIONS)
    close = [row for row in rows if row["error"] <= best["error"] + standard_error]
    return int(min(close, key=lambda row: row["rrl"])["layer"])


def _by_utterance(part: Part) -> list[torch.Tensor]:
    frames_FD = torch.from_numpy(part.frames[:])
    return list(torch.tensor_split(frames_FD, part.starts[1:]))


def _filterbanks(cuts: CutSet) -> dict[str, torch.Tensor]:
    """Of each cut, 80 log-mel bins of two successive frames of 10 ms: (T, 160) at the teachers'
    50 Hz."""
    extractor, found = Fbank(), {}
    for cut in cuts:
        mels_TF = torch.from_numpy(extractor.extract(load_audio(cut), SAMPLE_RATE))
        found[cut.id] = mels_TF[: len(mels_TF) // 2 * 2].reshape(len(mels_TF) // 2, -1)
    return found


def probe_error(
    train: Sequence[torch.Tensor],
    unseen: Sequence[torch.Tensor],
    train_texts: Sequence[str],
    unseen_texts: Sequence[str],
    symbols: Sequence[str],
    settings: ProbeSettings,
    device: torch.device,
) -> dict[str, float]:
    """Fit a linear CTC probe to frames (T, D) of each utterance of ``train``.

    Returns:
      ``error``, % of the characters of ``unseen_texts``, and its 95% interval ``low``, ``high``.
    """
    everything_FD = torch.cat(list(train))
    mean_D, std_D = (x_D.to(device) for x_D in frame_statistics(everything_FD))
    # One that does not vary says nothing.
    scale_D = torch.where(std_D > 1e-6 * std_D.max(), 1 / std_D, 0.0)
    ids = {symbol: number for number, symbol in enumerate(symbols, start=1)}  # 0 is the blank
    targets = [torch.tensor([ids[symbol] for symbol in text]) for text in train_texts]
    probe = nn.Linear(everything_FD.shape[1], len(symbols) + 1, device=device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(
        probe.parameters(), settings.lr, weight_decay=settings.weight_decay
    )

    def log_probs(frames: Sequence[torch.Tensor]) -> torch.Tensor:
        x_BTD = nn.utils.rnn.pad_sequence(list(frames), batch_first=True).to(device)
        return probe((x_BTD - mean_D) * scale_D).log_softmax(-1)

    @torch.no_grad()
    def read(frames: Sequence[torch.Tensor], texts: Sequence[str]) -> list[Result]:
        results: list[Result] = []
        for number, (x_TD, text) in enumerate(zip(frames, texts)):
            best_T = torch.unique_consecutive(log_probs([x_TD])[0].argmax(-1))
            said = [symbols[i - 1] for i in best_T.tolist() if i > 0]
            results.append((f"{number:06d}", list(text), said))
        return results

    # Little speech is soon learnt by heart: where to stop is told by an eighth of it.
    kept = list(range(_NTH_FOR_STOPPING - 1, len(train), _NTH_FOR_STOPPING))
    fitted = [i for i in range(len(train)) if i not in kept]
    rng, order = np.random.default_rng(settings.seed), []
    best = (math.inf, probe.state_dict())  # which at first reads nothing: 100%
    for step in range(settings.steps + 1):
        if step % max(1, settings.steps // _LOOKS) == 0:
            error = word_error_rate(read([train[i] for i in kept], [train_texts[i] for i in kept]))
            if error < best[0]:
                best = (error, {name: value.clone() for name, value in probe.state_dict().items()})
        if len(order) < min(settings.batch_size, len(fitted)):
            order = rng.permutation(fitted).tolist()
        batch, order = order[: settings.batch_size], order[settings.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        loss = F.ctc_loss(
            log_probs([train[i] for i in batch]).transpose(0, 1),
            torch.cat([targets[i] for i in batch]).to(device),
            torch.tensor([len(train[i]) for i in batch], device=device),
            torch.tensor([len(targets[i]) for i in batch], device=device),
            reduction="sum",
            zero_infinity=True,
        )
        optimizer.zero_grad()
        (loss / sum(len(targets[i]) for i in batch)).backward()
        optimizer.step()
    probe.load_state_dict(best[1])
    error, low, high = wer_interval(read(unseen, unseen_texts), settings.seed, replications=1000)
    return {"error": error, "low": low, "high": high}


def probe_table(found: Mapping[str, Any]) -> str:
    """Lines for people: each layer, and what follows.

    Args:
      found: what `probe_teacher` gave.
    """
    lines = [
        f"{found['teacher']}: {found['num_utterances']} utterances, {found['minutes']:.1f} min, "
        f"{found['num_unseen']} of them unseen; {found['num_symbols']} characters; N = "
        f"{found['quantizer']['num_codebooks']}",
        "",
        f"{'layer':<12} {'RRL':>6}   CTC probe: % of characters wrong [95%]",
    ]
    for row in (found["filterbanks"], *found["layers"]):
        name, rrl = str(row.get("layer", "filterbanks")), row.get("rrl")
        lines.append(
            f"{name:<12} {'-' if rrl is None else f'{rrl:.3f}':>6}   {row['error']:6.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}]"
            + (
                "  <- take"
                if found["carries_language"] and row.get("layer") == found["layer"]
                else ""
            )
        )
    return "\n".join([*lines, "", verdict(found)])


def verdict(found: Mapping[str, Any]) -> str:
    """The layer to take, or the warning that there is none."""
    best = min(found["layers"], key=lambda row: row["error"])
    if found["carries_language"]:
        return f"take layer {found['layer']}"
    return (
        f"WARNING: no layer of {found['teacher']} carries this language: at best (layer "
        f"{best['layer']}) {best['error']:.1f}% of the characters are wrong, and "
        f"{found['filterbanks']['error']:.1f}% with plain filterbanks; students that learn from it "
        "are likely to get worse; take a teacher that was trained on this language"
    )


def plot_probe(found: Mapping[str, Any], png_path: Path | str) -> None:
    """The probe's error and the RRL by layer, as a PNG file.

    Args:
      found: what `probe_teacher` gave.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["layers"]
    layers, errors = [row["layer"] for row in rows], [row["error"] for row in rows]
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    spread = [
        [row["error"] - row["low"] for row in rows],
        [row["high"] - row["error"] for row in rows],
    ]
    axes.errorbar(
        layers, errors, np.abs(spread), marker="o", markersize=4, capsize=2, label="probe"
    )
    axes.axhline(found["filterbanks"]["error"], color="gray", linestyle="--", label="filterbanks")
    axes.set(title=found["teacher"], xlabel="layer", ylabel="characters wrong (%), unseen speech")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)

    rrl_axes = figure.add_subplot(1, 2, 2)
    rrl_axes.bar(layers, [row["rrl"] for row in rows])
    title = f"N = {found['quantizer']['num_codebooks']}"
    rrl_axes.set(title=title, xlabel="layer", ylabel="RRL, unseen speech")
    rrl_axes.grid(alpha=0.3, axis="y")
    if found["carries_language"]:
        for each in (axes, rrl_axes):
            each.axvline(found["layer"], color="tab:green", alpha=0.4, label="to take")
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with written_aside(png_path) as aside:
        aside.write_bytes(buffer.getvalue())
