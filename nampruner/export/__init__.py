"""The way out: files that run a network without nampruner. Each is proven before it appears.

onnx.py          one ONNX file                    int8.py, half.py   the same in fewer bits
pt2.py           one torch.export program
python.py        a folder: `model.safetensors` and a short `model.py`
parity.py        how far two runtimes are apart   boxes.py   the boxes that they find
files.py         a file appears when it is right
names.py         which module a node is from      ranges.py  how large activations become
form.py          what is exported of a network
origin.py        how a network was built, as code
difference.py    what sets a slim network apart from its original
standalone.py    the code that `model.py` carries
"""

from nampruner.export.files import read_metadata
from nampruner.export.form import exportable, exported_run, has_form
from nampruner.export.half import export_fp16
from nampruner.export.int8 import export_int8
from nampruner.export.names import layers_of
from nampruner.export.onnx import export_onnx, run_onnx
from nampruner.export.parity import Inputs
from nampruner.export.pt2 import export_pt2
from nampruner.export.python import export_python

__all__ = [
    "Inputs",
    "export_fp16",
    "export_int8",
    "export_onnx",
    "export_pt2",
    "export_python",
    "exportable",
    "exported_run",
    "has_form",
    "layers_of",
    "read_metadata",
    "run_onnx",
]
