"""Training a detector by DDP: two gloo processes on the CPU, started as Ultralytics starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from boxes import SIZE, boxes, tiny
from torch import nn
from zoo import lively

import nampruner
from nampruner import yolo
from nampruner.nam import nam_modules
from nampruner.yolo.library import DetectionTrainer

ON_CPU = """
import os, runpy, sys
import torch
from torch import distributed, nn
from ultralytics.engine import trainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import strip_optimizer, unwrap_model

class OnCPU(nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **given):
        super().__init__(module, **given)

def train(self):
    self.world_size = distributed_size
    self._do_train()

def final_eval(self):  # it asks for a GPU
    if RANK == 0:
        strip_optimizer(self.last)
        strip_optimizer(self.best)

distributed_size = int(os.environ["WORLD_SIZE"])
nn.parallel.DistributedDataParallel = OnCPU
base = trainer.BaseTrainer
base._setup_ddp = lambda self: distributed.init_process_group("gloo")
base.train, base.final_eval = train, final_eval
session = runpy.run_path(sys.argv[1], run_name="__main__")["trainer"]
assert isinstance(session.model, OnCPU)
left = unwrap_model(session.model).state_dict()
torch.save({"kind": type(session).__name__, "left": left}, f"{sys.argv[2]}-{RANK}.pt")
distributed.destroy_process_group()
"""
"""What of Ultralytics asks for GPUs, on the CPU instead; the rest is what it wrote."""


class _Terminal:
    """Bars as a terminal has them: with a lock, which cannot be pickled."""

    def bar(self, name: str, total: int) -> Any:
        from nampruner.console.bars import _Bars

        return _Bars().bar(name, total)

    def note(self, text: str) -> None:
        pass


def test_two_processes_keep_the_network_and_pull_its_factors_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

    monkeypatch.delenv("YOLO_VERBOSE")
    data, ranks = boxes(tmp_path / "boxes"), tmp_path / "rank"
    slim = pruned(f"yolo:{tiny(tmp_path)}")
    (tmp_path / "cpu.py").write_text(ON_CPU)

    def started(session: Any) -> None:
        file = generate_ddp_file(session)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, "-W", "ignore", *launch, str(tmp_path / "cpu.py"), file]
        try:
            done = subprocess.run(
                [*command, str(ranks)], capture_output=True, text=True, env=os.environ.copy()
            )
        finally:
            ddp_cleanup(session, file)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout == ""

    monkeypatch.setattr(DetectionTrainer, "train", started)
    given: dict[str, Any] = {"imgsz": SIZE, "batch": 8, "device": "cpu", "amp": False}
    given |= {"epochs": 1, "lr0": 1e-3, "project": str(tmp_path / "runs")}
    done = yolo.fit(slim, data, yolo.Sparsity(1.0), given, progress=_Terminal())

    first, second = (torch.load(f"{ranks}-{rank}.pt") for rank in (0, 1))
    assert first["kind"] == second["kind"] == "KeepingDetectionTrainer"
    for name, tensor in first["left"].items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(tensor, second["left"][name]), name
    assert {n: t.shape for n, t in first["left"].items()} == {
        n: t.shape for n, t in slim.state_dict().items()
    }
    moved = 1e-3 * 8 / (1 - 0.937)  # one step of lr · p · images / (1 - momentum), from γ = 1
    assert len(nam_modules(done.model)) == len(nam_modules(slim)) > 0
    for name in nam_modules(slim):
        weight = first["left"][f"{name}.bn.weight"]
        torch.testing.assert_close(weight, torch.full_like(weight, 1 - moved), atol=0.02, rtol=0)
    assert [p.shape for p in done.model.parameters()] == [p.shape for p in slim.parameters()]


def pruned(spec: str) -> nn.Module:
    model = nampruner.build(spec, num_classes=3, in_channels=3, image_size=SIZE)
    picture = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    yolo.attach_nam(lively(model).eval(), picture)
    return nampruner.prune(model, picture, forward=yolo.forward, ratio=0.3).model
