"""Training on quantised weights alone: integer codes and scales are all that exists of a weight, at any time.

    model = quartet.direct.convert(model, bits="ternary")                            # or 2, 3, 4, 8
    optimizer = quartet.direct.Optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    compiled = torch.compile(model, backend="quartet")
    ...
    quartet.direct.export(model, "model.safetensors")

After DQT (arXiv 2412.04787); ``paper=True`` is its released rule. ``docs/direct.md`` has the arithmetic and results.
"""

from quartet.runtime.direct import (
    SKIPPED,
    BitLinear,
    LowBitWeight,
    Optimizer,
    bitnet,
    broadcast,
    convert,
    export,
    load,
    read,
    ternarize,
    weight_bytes,
    weights,
)

__all__ = ["SKIPPED", "BitLinear", "LowBitWeight", "Optimizer", "bitnet", "broadcast", "convert", "export", "load",
           "read", "ternarize", "weight_bytes", "weights"]
