"""Time and memory of recovery: ResNet-50 at 224 px, against one forward pass over the same images.

    python benchmarks/recovery_time.py [--images 256] [--threads 2]

The images are noise: time and memory do not depend on what they show. Prints one JSON line.
"""

import argparse
import json
import resource
import time

import torch
from torch import nn

from nampruner.models import build
from nampruner.pruning import plan_pruning
from nampruner.recovery import recover
from nampruner.surgery import cut


def lively(model: nn.Module) -> nn.Module:
    """Random BN statistics, as no weights can be had."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.weight.shape
            module.weight.data = torch.rand(size, generator=generator) + 0.5
            module.bias.data = 0.3 * torch.randn(size, generator=generator)
    return model.eval()


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = lively(build("timm:resnet50", num_classes=1000, in_channels=3, image_size=224))
    images = list(torch.randn(options.images, 3, 224, 224).split(16))
    plan = plan_pruning(model, images[0][:1], macs="50%", importance="magnitude")
    slim = cut(model, plan)
    start = time.perf_counter()
    with torch.no_grad():
        for batch in images:
            model(batch)
    forward = time.perf_counter() - start
    before = peak_bytes()
    start = time.perf_counter()
    layers = recover(slim, model, plan, images)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "images": options.images,
                "threads": options.threads,
                "forward_s": round(forward, 1),
                "recover_s": round(seconds, 1),
                "allowed_s": round(3 * forward + 20, 1),
                "more_memory_gb": round((peak_bytes() - before) / 1e9, 2),
                "consumers": len(layers),
            }
        )
    )


if __name__ == "__main__":
    main()
