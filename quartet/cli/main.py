"""The ``quartet`` command: ``doctor``, ``explain``, ``recipes``, ``calibrate``, ``build``, ``tune``, ``cache`` and
``selftest``.

Exit status: 0 well, 1 ``doctor`` found a device without kernels, ``build`` or ``tune`` could not build one,
``calibrate`` could not keep what it measured or ``selftest`` found a wrong kernel, 2 wrong usage (the message names the
nearest legal value) or no GPU to test.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from quartet.cli.describe import describe_recipe
from quartet.lowering.recipe.types import Recipe
from quartet.recipes import PolicyError, did_you_mean

COMMANDS = ("doctor", "explain", "recipes", "calibrate", "build", "tune", "cache", "selftest")
OPTIONS = ("--policy", "--html", "--json", "--dump", "--target", "--arch", "--kinds", "--output", "--bias",
           "--accumulate", "--jobs", "--device", "--seconds", "--out", "--rates",
           "--help")
CACHE_ACTIONS = ("list", "clear")


class UsageError(Exception):
    """What the user typed cannot be done; the message says what could."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default ``sys.argv[1:]``) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
            raise UsageError(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], COMMANDS)}"
                             f"possible: {', '.join(COMMANDS)}")
        arguments, rest = _parser().parse_known_args(argv)
        if rest:
            raise UsageError(f"unknown argument {rest[0]!r}; {did_you_mean(rest[0].split('=')[0], OPTIONS)}"
                             f"'quartet {argv[0]} --help' lists what there is")
        return arguments.run(arguments)
    except UsageError as error:
        print(f"quartet: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="quartet", description="Low-precision training as a compiler pass.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")

    doctor = commands.add_parser("doctor", help="versions, compilers, devices, and the kernels that serve them")
    doctor.add_argument("--target", metavar="T", help="as if this machine had such a GPU: b200, 'rtx 3090', sm_100a, …")
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="one row a matmul: recipe and kernel, or why it is left alone")
    explain.add_argument("example", metavar="MODULE:FACTORY",
                         help="function without arguments that returns (model, inputs); inputs is a tuple or a dict")
    explain.add_argument("--policy", metavar="P", help="recipe name or .toml file")
    explain.add_argument("--target", metavar="T",
                         help="as if the tensors were on such a GPU: b200, 'rtx 3090', sm_100a, …")
    explain.add_argument("--html", metavar="FILE", type=Path, help="write the table as a page")
    explain.add_argument("--json", metavar="FILE", type=Path, help="write the table as data")
    explain.add_argument("--dump", metavar="DIR", help="write the graphs before and after every pass")
    explain.set_defaults(run=_explain)

    recipes = commands.add_parser("recipes", help="list the recipes, or show one in full")
    recipes.add_argument("name", nargs="?")
    recipes.add_argument("--markdown", action="store_true", help="tables of the built-in ones, for docs/recipes.md")
    recipes.set_defaults(run=_recipes)

    build = commands.add_parser("build", help="compile the CUTLASS kernels for Blackwell ahead of time")
    build.add_argument("--arch", metavar="A,…", help="architectures, such as sm_100a,sm_120a; default: this machine's")
    build.add_argument("--kinds", metavar="K,…", default="mxf4,nvf4,mxf8", help="operand formats; default: %(default)s")
    build.add_argument("--output", metavar="O,…", default="bf16", help="dtypes of the product; default: %(default)s")
    build.add_argument("--bias", action="store_true", help="the kernels that add a bias")
    build.add_argument("--accumulate", action="store_true", help="the kernels that add a matrix")
    build.add_argument("-j", "--jobs", metavar="N", type=int,
                       help="at most so many at once; default: the number of processors; never more than memory allows")
    build.set_defaults(run=_build)

    tune = commands.add_parser("tune", help="measure which CUTLASS kernel is fastest here, and take it from now on")
    tune.add_argument("shapes", metavar="M,N,K", nargs="+", help="[M, K] × [N, K] → [M, N], such as 8192,4096,4096")
    tune.add_argument("--kinds", metavar="K,…", default="mxf4,nvf4,mxf8", help="operand formats; default: %(default)s")
    tune.add_argument("--output", metavar="O,…", default="bf16", help="dtypes of the product; default: %(default)s")
    tune.set_defaults(run=_tune)

    calibrate = commands.add_parser("calibrate", help="measure how fast this GPU is, and decide by it from now on what "
                                                      "the default quantises; for distributed runs with --out")
    calibrate.add_argument("--device", metavar="N", type=int, default=0, help="index of the GPU; default: %(default)s")
    calibrate.add_argument("--seconds", metavar="S", type=float, default=0.4,
                           help="how long each product runs before it is timed, and while it is; default: %(default)s")
    calibrate.add_argument("--out", metavar="FILE", type=Path,
                           help="write the rates there and keep none; distributed runs (torchrun) read only the file "
                                "that QUARTET_RATES names")
    calibrate.set_defaults(run=_calibrate)

    cache = commands.add_parser("cache", help="list the compiled kernels, or remove them")
    cache.add_argument("action", nargs="?", default="list", metavar="{" + ",".join(CACHE_ACTIONS) + "}")
    cache.add_argument("--rates", action="store_true", help="clear: remove also what `quartet calibrate` measured")
    cache.set_defaults(run=_cache)

    selftest = commands.add_parser("selftest", help="run the quantisers and products that this machine's GPUs "
                                                    "support, and compare them with the reference")
    selftest.set_defaults(run=_selftest)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from quartet.cli.doctor import doctor

    _check_target(arguments.target)
    text, healthy = doctor(arguments.target)
    print(text)
    return 0 if healthy else 1


