"""The ``quartet`` command: ``doctor``, ``explain`` and ``recipes``.

Exit status: 0 well, 1 ``doctor`` found a device without kernels, 2 wrong usage (the message names the nearest
legal value).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from quartet.lowering.recipe import ROLES, Gemm, Operand, Recipe, Rotation
from quartet.recipes import PolicyError, did_you_mean

COMMANDS = ("doctor", "explain", "recipes")
OPTIONS = ("--policy", "--html", "--json", "--dump", "--help")
EQUATIONS = {
    "fprop": ("Y = X · Wᵀ", "in", "X", "W"),
    "dgrad": ("gX = E · W", "out", "E", "W"),
    "wgrad": ("gW = Eᵀ · X", "tokens", "E", "X"),
}


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
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="one row a matmul: recipe and kernel, or why it is left alone")
    explain.add_argument("target", metavar="MODULE:FACTORY",
                         help="function without arguments that returns (model, inputs); inputs is a tuple or a dict")
    explain.add_argument("--policy", metavar="P", help="recipe name or .toml file")
    explain.add_argument("--html", metavar="FILE", type=Path, help="write the table as a page")
    explain.add_argument("--json", metavar="FILE", type=Path, help="write the table as data")
    explain.add_argument("--dump", metavar="DIR", help="write the graphs before and after every pass")
    explain.set_defaults(run=_explain)

    recipes = commands.add_parser("recipes", help="list the recipes, or show one in full")
    recipes.add_argument("name", nargs="?")
    recipes.set_defaults(run=_recipes)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from quartet.doctor import doctor

    text, healthy = doctor()
    print(text)
    return 0 if healthy else 1


def _explain(arguments: argparse.Namespace) -> int:
    from quartet.explain import explain
    from quartet.options import OptionError, Options

    options = {key: value for key in ("policy", "dump") if (value := getattr(arguments, key)) is not None}
    try:
        Options.parse(options=options)
    except (OptionError, PolicyError) as error:
        raise UsageError(str(error)) from None
    for path in filter(None, (arguments.html, arguments.json)):
        if not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: the folder {path.absolute().parent} does not exist; make it first")
    args, kwargs, model = _example(arguments.target)
    report = explain(model, *args, options=options, **kwargs)
    print(report)
    if arguments.html is not None:
        arguments.html.write_text(report.to_html(), encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0


def _example(target: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and model of ``"MODULE:FACTORY"``."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"{target!r} is not MODULE:FACTORY; for example 'my_model:make'")
    made = _factory(_import(module_name), name)()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, Mapping))):
        shape = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise UsageError(f"{target} returned {shape}; expected (model, inputs) with inputs a tuple or a dict, "
                         "for example 'return model, (tokens,)'")
    model, inputs = made
    return ((), dict(inputs), model) if isinstance(inputs, Mapping) else (inputs, {}, model)


def _import(name: str) -> ModuleType:
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


def describe_recipe(recipe: Recipe) -> str:
    """The three GEMMs of a recipe in full, one operand a line."""
    lines = [recipe.name, *(f"  {text}" for text in (recipe.summary, recipe.paper) if text)]
    for role in ROLES:
        equation, axis, a, b = EQUATIONS[role]
        gemm: Gemm | None = getattr(recipe, role)
        lines.append(f"{role}   {equation:<12} contracts {axis}")
        if gemm is None:
            lines.append("  in the model's dtype")
            continue
        lines += [f"  {a:<9} {_operand(gemm.a)}", f"  {b:<9} {_operand(gemm.b)}",
                  f"  {'rotation':<9} {_rotation(gemm.rotation)}"]
    lines.append(f"skips    {', '.join(recipe.skip) or 'no op class'}")
    lines.append("weights  " + ("kept packed for backward" if recipe.keep_weights else "quantised again in backward"))
    if recipe.recompute == "gemm":
        lines.append("output   computed again in backward from the saved codes")
    return "\n".join(lines)


def _operand(operand: Operand) -> str:
    if operand.spec is None:
        return "in the model's dtype"
    return f"{operand.spec}{', from the saved codes of fprop' if operand.source == 'saved' else ''}"


def _rotation(rotation: Rotation | None) -> str:
    if rotation is None:
        return "none"
    if isinstance(rotation.signs, str):
        return f"H{rotation.n}" + (" with fresh random signs" if rotation.signs == "random" else "")
    return f"H{rotation.n} with fixed signs {''.join('+' if s > 0 else '-' for s in rotation.signs)}"
