"""Export without us: a torch.export program, and a folder with a model.py of its own."""

import re
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import DependsOnValues, TwoInTwoOut, hooked, small
from torch import Tensor, nn
from zoo import lively

import nampruner
from nampruner import models
from nampruner.errors import NamPrunerError, ParityError
from nampruner.export import export_pt2, export_python, python, read_metadata
from nampruner.export.code import call_of, is_literal, literal
from nampruner.export.parity import batches_of, tensors_of
from nampruner.lineage import remember
from nampruner.surgery import add_bias, apply_cuts

# name → source, channels, pixels, with NAM
NETWORKS = {
    "resnet20 with NAM": ("resnet20?width=4", 1, 16, True),
    "split lists": ("timm:mixnet_s", 3, 32, False),
    "widths as attributes": ("timm:res2net50_26w_4s?layers=[1,1,1,1]", 3, 32, False),
    "kernels in buffers": ("timm:resnetblur50?layers=[1,1,1,1]", 3, 32, False),
    "baked weights": ("timm:nf_regnet_b0", 3, 32, False),
    "channel shuffle": ("torchvision:shufflenet_v2_x0_5", 3, 32, False),
    "versioned layers": ("torchvision:mnasnet0_5", 3, 32, False),
}

READ = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nampruner", "torch_pruning"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from model import build
case = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    same = torch.equal(build()(case["given"]), case["wanted"])
mine = "nampruner" in sys.modules
sys.exit(f"same {same}, imported {mine}" if mine or not same else 0)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pruned(name: str) -> tuple[nn.Module, Tensor]:
    source, channels, size, with_nam = NETWORKS[name]
    torch.manual_seed(0)
    model = models.build(source, num_classes=10, in_channels=channels, image_size=size)
    images = torch.randn(3, channels, size, size)
    if with_nam:
        nampruner.attach_nam(model, images)
    model = lively(model).eval()
    plan = nampruner.plan_pruning(model, images, ratio=0.3, round_to=1, importance="random")
    return nampruner.cut(model, plan), images


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    # what these tests import from a folder would leave a cache in it, whose absence they look at
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def here(folder: Path, inputs: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Stand in for the fresh process, which costs seconds."""
    model = rebuilt(folder)
    with torch.no_grad():
        return [tensors_of(model(*batch)) for batch in batches_of(inputs)]


def rebuilt(folder: Path) -> nn.Module:
    spec = spec_from_file_location("rebuilt", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: nn.Module = module.build()
    return found


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "_run_elsewhere", here)


@pytest.mark.parametrize("name", NETWORKS)
def test_model_py_gives_the_same_bits(name: str, in_process: None, tmp_path: Path) -> None:
    slim, images = pruned(name)
    folder = tmp_path / "out"

    parity = export_python(slim, folder, images)

    assert (parity.max_abs, parity.max_relative, parity.inputs) == (0.0, 0.0, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["model.py", "model.safetensors"]
    again = rebuilt(folder)
    assert not any(module.training for module in again.modules())
    with torch.no_grad():
        assert torch.equal(again(images), slim(images))
    state, wanted = again.state_dict(), slim.state_dict()
    assert {name: state[name].shape for name in wanted} == {n: t.shape for n, t in wanted.items()}
    code = (folder / "model.py").read_text()
    assert not re.search(r"import nampruner|from nampruner|pickle|(?<![.\w])(eval|exec)\(", code)
    assert max(map(len, code.splitlines())) < 180


def test_it_runs_where_nampruner_cannot_be_imported(in_process: None, tmp_path: Path) -> None:
    slim, images = pruned("resnet20 with NAM")
    export_python(slim, tmp_path / "out", images)
    with torch.no_grad():
        torch.save({"given": images, "wanted": slim(images)}, tmp_path / "case.pt")

    done = subprocess.run(
        [sys.executable, "-I", "-c", READ, str(tmp_path / "out"), str(tmp_path / "case.pt")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_the_proof_is_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: ran.append(k) or run(*a, **k))
    inputs = torch.randn(40, 2)

    parity = export_python(nn.Linear(2, 3), tmp_path / "o", inputs, original="nn.Linear(2, 3)")

    assert (parity.inputs, parity.max_abs, len(ran)) == (40, 0.0, 1)


AWKWARD = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, width)
        self.parts = [width // 2, width // 2]
        self.one = nn.Conv2d(width // 2, 4, 1, bias=False)
        self.two = nn.Conv2d(width // 2, 4, 1, bias=False)
        self.two.weight = self.one.weight
        self.up = nn.ConvTranspose2d(4, 5, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("kernel", torch.ones(5, 1, 2, 2) / 4, persistent=False)
        self.head = nn.Linear(5, 3)
        self.dropped = torch.zeros(())

    def forward(self, x):
        a, b = torch.split(self.norm(self.stem(x)), self.parts, 1)
        x = self.up(self.one(a) + self.two(b)) * self.scale.view(1, -1, 1, 1)
        x = F.conv2d(x, self.kernel, groups=len(self.kernel)) + self.dropped
        return self.head(x.mean((2, 3)))


def make(num_classes=3):
    return Net(width=6)
"""


@pytest.fixture
def awkward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's own module, importable for one test."""
    (tmp_path / "awkward.py").write_text(AWKWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "awkward", raising=False)
    yield __import__("awkward")
    sys.modules.pop("awkward", None)


def slimmed(model: nn.Module) -> nn.Module:
    """Cut by hand what no standard layer says."""
    gone = {0: [0, 3]}
    apply_cuts(
        model,
        {
            **{"stem.weight": gone, "norm.weight": gone, "norm.bias": gone, "one.weight": {1: [0]}},
            **{"up.weight": {1: [1]}, "up.bias": {0: [1]}, "head.weight": {1: [1]}},
            **{"kernel": {0: [1]}, "scale": {0: [1]}},
        },
    )
    model.parts = [2, 2]
    model.norm.num_channels = 4
    add_bias(model.stem)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.kernel = torch.rand(4, 1, 2, 2)
    return model.eval()


def test_an_own_network_whose_mechanisms_no_layer_type_tells(
    awkward: Any, in_process: None, tmp_path: Path
) -> None:
    slim, images = slimmed(awkward.Net()), torch.randn(2, 3, 6, 6)

    export_python(slim, tmp_path / "out", images, original="awkward.Net(width=6)")

    again = rebuilt(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(images), slim(images))
    assert again.two.weight is again.one.weight
    assert again.parts == [2, 2]
    assert again.stem.bias is not None
    assert (again.up.in_channels, again.up.out_channels, again.head.in_features) == (4, 4, 4)
    assert "\nimport awkward\n" in (tmp_path / "out" / "model.py").read_text()


def test_weights_that_do_not_fit_are_refused_by_model_py(
    awkward: Any, in_process: None, tmp_path: Path
) -> None:
    images = torch.randn(2, 3, 6, 6)
    export_python(slimmed(awkward.Net()), tmp_path / "a", images, original="awkward.Net()")
    export_python(awkward.Net(), tmp_path / "b", images, original="awkward.Net()")
    (tmp_path / "a" / "model.safetensors").replace(tmp_path / "b" / "model.safetensors")

    with pytest.raises(RuntimeError, match=r"(?s)Unexpected|size mismatch"):
        rebuilt(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_the_model_stay(dtype: torch.dtype, in_process: None, tmp_path: Path) -> None:
    slim, images = pruned("resnet20 with NAM")
    slim, images = slim.to(dtype).train(), images.to(dtype)
    slim.conv1.weight.requires_grad_(False)
    slim.to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}

    export_python(slim, tmp_path / "out", images)

    state = rebuilt(tmp_path / "out").state_dict()
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in before.items()}
    assert state["layer1.0.bn2.nam.channel.removed"].dtype is torch.float64
    assert all(torch.equal(before[name], now) for name, now in slim.state_dict().items())
    assert all(module.training for module in slim.modules())
    assert not slim.conv1.weight.requires_grad
    assert slim.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_several_inputs_and_outputs(in_process: None, tmp_path: Path) -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 5)
    call = "test_export.TwoInTwoOut()"

    assert export_python(TwoInTwoOut(), tmp_path / "out", (x, y), original=call).inputs == 3
    assert export_pt2(TwoInTwoOut(), tmp_path / "m.pt2", (x, y)).max_abs == 0.0
    assert "[N, 4] float32 and [N, 5] float32" in (tmp_path / "out" / "model.py").read_text()


