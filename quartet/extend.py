"""Element formats, op classes and kernels of your own; ``docs/extending.md`` has an example of each that runs."""

from quartet.kernels.element import Element, register_element, unregister_element
from quartet.kernels.extension import ExtensionError
from quartet.lowering.recipe.op_classes import register_op_class, unregister_op_class
from quartet.lowering.registry import Kernel
from quartet.lowering.registry import register as register_kernel
from quartet.lowering.registry import unregister as unregister_kernel

__all__ = ["Element", "ExtensionError", "Kernel", "register_element", "register_kernel", "register_op_class",
           "unregister_element", "unregister_kernel", "unregister_op_class"]
