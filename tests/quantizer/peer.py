"""A quantizer and the authors' with the same weights, and frames for them."""

import torch
from multi_quantization import Quantizer as PeerQuantizer

from mvqkd.quantizer.quantizer import Quantizer


def pair(num_codebooks, codebook_size=16, dim=12, seed=0):
    """Ours and the peer's with the same weights, far from zero mean, and frames for them."""
    torch.manual_seed(seed)
    peer = PeerQuantizer(dim, codebook_size, num_codebooks)
    with torch.no_grad():
        peer.centers.copy_(
            0.4 * torch.randn(num_codebooks, codebook_size, dim)
            + torch.randn(num_codebooks, 1, dim)
        )
        peer.to_logits.weight.copy_(peer.centers.view(-1, dim))
        peer.centers_scale.fill_(0.03)
        peer.logits_scale.fill_(-0.02)
    ours = Quantizer(dim, codebook_size, num_codebooks)
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def frames_for(quantizer, num_frames, seed=5):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_frames, quantizer.dim, generator=generator)
    return 1.5 * noise + quantizer.get_data_mean()