def test_a_users_file_is_copied_and_only_run_when_named(
    awkward: Any, in_process: None, tmp_path: Path
) -> None:
    slim, images = slimmed(awkward.Net()), torch.randn(2, 3, 6, 6)
    source = f"{tmp_path / 'awkward.py'}:make"
    facts = {"num_classes": 3, "in_channels": 3, "image_size": 6}
    remember(slim, source=source, arguments=facts)

    with pytest.raises(NamPrunerError, match="would run code"):
        export_python(slim, tmp_path / "out", images)
    assert not (tmp_path / "out").exists()
    export_python(slim, tmp_path / "out", images, original=source)

    assert (tmp_path / "out" / "original.py").read_text() == AWKWARD
    assert str(tmp_path) not in (tmp_path / "out" / "model.py").read_text()
    (tmp_path / "awkward.py").unlink()
    with torch.no_grad():
        assert torch.equal(rebuilt(tmp_path / "out")(images), slim(images))


def test_what_needs_nampruner_elsewhere_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import nampruner\nfrom torch import nn\n\n\ndef make():\n    return nn.Linear(2, 2)\n"
    )
    model, source = nn.Linear(2, 2), f"{tmp_path / 'net.py'}:make"
    remember(model, source=source, arguments={"num_classes": 2, "in_channels": 2, "image_size": 8})

    with pytest.raises(NamPrunerError, match=r"does not run without nampruner: .*nampruner"):
        export_python(model, tmp_path / "out", torch.randn(2, 2), original=source)

    assert [path.name for path in tmp_path.iterdir() if "net" not in path.name] == []


