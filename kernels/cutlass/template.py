"""The C++ source of a configuration: ``block_scaled_gemm.cu.in`` with its names filled in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from string import Template

from quartet.kernels.cutlass.configuration import BLOCK, K_MULTIPLE, N_MULTIPLE, Configuration

TEMPLATE = Path(__file__).with_name("block_scaled_gemm.cu.in")

_OUTPUT = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "fp32": "float"}
_OPERAND = {"mxf4": "cutlass::mx_float4_t<cutlass::float_e2m1_t>",
            "nvf4": "cutlass::nv_float4_t<cutlass::float_e2m1_t>",
            "mxf8": "cutlass::mx_float8_t<cutlass::float_e4m3_t>"}
_ULTRA_OPERAND = {"mxf4": "cute::tuple<cutlass::float_e2m1_t, cutlass::float_ue8m0_t>",
                  "nvf4": "cute::tuple<cutlass::float_e2m1_t, cutlass::float_ue4m3_t>"}
_KIND_IN_TAG = {"mxf4": "Mxf4", "nvf4": "Nvf4", "mxf8": "Mxf8f6f4"}


def render(configuration: Configuration) -> str:
    """The complete source of one kernel; the same text for the same configuration, always."""
    c = configuration
    ultra = c.schedule.endswith("ultra")
    warp_level = c.schedule in ("cooperative", "pingpong")
    multiprocessors = {"1": "1Sm", "2": "2Sm"}.get(c.schedule[0], "")
    if ultra:
        mainloop = f"KernelTmaWarpSpecialized{multiprocessors}BlockScaledMxNvf4UltraVs{BLOCK[c.kind]}Sm103"
    elif warp_level:
        pingpong = "Pingpong" if c.schedule == "pingpong" else ""
        mainloop = f"KernelTmaWarpSpecialized{pingpong}{_KIND_IN_TAG[c.kind]}Sm120"
    else:
        mainloop = f"KernelTmaWarpSpecialized{multiprocessors}{_KIND_IN_TAG[c.kind]}Sm100"
    output = _OUTPUT[c.output]
    source = output if c.accumulate else "void"
    fusion = (f"cutlass::epilogue::fusion::LinCombPerColBias<Output, float, Output, {source}, float>" if c.bias else
              f"cutlass::epilogue::fusion::LinearCombination<Output, float, {source}, float>")
    arguments = ["args.epilogue.thread.beta = 1.0f;", "args.epilogue.ptr_C = static_cast<Output const*>(p.c);"]
    arguments = arguments if c.accumulate else []
    if c.bias:
        arguments.append("args.epilogue.thread.bias_ptr = static_cast<Output const*>(p.bias);")
    return _template().substitute(
        name=c.name, kind=c.kind, block=BLOCK[c.kind],
        arch_tag="Sm103" if ultra else "Sm120" if warp_level else "Sm100",
        operand=(_ULTRA_OPERAND if ultra else _OPERAND)[c.kind], output=output, source=source,
        tile_m=c.tile[0], tile_n=c.tile[1], tile_k=c.tile[2], cluster_m=c.cluster[0], cluster_n=c.cluster[1],
        alignment=K_MULTIPLE[c.kind], output_alignment=N_MULTIPLE[c.output], fusion=fusion, mainloop_schedule=mainloop,
        epilogue_schedule=("collective::EpilogueScheduleAuto" if warp_level else
                           f"TmaWarpSpecialized{multiprocessors}"),
        epilogue_arguments="".join(f"  {line}\n" for line in arguments))


@cache
def _template() -> Template:
    return Template(TEMPLATE.read_text(encoding="utf-8"))
