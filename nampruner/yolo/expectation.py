"""A detector's distances, computed so that ONNX Runtime is quick at it."""

import torch
from torch import Tensor, nn


class Expectation(nn.Module):
    """Distributions over distances [N, 4·bins, A] → their means [N, 4, A].

    The head has this as a softmax over bins and a convolution. A softmax over anything but the last
    dimension makes ONNX Runtime transpose a tensor that is wider than all that comes after it; as
    two sums it takes none of that. Generalized focal loss, Li et al., 2020, equation 4.
    """

    distances: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        distances = torch.arange(bins, dtype=torch.float32)
        self.register_buffer("distances", distances.view(1, 1, -1, 1), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        batch, _, anchors = scores.shape
        bins = scores.view(batch, 4, self.distances.shape[2], anchors)
        mass = (bins - bins.amax(2, keepdim=True)).exp()
        return (mass * self.distances).sum(2) / mass.sum(2)
