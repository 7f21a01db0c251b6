"""A torchvision that was built for another PyTorch can be imported."""

import importlib.util
from pathlib import Path

import torch

KEPT: list[torch.library.Library] = []  # a library that is freed takes its operators with it


def complete() -> None:
    """Define two operators that torchvision describes when it is imported, where it cannot load its own.

    Its wheel fits one build of PyTorch. Beside another the library does not load, and ``import torchvision``, which
    timm and transformers do, ends with "operator torchvision::nms does not exist".
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or loads(Path(found.origin).with_name("_C.so")):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


def loads(library: Path) -> bool:
    """Whether a library of operators is there and fits this PyTorch. It is loaded then: two definitions abort."""
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True

