"""What is exported of a network, where that is not the network itself."""

from typing import Any

from torch import nn

from nampruner.graph import Forward, call_model


def exportable(model: nn.Module) -> nn.Module:
    """Return what is exported of a network: tensors out, whatever else it gives.

    That is the network itself; of one of Ultralytics a copy that gives boxes, see
    `nampruner.yolo.Exportable`.
    """
    if not has_form(model):
        return model
    from nampruner.yolo import Exportable

    return Exportable(model)


def has_form(model: nn.Module) -> bool:
    """Whether what is exported of a network is something else than its plain call."""
    return any(kind.__module__.startswith("ultralytics.") for kind in type(model).__mro__)


def run_exportable(model: nn.Module, inputs: Any) -> Any:
    """Run what is exported of a network; hooks on its layers see that too."""
    return call_model(exportable(model), inputs)


def exported_run(model: nn.Module, forward: Forward | None) -> Forward:
    """Return what runs the layers that an exported network has.

    Of a network that is run by a `forward` of its own, nobody knows more than that.
    """
    return forward if forward is not None and not has_form(model) else run_exportable