def _check_target(name: str | None) -> None:
    from quartet.runtime.devices import Target

    try:
        if name is not None:
            Target.named(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _explain(arguments: argparse.Namespace) -> int:
    from quartet.explain import explain
    from quartet.options import OptionError, Options

    options = {key: value for key in ("policy", "dump") if (value := getattr(arguments, key)) is not None}
    try:
        Options.parse(options=options)
    except (OptionError, PolicyError) as error:
        raise UsageError(str(error)) from None
    for path in filter(None, (arguments.html, arguments.json)):
        _check_output(path)
    _check_target(arguments.target)
    args, kwargs, model = _example(arguments.example)
    target = {} if arguments.target is None else {"target": arguments.target}
    report = explain(model, *args, options=options, **target, **kwargs)
    print(report)
    if arguments.html is not None:
        _write(arguments.html, report.to_html())
    if arguments.json is not None:
        _write(arguments.json, json.dumps(report.to_dict(), indent=1) + "\n")
    return 0


def _check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before any work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: the folder {folder} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {path}: you may not write there; name a file in a folder of yours")


def _write(path: Path, text: str) -> None:
    from quartet.kernels.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def _example(target: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and model of ``"MODULE:FACTORY"``."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"{target!r} is not MODULE:FACTORY; for example 'my_model:make'")
    factory = _factory(_import(module_name), name)
    _check_callable(target, factory)
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, Mapping))):
        shape = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise UsageError(f"{target} returned {shape}; expected (model, inputs) with inputs a tuple or a dict, "
                         "for example 'return model, (tokens,)'")
    model, inputs = made
    return ((), dict(inputs), model) if isinstance(inputs, Mapping) else (inputs, {}, model)


def _check_callable(target: str, factory: Callable[[], Any]) -> None:
    """Refuse a factory that needs arguments."""
    try:
        parameters = inspect.signature(factory)
    except (TypeError, ValueError):  # of a builtin that does not say
        return
    try:
        parameters.bind()
    except TypeError as error:
        raise UsageError(f"{target} takes {parameters} and is called without arguments: {error}; give them defaults, "
                         "or name a function that needs none") from None