def foreign_folder(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")


def file_there(model: nn.Module, folder: Path) -> None:
    folder.write_text("dear")


def another_layer(model: nn.Module, folder: Path) -> None:
    model.norm = nn.BatchNorm2d(6)


def layer_more(model: nn.Module, folder: Path) -> None:
    model.more = nn.Identity()


def parameter_less(model: nn.Module, folder: Path) -> None:
    model.head.bias = None


def own_hook(model: nn.Module, folder: Path) -> None:
    model.up.register_forward_hook(lambda module, inputs, output: output * 2)


def tensor_in_an_attribute(model: nn.Module, folder: Path) -> None:
    model.dropped = torch.ones(())


def not_a_number(model: nn.Module, folder: Path) -> None:
    model.head.bias.data[0] = torch.nan


REFUSED = {
    foreign_folder: "holds letter.txt; give another folder",
    file_there: "is a file; give the name of a folder",
    another_layer: "'norm' is a BatchNorm2d, but was a GroupNorm; export onnx or pt2",
    layer_more: "'more' is only in the slim network",
    parameter_less: "head.bias is gone",
    own_hook: "'up' has a forward hook",
    tensor_in_an_attribute: "model.py and PyTorch differ by",
    not_a_number: "differ by nan",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda function: function.__name__)
def test_what_model_py_cannot_say_is_refused(
    spoil: Any, awkward: Any, in_process: None, tmp_path: Path
) -> None:
    model, folder = awkward.Net(), tmp_path / "out"
    spoil(model, folder)
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)

    with pytest.raises(NamPrunerError, match=re.escape(REFUSED[spoil])) as refusal:
        export_python(model, folder, torch.randn(2, 3, 6, 6), original="awkward.Net()")

    assert isinstance(refusal.value, ParityError) == ("differ by" in REFUSED[spoil])
    after = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert after == before


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (None, "pass original="),
        ("awkward.Net", "give a call"),
        ("no_such_package.Net()", "give a call"),
        ("awkward.Net(", "give a call"),
        ("awkward.F.relu(torch.zeros(1))", "gives a Tensor"),
    ],
)
def test_an_original_that_is_none(
    original: str | None, message: str, awkward: Any, tmp_path: Path
) -> None:
    with pytest.raises(NamPrunerError, match=re.escape(message)):
        export_python(awkward.Net(), tmp_path / "out", torch.randn(2, 3, 6, 6), original=original)


def test_an_older_export_stays_until_the_new_one_is_right(
    awkward: Any, in_process: None, tmp_path: Path
) -> None:
    model, images = awkward.Net(), torch.randn(2, 3, 6, 6)
    export_python(model, tmp_path / "out", images, original="awkward.Net()")
    older = (tmp_path / "out" / "model.safetensors").read_bytes()
    model.dropped = torch.ones(())

    with pytest.raises(ParityError):
        export_python(model, tmp_path / "out", images, original="awkward.Net()")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == older
    model.dropped = torch.zeros(())
    nn.init.ones_(model.head.weight)
    export_python(model, tmp_path / "out", images, original="awkward.Net()")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != older


