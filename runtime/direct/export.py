"""A converted model's state as plain tensors, for files that know no subclass, and its ternary form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quartet.kernels.files import check, expanded, opener
from quartet.kernels.reference.optim import lowbit
from quartet.runtime.direct.convert import check_model, hold, weights
from quartet.runtime.direct.weight import LowBitWeight

FORMAT = "quartet.direct/1"
CODES, SCALE, META = ".codes", ".scale", ".lowbit"
_ACTIVATIONS = ("int8", None)


def export(model: nn.Module, file: str | Path | None = None) -> dict[str, Tensor]:
    """``model.state_dict()`` with each low-bit weight NAME as ``NAME.codes``, ``NAME.scale`` and ``NAME.lowbit``.

    Codes are packed as :func:`quartet.kernels.reference.optim.lowbit.pack` says; ``NAME.lowbit`` is int64 ``[grid, in,
    paper, activations]`` with the grid's place in ternary, 2, 3, 4, 8. Nothing is copied but for a file.

    Args:
        file: also written there, ``.safetensors`` by that package, anything else by ``torch.save``.
    Raises:
        ImportError: a ``.safetensors`` file without the package. OSError: another user's link leads to the file, or it
            cannot be written.
    """
    check_model("export", model)
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, LowBitWeight):
            kind = [list(lowbit.GRIDS).index(value.bits), value.cols, int(value.paper),
                    _ACTIVATIONS.index(value.activations)]
            meta = torch.tensor(kind, dtype=torch.int64, device="cpu")
            found |= {name + CODES: value.codes, name + SCALE: value.scale, name + META: meta}
        elif isinstance(value, Tensor):
            found[name] = value
    if file is not None:
        _write(found, expanded(file))
    return found


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        shared: dict[int, str] = {}
        for name, value in tensors.items():  # the format has no two names for one tensor
            first = shared.setdefault(value.data_ptr(), name) if value.numel() else name
            tensors = tensors if first == name else tensors | {name: value.clone()}
        check(file)
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": FORMAT})
        except SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from None
    else:
        with open(file, "wb", opener=opener) as handle:
            torch.save(tensors, handle)


def read(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """A state dict with low-bit weights, of what :func:`export` returned or wrote. Raises ValueError for other files,
    OSError for one that cannot be read."""
    tensors = dict(source) if isinstance(source, Mapping) else _tensors(expanded(source))
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(META):
            base = name.removesuffix(META)
            found[base] = _weight(base, tensors, value)
        elif not (name.endswith((CODES, SCALE)) and name.rpartition(".")[0] + META in tensors):
            found[name] = value
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    """What an export's file holds."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, ImportError):
        raise
    except Exception as error:  # of a pickle, of an archive or of safetensors
        raise ValueError(f"{file} is no export: it cannot be read as one ({type(error).__name__}); give a file that "
                         "quartet.direct.export wrote") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file} is no export: it does not hold tensors by name; give a file that "
                         "quartet.direct.export wrote")
    return found


def _weight(name: str, tensors: Mapping[str, Tensor], meta: Tensor) -> LowBitWeight:
    if missing := [part for part in (CODES, SCALE) if name + part not in tensors]:
        raise ValueError(f"the export lacks {' and '.join(name + part for part in missing)}")
    kind = meta.tolist()
    if len(kind) != 4 or not (0 <= kind[0] < len(lowbit.GRIDS) and kind[2] in (0, 1) and kind[3] in (0, 1)):
        raise ValueError(f"{name + META} is {kind}; expected [grid 0…{len(lowbit.GRIDS) - 1}, columns, 0 or 1, 0 or 1]")
    grid = list(lowbit.GRIDS.values())[kind[0]]
    codes, scale = tensors[name + CODES], tensors[name + SCALE]
    rows, scales = codes.shape[0], 1 if kind[2] else codes.shape[0]
    dtype = torch.int8 if grid.width == 8 else torch.uint8
    expected = (rows, grid.columns(kind[1]))
    if codes.dtype is not dtype or tuple(codes.shape) != expected or tuple(scale.shape) != (scales,):
        raise ValueError(f"{name}: codes {codes.dtype} {list(codes.shape)} and scales {list(scale.shape)} are not "
                         f"those of {kind[1]} columns of {grid.name} bits, which are {dtype} {list(expected)} and "
                         f"{[scales]}")
    return LowBitWeight(codes, scale, grid.name, kind[1], torch.float32, bool(kind[2]), _ACTIVATIONS[kind[3]])


def load(model: nn.Module, source: Mapping[str, Tensor] | str | Path) -> nn.Module:
    """Fill a model with an export; its linear layers become low-bit where the export's are. The model is returned.

    Raises:
        ValueError, RuntimeError: names or shapes that differ from the model's, or a file that is no export.
        TypeError: no model. OSError: a file that cannot be read.
    """
    check_model("load", model)
    state = read(source)
    own = dict(model.named_parameters())
    low = {name: value for name, value in state.items() if isinstance(value, LowBitWeight)}
    for name, value in low.items():
        target = own.get(name)
        if target is None or tuple(target.shape) != tuple(value.shape):
            there = "no such parameter" if target is None else f"one of shape {list(target.shape)}"
            raise ValueError(f"the export has a low-bit weight {name!r} of shape {list(value.shape)}, the model "
                             f"{there}")
    for name, value in low.items():
        target = own[name]
        path, _, leaf = name.rpartition(".")
        weight = value.with_(value.codes.to(target.device, copy=True), value.scale.to(target.device, copy=True),
                             target.dtype)
        hold(model.get_submodule(path), leaf, weight, target.requires_grad)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def ternarize(model: nn.Module) -> nn.Module:
    """Make every low-bit weight ternary in place, for inference: absmean of its rows, as BitNet does.

    The model is returned. Weights that are ternary already stay.

    Raises:
        ValueError: a model without low-bit weights. TypeError: no model.
    """
    check_model("ternarize", model)
    if not weights(model):
        raise ValueError("the model has no low-bit weight; direct.convert(model, bits='ternary') makes plain ones "
                         "ternary")
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if isinstance(param, LowBitWeight) and param.bits != "ternary":
                made = LowBitWeight.of(param.dequantize(), "ternary", param.paper, param.activations)
                made = made.with_(made.codes, made.scale, param.dtype)
                setattr(module, name, nn.Parameter(made, requires_grad=param.requires_grad))
    return model
