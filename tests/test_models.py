"""Networks from short texts: built right, recorded, and refused with advice."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock
from zoo import image, lively

from nampruner.checkpoint import save
from nampruner.errors import NamPrunerError
from nampruner.lineage import lineage
from nampruner.models import build, call_user_function, parse_spec
from nampruner.pruning import prune

USER_FILE = """
from torch import nn

def small(num_classes, in_channels, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )

def everything(**facts):
    assert set(facts) == {"num_classes", "in_channels", "image_size"}
    return small(facts["num_classes"], facts["in_channels"])

def not_a_model():
    return 3
"""


def make(spec: str, channels: int = 1, size: int = 28, **more: bool) -> nn.Module:
    return build(spec, num_classes=7, in_channels=channels, image_size=size, **more)


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def expected_resnet_parameters(blocks: int, width: int, channels: int, classes: int) -> int:
    """Count by hand: 3×3 convolutions, two numbers per BN channel, two 1×1 shortcuts, the head."""
    w1, w2, w3 = width, 2 * width, 4 * width
    stem = 9 * channels * w1 + 2 * w1
    same = [(2 * blocks) * (9 * w * w + 2 * w) for w in (w1, w2, w3)]
    wider = [9 * a * b - 9 * b * b + a * b + 2 * b for a, b in ((w1, w2), (w2, w3))]
    return stem + sum(same) + sum(wider) + w3 * classes + classes


@pytest.mark.parametrize(
    ("spec", "blocks", "width"),
    [("resnet20", 3, 16), ("resnet56", 9, 16), ("resnet20?width=8", 3, 8)],
)
def test_built_in_has_the_size_of_the_paper(spec: str, blocks: int, width: int) -> None:
    parameters = sum(p.numel() for p in make(spec).parameters())
    assert parameters == expected_resnet_parameters(blocks, width, channels=1, classes=7)


@pytest.mark.parametrize("depth", [20, 56])
def test_depth_counts_weighted_layers(depth: int) -> None:
    layers = [m for m in make(f"resnet{depth}").modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(layers) - len(shortcuts) == depth


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 33), (1, 8)])
def test_built_in_takes_any_size(channels: int, size: int) -> None:
    model = make("resnet20?width=4", channels, size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)
    assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 9


def test_lineage_builds_the_same_again(user_file: Path) -> None:
    for spec in ("resnet20?width=4", "timm:resnet10t", f"{user_file}:small?width=5"):
        first = lineage(make(spec))
        assert first.arguments == {"num_classes": 7, "in_channels": 1, "image_size": 28}
        again = build(first.source, **first.arguments)
        shapes = [p.shape for p in make(spec).parameters()]
        assert [p.shape for p in again.parameters()] == shapes


def test_lineage_leaves_pretrained_weights_out() -> None:
    spec = parse_spec("timm:resnet18?pretrained=true&drop_rate=0.1")
    assert spec.without({"pretrained"}) == "timm:resnet18?drop_rate=0.1"
    assert lineage(make("timm:resnet10t?pretrained=false")).source == "timm:resnet10t"


def test_arguments_are_yaml() -> None:
    spec = parse_spec("timm:x?a=1&b=1e-3&c=false&d=[2, 2]&e=relu&f=null")
    assert spec.arguments == {"a": 1, "b": 1e-3, "c": False, "d": [2, 2], "e": "relu", "f": None}
    assert (spec.family, spec.name) == ("timm", "x")


def test_timm_passes_arguments_and_size_where_they_fit() -> None:
    model = make("timm:resnet10t?drop_rate=0.25", channels=4)
    assert model.conv1[0].in_channels == 4
    assert model.drop_rate == 0.25
    transformer = make("timm:test_vit", channels=1, size=48)
    assert transformer(torch.randn(1, 1, 48, 48)).shape == (1, 7)


def test_torchvision() -> None:
    model = make("torchvision:mobilenet_v3_small", channels=3, size=32).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_user_file(user_file: Path) -> None:
    assert make(f"{user_file}:small?width=6")[0].out_channels == 6
    assert make(f"{user_file}:everything")[0].out_channels == 4


def test_user_file_runs_only_when_trusted(tmp_path: Path) -> None:
    path = tmp_path / "traps.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef net(): ...")
    with pytest.raises(NamPrunerError, match="--trust-source"):
        make(f"{path}:net", trust_source=False)
    assert not (tmp_path / "ran").exists()


def test_user_file_sees_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("ANSWER = 42")
    path = tmp_path / "asks.py"
    path.write_text("from neighbour_of_mine import ANSWER\ndef ask(): return ANSWER")
    assert call_user_function(f"{path}:ask", trust_source=True, unused=1) == 42


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("resnet18", "Did you mean timm:resnet18"),
        ("resnet2", "resnet20"),
        ("timm:resnot18", "Did you mean timm:resnet18"),
        ("torchvision:resnet_18", "Did you mean torchvision:resnet18"),
        ("tim:resnet18", "Did you mean timm"),
        ("timm:resnet18?x", "key=value"),
        ("timm:resnet18?foo=3", "unexpected keyword argument 'foo'"),
        ("timm:resnet18?num_classes=3", "follows the data"),
        ("resnet20?depth=3", "takes one argument, width"),
        ("resnet20?width=0", "takes one argument, width"),
        ("torchvision:resnet18", "3 channels, the data has 1"),
        ("nowhere.py:net", "there is no file"),
    ],
)
def test_mistakes_are_answered_with_advice(spec: str, advice: str) -> None:
    with pytest.raises(NamPrunerError, match=re.escape(advice)):
        make(spec)


def test_mistakes_in_a_user_file(user_file: Path) -> None:
    with pytest.raises(NamPrunerError, match="Did you mean small"):
        make(f"{user_file}:smal")
    with pytest.raises(NamPrunerError, match=r"gave a int; give an nn\.Module"):
        make(f"{user_file}:not_a_model")


# -- import paths ----------------------------------------------------------------------------------

PACKAGE = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3, *, width=4):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, num_classes, 1)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu()).mean((2, 3))

def make(depth, **facts):
    return nn.Sequential(*(Net(facts["num_classes"], facts["in_channels"]) for _ in range(depth)))

number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in the current folder that nobody has imported."""
    folder = tmp_path / "my_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(PACKAGE)
    (folder / "needy.py").write_text("import a_package_that_nobody_has")
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_class_and_a_function_of_a_package(package: Path) -> None:
    before = list(sys.path)
    assert make("my_package.nets:Net?width=6").conv.out_channels == 6
    assert len(make("my_package.nets:make?depth=2")) == 2
    assert sys.path == before
    found = lineage(make("my_package.nets:Net?width=6"))
    assert found.source == "my_package.nets:Net?width=6"


