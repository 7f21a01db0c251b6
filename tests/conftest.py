"""For all tests: what has to be in place before a test imports anything."""

import importlib.util

import torch


def complete_torchvision() -> None:
    """Define two operators that torchvision describes when it is imported, where it cannot load its own.

    Its wheel fits one build of PyTorch. Beside another the library does not load, and ``import torchvision``, which
    timm and transformers do, ends with "operator torchvision::nms does not exist".
    """
    if importlib.util.find_spec("torchvision") is None or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


KEPT: list[torch.library.Library] = []  # a library that is freed takes its operators with it
complete_torchvision()