HOSTILE = '"""\nraise SystemExit(1)\n\\" {{ 7 * 7 }} #'


def test_what_a_checkpoint_says_is_data_in_model_py(
    awkward: Any, in_process: None, tmp_path: Path
) -> None:
    said = {"data": HOSTILE, "long": "x" * 500}
    images = torch.randn(2, 3, 6, 6)

    export_python(awkward.Net(), tmp_path / "o", images, original="awkward.Net()", metadata=said)

    assert read_metadata(tmp_path / "o") == said
    assert "x" * 500 not in (tmp_path / "o" / "model.py").read_text()


@pytest.mark.parametrize(
    "value",
    [1, -0.5, True, None, HOSTILE, "γ\u2028", [], (1,), {"a": [1, (2, "b")]}, slice(0, 3)],
)
def test_a_literal_comes_back(value: Any) -> None:
    assert is_literal(value)
    assert eval(literal(value)) == value
    assert type(eval(literal(value))) is type(value)


def test_no_name_or_argument_becomes_code() -> None:
    assert call_of("f.g", 1, a="x") == 'f.g(1, a="x")'
    for name in ("a, *b", "import", "", "x=1)#"):
        with pytest.raises(NamPrunerError, match="no name in Python"):
            call_of("f", **{name: 1})
    for value in (float("inf"), torch.Size([1]), object(), {1, 2}):
        with pytest.raises(NamPrunerError, match="cannot be written"):
            call_of("f", value)


def test_a_program_is_read_at_any_batch_size(tmp_path: Path) -> None:
    slim, images = pruned("resnet20 with NAM")
    images = torch.cat([images, images * 2])
    path = tmp_path / "model.pt2"
    slim.train()

    parity = export_pt2(slim, path, images[:1], inputs=images, metadata={"task": "γ"})

    assert all(module.training for module in slim.modules())
    assert parity.inputs == 6
    assert parity.max_relative <= 1e-6
    program = torch.export.load(path).module()
    with torch.no_grad():
        for batch in (1, 2, 5):
            assert torch.allclose(program(images[:batch]), slim.eval()(images[:batch]))
    assert read_metadata(path) == {"task": "γ"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]


def test_a_hook_is_part_of_the_program_and_no_path_of_the_machine(tmp_path: Path) -> None:
    model, images = hooked(), torch.randn(3, 3, 8, 8)

    assert export_pt2(model, tmp_path / "m.pt2", images).max_relative <= 1e-6

    with torch.no_grad():
        got = torch.export.load(tmp_path / "m.pt2").module()(images)
        assert (got - small().eval()(images)).abs().max() > 0.02
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        for name in archive.namelist():
            assert b"site-packages" not in archive.read(name)
            assert str(Path(__file__).parent).encode() not in archive.read(name)
            assert "draft" not in name


def test_a_wrong_program_is_refused_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, path = torch.export.save, tmp_path / "model.pt2"

    def spoil(program: Any, file: Any, **options: Any) -> None:
        wrong = program.state_dict["0.weight"] * 1.01
        program.state_dict["0.weight"] = nn.Parameter(wrong)
        save(program, file, **options)

    monkeypatch.setattr(torch.export, "save", spoil)
    path.write_bytes(b"older")

    with pytest.raises(ParityError, match=r"the program and PyTorch differ by .* 0.0001 is"):
        export_pt2(small(), path, torch.randn(2, 3, 8, 8))

    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"older"


def test_what_cannot_be_a_program_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NamPrunerError, match="DependsOnValues cannot be exported"):
        export_pt2(DependsOnValues(), tmp_path / "m.pt2", torch.randn(2, 3))
    with pytest.raises(NamPrunerError, match=r"is a folder; .* such as model\.pt2"):
        export_pt2(small(), tmp_path, torch.randn(2, 3, 8, 8))

    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_metadata_of_what_is_no_export(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(NamPrunerError, match="no export of nampruner"):
        read_metadata(tmp_path / "other.zip")
    with pytest.raises(NamPrunerError, match="no export of nampruner"):
        read_metadata(tmp_path)