def test_an_installed_package_is_found_before_the_current_folder(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package.parent / "colorsys.py").write_text("rgb_to_yiq = None")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    found = call_user_function("colorsys:rgb_to_yiq?r=0&g=0&b=0", trust_source=True)
    assert found == (0, 0, 0)


@pytest.mark.parametrize("imported", [False, True])
def test_a_package_is_imported_only_when_trusted(package: Path, imported: bool) -> None:
    if imported:
        make("my_package.nets:Net")
        (package / "ran").unlink()
    with pytest.raises(NamPrunerError, match=r"would run code from my_package\.nets.*trust_s"):
        make("my_package.nets:Net", trust_source=False)
    assert not (package / "ran").exists()
    assert imported or "my_package" not in sys.modules


def test_a_missing_package_of_the_package_is_not_hidden(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        make("my_package.needy:Net")


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("my_package.nets:Nett", "has no function or class 'Nett'; give one it defines. Did you"),
        ("my_package.nets:number", "has no function or class 'number'"),
        ("my_package.net:Net", "there is no module 'my_package.net'"),
        ("my_packages.nets:Net", "there is no module 'my_packages'"),
        ("my_package.nets:make", "missing a required argument: 'depth'; it takes (depth, **facts)"),
        ("my_package.nets:Net?wide=3", "unexpected keyword argument 'wide'"),
        ("my_package.nets:Net?num_classes=3", "follows the data"),
        ("my_package.nets:Path", "gave a PosixPath; give an nn.Module"),
        ("my package:Net", "unknown model source"),
        ("https://host/x:Net", "unknown model source"),
    ],
)
def test_mistakes_in_an_import_path(package: Path, spec: str, advice: str) -> None:
    with pytest.raises(NamPrunerError, match=re.escape(advice)):
        make(spec)


RELOAD = """
import sys, torch, nampruner
from nampruner.errors import CheckpointError
folder, script = sys.argv[1:]
try:
    nampruner.load(folder)
except CheckpointError as error:
    assert "would run code from my_package.nets" in str(error), error
else:
    raise AssertionError("not refused")
assert "my_package" not in sys.modules
model = nampruner.load(folder, trust_source=True)
x, wanted = torch.load(script)
assert torch.equal(model(x), wanted)
"""


def test_a_slim_network_comes_back_in_another_process(package: Path) -> None:
    torch.manual_seed(0)
    model = lively(make("my_package.nets:Net?width=12", 3)).eval()
    x = image()
    slim = prune(model, x, ratio=0.3, round_to=1).model
    assert slim.conv.out_channels < 12
    save(slim, "slim")
    with torch.no_grad():
        torch.save((x, slim(x)), "wanted.pt")
    run = [sys.executable, "-c", RELOAD, "slim", "wanted.pt"]
    subprocess.run(run, check=True)
