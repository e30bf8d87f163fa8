"""Decoding of a streaming student as it runs when deployed: chunk by chunk, with caches.

Shapes: B streams, T feature frames (10 ms), F feature bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvqkd.decoding.search import BeamSearch, FastBeamSearch, GreedySearch, Hypothesis
from mvqkd.students.conformer import StreamingEncoder, subsampled_lengths


@torch.no_grad()
def decode_streaming(
    model: nn.Module,
    features_BTF: Tensor,
    lens_B: Tensor,
    chunk_size: int,
    left_context: int,
    right_context: int,
    search: GreedySearch | BeamSearch | FastBeamSearch,
) -> list[Hypothesis]:
    """Decode a batch of streams, each chunk as soon as its features are there.

    Nothing of a chunk is computed before the frames that it needs, and nothing of it again
    afterwards: encoder and search go on from their states. Without look-ahead the result is
    that of ``model.encoder(features_BTF, lens_B, chunk_size=..., left_context=...)`` followed by
    the same search. Streams may differ in length; one too short for an output frame gets an
    empty hypothesis.

    Args:
      model: a transducer with a causal encoder, in evaluation mode.
      features_BTF: features; what lies past ``lens_B`` is not read.
      lens_B: feature frames of each stream.
      chunk_size: encoder frames (40 ms each) per call.
      left_context: encoder frames before the chunk that attention sees; -1 for all.
      right_context: encoder frames of look-ahead; each delays a chunk by 40 ms.
      search: a search over ``model`` that has not begun.
    Raises:
      RecipeError: the encoder is not causal, or the sizes are not possible.
    """
    stream = StreamingEncoder(model.encoder, chunk_size, left_context, right_context)
    state = stream.init_state(features_BTF.size(0))
    lens_B = lens_B.to(features_BTF.device)
    num_outputs_B = subsampled_lengths(lens_B)
    start = 0
    # The second condition matters after the last feature: look-ahead may leave whole chunks.
    while start < int(lens_B.max()) or bool((state.num_outputs_B < num_outputs_B).any()):
        size = stream.num_frames(state)
        chunk_lens_B = (lens_B - start).clamp(0, size)
        encoder_out_BTC, encoder_lens_B, state = stream.step(
            features_BTF[:, start : start + size], state, chunk_lens_B
        )
        search.step(encoder_out_BTC, encoder_lens_B)
        start += size
    return search.finish()
