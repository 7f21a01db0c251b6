"""Element formats, op classes, kernels and passes of your own; ``docs/extending.md`` has examples that run."""

from quartet.kernels.element import Element, register_element, unregister_element
from quartet.kernels.extension import ExtensionError
from quartet.lowering.recipe.op_classes import register_op_class, unregister_op_class
from quartet.lowering.registry import Kernel
from quartet.lowering.registry import register as register_kernel
from quartet.lowering.registry import unregister as unregister_kernel
from quartet.passes.pipeline import register as register_pass
from quartet.passes.pipeline import unregister as unregister_pass
from quartet.passes.stage import Stage

__all__ = ["Element", "ExtensionError", "Kernel", "Stage", "register_element", "register_kernel", "register_op_class",
           "register_pass", "unregister_element", "unregister_kernel", "unregister_op_class", "unregister_pass"]