def _import(name: str) -> ModuleType:
    if not all(name.split(".")):
        raise UsageError(f"{name!r} is not a module's name: write it from {os.getcwd()} or the Python path on, with a "
                         "dot between folders, for example 'package.my_model'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise
        parent = Path(*name.split(".")[:-1])
        beside = [".".join((*parent.parts, path.stem)) for path in sorted(parent.iterdir())
                  if path.suffix == ".py" or (path / "__init__.py").exists()] if parent.is_dir() else []
        raise UsageError(f"no module {name!r} (searched {os.getcwd()} and the Python path); "
                         f"{did_you_mean(name, beside)}write it with dots and without '.py'") from None


def _factory(module: ModuleType, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
    wrong = f"is not a function but {type(found).__name__}" if found is not None else "does not exist"
    raise UsageError(f"{name!r} {wrong} in module {module.__name__}; {did_you_mean(name, own)}"
                     f"possible: {', '.join(own) or 'nothing, it defines no function'}")


def _recipes(arguments: argparse.Namespace) -> int:
    from quartet.recipes import recipes

    known: Mapping[str, Recipe] = recipes()
    if arguments.markdown:
        from quartet.cli.recipe_table import markdown

        print(markdown(), end="")
        return 0
    if arguments.name is None:
        width = max(map(len, known))
        for recipe in known.values():
            print(f"{recipe.name:<{width}}  {recipe.summary}")
            if recipe.paper:
                print(f"{'':<{width}}  {recipe.paper}")
        return 0
    if arguments.name not in known:
        raise UsageError(f"unknown recipe {arguments.name!r}; {did_you_mean(arguments.name, known)}"
                         f"possible: {', '.join(known)}")
    print(describe_recipe(known[arguments.name]))
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from quartet.cli.kernel_commands import build_kernels
    from quartet.kernels.cutlass.configuration import ARCHS, KINDS, OUTPUTS, table

    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs} is not possible; use 1 or more")
    archs = _present_archs() if arguments.arch is None else _names("--arch", arguments.arch, ARCHS)
    kinds = _names("--kinds", arguments.kinds, KINDS)
    outputs = _names("--output", arguments.output, OUTPUTS)
    return build_kernels([configuration for output in outputs for configuration in
                          table(archs, kinds, output, arguments.bias, arguments.accumulate)], arguments.jobs)


def _present_archs() -> list[str]:
    import torch

    from quartet.kernels.cutlass.configuration import ARCHS, arch_of

    devices = range(torch.cuda.device_count())
    found = dict.fromkeys(arch for i in devices if (arch := arch_of(torch.cuda.get_device_capability(i))))
    if not found:
        raise UsageError(f"this machine has no Blackwell GPU; say what to build for with --arch: {', '.join(ARCHS)}")
    return list(found)


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    from quartet.cli.kernel_commands import tune_products
    from quartet.kernels.cutlass.configuration import KINDS, OUTPUTS, arch_of, supports
    from quartet.runtime.devices import absent

    kinds, outputs = _names("--kinds", arguments.kinds, KINDS), _names("--output", arguments.output, OUTPUTS)
    products = [(kind, output, _shape(text)) for text in arguments.shapes for kind in kinds for output in outputs]
    for kind, output, shape in products:
        if (reason := supports(kind, *shape, output)) is not None:
            raise UsageError(reason)
    device = torch.device("cuda", 0)
    missing = absent(device)
    if missing is None and arch_of(torch.cuda.get_device_capability(device)) is None:
        missing = f"this one is {torch.cuda.get_device_name(device)}"
    if missing is not None:
        raise UsageError(f"tune measures kernels on a Blackwell GPU, but {missing}")
    return tune_products(products, device)


def _calibrate(arguments: argparse.Namespace) -> int:
    import torch

    from quartet.cli.calibrate import calibrate
    from quartet.lowering.rates.kept import unfit
    from quartet.runtime.devices import Target

    if not 0 < arguments.seconds <= 60:
        raise UsageError(f"--seconds {arguments.seconds} is not possible; use more than 0 and at most 60")
    if arguments.device < 0:
        raise UsageError(f"--device {arguments.device} is not possible; use 0 or more")
    device = torch.device("cuda", arguments.device)
    if (reason := unfit(Target.of(device))) is not None:
        raise UsageError(f"`quartet calibrate` cannot measure this device: {reason}")
    if arguments.out is not None:
        _check_output(arguments.out)
    return calibrate(device, arguments.seconds, arguments.out)


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{text!r} is not M,N,K; for example 8192,4096,4096")
    m, n, k = map(int, parts)
    return m, n, k


def _names(option: str, text: str, legal: Sequence[str]) -> list[str]:
    """The parts of a comma-separated list, each one of ``legal``."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in legal:
            raise UsageError(f"{option} {name!r} does not exist; {did_you_mean(name, legal)}"
                             f"possible: {', '.join(legal)}")
    return names


def _cache(arguments: argparse.Namespace) -> int:
    from quartet.cli.kernel_commands import clear_cache, list_cache
    from quartet.kernels.build_cache import BuildError

    if arguments.action not in CACHE_ACTIONS:
        near = did_you_mean(arguments.action, CACHE_ACTIONS)
        raise UsageError(f"unknown action {arguments.action!r} of cache; {near}possible: {', '.join(CACHE_ACTIONS)}")
    if arguments.rates and arguments.action != "clear":
        raise UsageError("--rates goes with clear: `quartet cache clear --rates`")
    try:
        print(list_cache() if arguments.action == "list" else clear_cache(arguments.rates))
    except BuildError as error:
        print(f"quartet: {error}", file=sys.stderr)
        return 1
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    import torch

    from quartet.cli.selftest import checks_of, selftest
    from quartet.runtime.devices import absent

    missing = absent(torch.device("cuda"))
    if missing is not None:
        raise UsageError(f"selftest compares the kernels of a GPU with the reference, but {missing}")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    text, healthy = selftest(devices, checks_of)
    print(text)
    return 0 if healthy else 1
