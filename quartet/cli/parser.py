"""The arguments of the ``quartet`` command, each with what it does and an example. Nothing here imports PyTorch."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from quartet.cli.usage import UsageError, file

COMMANDS = ("doctor", "explain", "bench", "diff", "suggest", "replay", "recipes", "calibrate", "build", "tune", "cache",
            "selftest")
CACHE_ACTIONS = ("list", "clear")
TARGET = "as if this machine had such a GPU: h100, b200, 'rtx 3090', sm_100a, …"
EXAMPLE = "function without arguments that returns (model, inputs); inputs is a tuple or a dict"
EXAMPLES = {
    "doctor": ["quartet doctor", "quartet doctor --target b200 -v"],
    "explain": ["quartet explain my_model:make", "quartet explain my_model:make --policy fp8 --target h100",
                "quartet explain my_model:make --html model.html --dump graphs"],
    "bench": ["quartet bench my_model:make --policy quartet,fp8", "quartet bench my_model:make --json times.json"],
    "diff": ["quartet explain my_model:make --policy fp8 --json a.json",
             "quartet explain my_model:make --policy quartet --json b.json", "quartet diff a.json b.json"],
    "suggest": ["quartet suggest my_model:make --error 0.1 --target h200",
                "quartet suggest my_model:make --time 70 --target b200 --out policy.toml"],
    "replay": ["quartet replay graphs/graph_000", "quartet replay graphs/graph_000 --inputs inputs.pt"],
    "recipes": ["quartet recipes", "quartet recipes quartet"],
    "calibrate": ["quartet calibrate", "quartet calibrate --out rates.json"],
    "build": ["quartet build --arch b200", "quartet build --arch sm_100a,sm_120a --kinds mxf4 -j 4"],
    "tune": ["quartet tune 8192,4096,4096 8192,14336,4096"],
    "cache": ["quartet cache", "quartet cache clear"],
    "selftest": ["quartet selftest"],
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def parser(version: str) -> argparse.ArgumentParser:
    """What parses a command line into ``command`` and its arguments."""
    made = _Parser(prog="quartet", description="Low-precision training as a compiler pass.", allow_abbrev=False,
                   epilog="`quartet COMMAND --help` has examples.")
    made.add_argument("--version", action="version", version=f"torch-quartet {version}")
    commands = made.add_subparsers(required=True, dest="command", metavar="{" + ",".join(COMMANDS) + "}")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name]))

    doctor = command("doctor", "versions, compilers, devices, and the kernels that serve them")
    doctor.add_argument("--target", metavar="T", help=TARGET)
    doctor.add_argument("-v", "--verbose", action="store_true", help="every kernel and op, with the reasons")
    _json(doctor)

    explain = command("explain", "one row a matmul: recipe and kernel, or why it is left alone")
    explain.add_argument("example", metavar="MODULE:FACTORY", help=EXAMPLE)
    explain.add_argument("--policy", metavar="P", help="recipe name or .toml file")
    explain.add_argument("--target", metavar="T", help=TARGET)
    explain.add_argument("--html", metavar="FILE", type=file, help="write the table as a page")
    _json(explain)
    explain.add_argument("--dump", metavar="DIR", help="write the graphs before and after every pass")

    bench = command("bench", "time a training step of your model under several policies, beside the model as it is")
    bench.add_argument("example", metavar="MODULE:FACTORY", help=EXAMPLE)
    bench.add_argument("--policy", metavar="P,…", default="auto", help="recipe names and .toml files; default: auto")
    bench.add_argument("--steps", metavar="N", type=int, default=20, help="training steps; default: %(default)s")
    bench.add_argument("--lr", metavar="R", type=float, default=1e-3,
                       help="of the AdamW that trains it; default: %(default)s")
    bench.add_argument("--plot", metavar="FILE", type=file, help="draw losses and times (matplotlib)")
    _json(bench)

    diff = command("diff", "what changed between two reports that `quartet explain --json` wrote")
    diff.add_argument("before", metavar="A.json", type=file)
    diff.add_argument("after", metavar="B.json", type=file)
    _json(diff)

    suggest = command("suggest", "propose a recipe for each layer of your model, from its errors and predicted times")
    suggest.add_argument("example", metavar="MODULE:FACTORY", help=EXAMPLE)
    budget = suggest.add_mutually_exclusive_group(required=True)
    budget.add_argument("--error", metavar="E", type=float, help="that no layer may exceed: 0.1; the fastest within it")
    budget.add_argument("--time", metavar="P", type=float,
                        help="percent of the time in the model's dtype; the least error within it")
    suggest.add_argument("--target", metavar="T", help="the GPU that times are predicted for; default: the model's own")
    suggest.add_argument("--out", metavar="FILE", type=file, help="write the policy as TOML")

    replay = command("replay", "run a dumped graph, on your own tensors too, up to the first value that is not finite")
    replay.add_argument("dump", metavar="DUMP", type=file, help="a module of a dump, or the folder of one graph")
    replay.add_argument("--inputs", metavar="FILE", type=file,
                        help="a list of its inputs or a dict of some by name, written by torch.save; default: random")

    recipes = command("recipes", "list the recipes, or show one in full")
    recipes.add_argument("name", nargs="?")
    recipes.add_argument("--markdown", action="store_true", help="tables of the built-in ones, for docs/recipes.md")
    _json(recipes)

    build = command("build", "compile the CUTLASS kernels for Blackwell ahead of time")
    build.add_argument("--arch", metavar="A,…",
                       help="architectures or GPUs, such as sm_100a,sm_120a or b200; default: this machine's")
    _kinds(build)
    build.add_argument("--bias", action="store_true", help="the kernels that add a bias")
    build.add_argument("--accumulate", action="store_true", help="the kernels that add a matrix")
    build.add_argument("-j", "--jobs", metavar="N", type=int,
                       help="at most so many at once; default: the number of processors; never more than memory allows")

    tune = command("tune", "measure which CUTLASS kernel is fastest here, and take it from now on")
    tune.add_argument("shapes", metavar="M,N,K", nargs="+", help="[M, K] × [N, K] → [M, N], such as 8192,4096,4096")
    _kinds(tune)

    calibrate = command("calibrate", "measure how fast this GPU is, and decide by it from now on what the default "
                                     "quantises; for distributed runs with --out")
    calibrate.add_argument("--device", metavar="N", type=int, default=0, help="index of the GPU; default: %(default)s")
    calibrate.add_argument("--seconds", metavar="S", type=float, default=0.4,
                           help="how long each product runs before it is timed, and while it is; default: %(default)s")
    calibrate.add_argument("--out", metavar="FILE", type=file,
                           help="write the rates there and keep none; distributed runs (torchrun) read only the file "
                                "that QUARTET_RATES names")

    cache = command("cache", "list the compiled kernels, or remove them")
    cache.add_argument("action", nargs="?", default="list", metavar="{" + ",".join(CACHE_ACTIONS) + "}")
    cache.add_argument("--rates", action="store_true", help="clear: remove also what `quartet calibrate` measured")
    _json(cache)

    command("selftest", "run the quantisers and products that this machine's GPUs support, and compare them with the "
                        "reference")
    return made


def options(made: argparse.ArgumentParser) -> list[str]:
    """All options of all commands, to tell the nearest to one that does not exist."""
    found = set(made._option_string_actions)
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(inner._option_string_actions for inner in action.choices.values()))
    return sorted(found)


def _json(command: Any) -> None:
    command.add_argument("--json", metavar="FILE", type=file, help="write it as data; - is the standard output, alone")


def _kinds(command: Any) -> None:
    command.add_argument("--kinds", metavar="K,…", default="mxf4,nvf4,mxf8",
                         help="operand formats; default: %(default)s")
    command.add_argument("--output", metavar="O,…", default="bf16", help="dtypes of the product; default: %(default)s")
