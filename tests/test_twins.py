"""A copy holds what `convert` gave it, and shares nothing else with the original."""

import torch
from torch import Tensor, nn

from nampruner.twins import twin


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    return model


def test_a_copy_of_its_own() -> None:
    model = tied()
    copied = twin(model, lambda _, tensor: tensor.clone())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert copied[2].weight is copied[0].weight
    assert not copied[1].bias.requires_grad
    assert copied[0].weight.requires_grad


def test_what_is_returned_as_it_came_is_shared() -> None:
    model = tied()
    model(torch.randn(4, 3)).sum().backward()

    def some(name: str, tensor: Tensor) -> Tensor:
        return tensor if name == "0.weight" else tensor.double()

    copied = twin(model, some)
    assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert copied[0].weight is not model[0].weight
    assert copied[0].weight.grad is None
    assert copied[1].running_mean.dtype == torch.float64
