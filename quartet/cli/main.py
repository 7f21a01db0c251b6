"""The ``quartet`` command.

Exit status: 0 well, 1 ``doctor`` found a device without kernels, ``build`` or ``tune`` could not build one,
``calibrate`` could not keep what it measured, ``selftest`` found a wrong kernel, ``bench`` a policy that does not train
or ``replay`` a value that is not finite, or the user's own function or model raised, 2 wrong usage (the message names
the nearest legal value), a file that cannot be written, or no GPU to test, 130 interrupted.
What is typed is checked before PyTorch is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from quartet import __version__
from quartet.cli import usage
from quartet.cli.example import CodeError, factory_of, made_by, running
from quartet.cli.parser import CACHE_ACTIONS, COMMANDS, options, parser
from quartet.cli.usage import UsageError
from quartet.nearest import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default ``sys.argv[1:]``) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
            raise UsageError(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], COMMANDS)}"
                             f"possible: {', '.join(COMMANDS)}")
        made = parser(__version__)
        arguments, rest = made.parse_known_args(argv)
        if rest:
            raise UsageError(f"unknown argument {rest[0]!r}; {did_you_mean(rest[0].split('=')[0], options(made))}"
                             f"'quartet {argv[0]} --help' lists what there is")
        usage.check_output(getattr(arguments, "json", None), stdout=True)
        with _warnings_in_one_line():
            return RUN[arguments.command](arguments)
    except UsageError as error:
        print(f"quartet: {error}", file=sys.stderr)
        return 2
    except CodeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as of a shell
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show this package's warnings without the line of code that warned."""
    shown, ours = warnings.formatwarning, f"{os.path.dirname(__file__).removesuffix('cli')}"

    def formatted(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        return f"warning: {message}\n" if filename.startswith(ours) else shown(
            message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = shown


def _doctor(arguments: argparse.Namespace) -> int:
    usage.check_target(arguments.target)
    from quartet.cli.doctor import doctor
    from quartet.cli.output import show

    found = doctor(arguments.target)
    show(found.text(arguments.verbose), found.as_dict(), arguments.json)
    return 0 if found.healthy else 1


def _explain(arguments: argparse.Namespace) -> int:
    usage.check_example(arguments.example)
    usage.check_policy(arguments.policy)
    usage.check_target(arguments.target)
    usage.check_output(arguments.html)
    usage.check_folder(arguments.dump)
    factory = factory_of(arguments.example)
    from quartet.cli.output import refused, show, terminal_width, write
    from quartet.explain import explain

    chosen = {key: value for key in ("policy", "dump") if (value := getattr(arguments, key)) is not None}
    refused(chosen)
    args, kwargs, model = made_by(arguments.example, factory)
    target = {} if arguments.target is None else {"target": arguments.target}
    report = running(arguments.example, model, args, kwargs,
                     lambda: explain(model, *args, options=chosen, **target, **kwargs))
    show(report.text(terminal_width()), report.to_dict(), arguments.json)
    if arguments.html is not None:
        write(arguments.html, report.to_html())
    return 2 if arguments.dump is not None and report.graphs is None else 0  # a warning has said why


def _bench(arguments: argparse.Namespace) -> int:
    usage.check_example(arguments.example)
    policies = list(dict.fromkeys(arguments.policy.split(",")))
    for policy in policies:
        usage.check_policy(policy)
    if arguments.steps < 2:
        raise UsageError(f"--steps {arguments.steps} is not possible; use 2 or more, of which the first compiles")
    usage.check_positive("--lr", arguments.lr)
    usage.check_plot(arguments.plot)
    factory = factory_of(arguments.example)
    from quartet.cli.bench import bench
    from quartet.cli.output import refused, show

    for policy in policies:
        refused({"policy": policy})
    args, kwargs, model = made_by(arguments.example, factory)
    if not args and not kwargs:
        raise UsageError(f"{arguments.example} gives no inputs to train with")
    found = bench(model, args, kwargs, policies, arguments.steps, arguments.lr)
    show(found.text(), found.as_dict(), arguments.json)
    if arguments.plot is not None:
        try:
            found.plot(arguments.plot)
        except OSError as error:
            raise UsageError(f"cannot write {arguments.plot}: {error.strerror or error}") from None
    return 1 if any(run.failure for run in found.runs) else 0


def _diff(arguments: argparse.Namespace) -> int:
    before, after = (usage.read_json(path, usage.REPORT, "matmuls") for path in (arguments.before, arguments.after))
    from quartet.cli.output import report_of, show

    difference = report_of(after, arguments.after) - report_of(before, arguments.before)
    show(str(difference), difference.to_dict(), arguments.json)
    return 0


def _suggest(arguments: argparse.Namespace) -> int:
    usage.check_example(arguments.example)
    usage.check_positive("--error", arguments.error)
    usage.check_positive("--time", arguments.time)
    usage.check_target(arguments.target)
    usage.check_output(arguments.out)
    factory = factory_of(arguments.example)
    from quartet.cli.output import write
    from quartet.inspect.suggest import suggest

    args, kwargs, model = made_by(arguments.example, factory)
    budget = arguments.error if arguments.time is None else f"{arguments.time}%"
    try:
        found = running(arguments.example, model, args, kwargs,
                        lambda: suggest(model, [kwargs or args], budget, target=arguments.target))
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(found)
    if arguments.out is not None:
        write(arguments.out, found.policy.to_toml())
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    if not arguments.dump.exists():
        raise UsageError(f"no file or folder {arguments.dump}")
    if arguments.inputs is not None:
        usage.check_input(arguments.inputs)
    from quartet.cli.output import read_tensors
    from quartet.inspect.replay import ReplayError, replay

    given = None if arguments.inputs is None else read_tensors(arguments.inputs)
    try:
        found = replay(arguments.dump, given)
    except ReplayError as error:
        raise UsageError(str(error)) from None
    print(found)
    return 0 if found.bad is None else 1


def _recipes(arguments: argparse.Namespace) -> int:
    if arguments.name is not None and arguments.name not in usage.RECIPES:
        raise UsageError(f"unknown recipe {arguments.name!r}; {did_you_mean(arguments.name, usage.RECIPES)}"
                         f"possible: {', '.join(usage.RECIPES)}")
    if arguments.markdown and (arguments.name or arguments.json):
        raise UsageError("--markdown is of all the built-in recipes together: give neither a name nor --json with it")
    from quartet.cli.describe import as_data, describe_recipe, listing
    from quartet.cli.output import show
    from quartet.recipes import recipes

    known = recipes()
    if arguments.markdown:
        from quartet.cli.recipe_table import markdown

        print(markdown(), end="")
        return 0
    if arguments.name is None:
        show(listing(known), [as_data(recipe) for recipe in known.values()], arguments.json)
    else:
        show(describe_recipe(known[arguments.name]), as_data(known[arguments.name]), arguments.json)
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from quartet.kernels.cutlass.configuration import ARCHS, KINDS, OUTPUTS, table

    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs} is not possible; use 1 or more")
    kinds = usage.names("--kinds", arguments.kinds, KINDS)
    outputs = usage.names("--output", arguments.output, OUTPUTS)
    archs = _present_archs() if arguments.arch is None else usage.archs(arguments.arch, ARCHS)
    from quartet.cli.kernel_commands import build_kernels

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
    from quartet.kernels.cutlass.configuration import KINDS, OUTPUTS, arch_of, supports

    kinds = usage.names("--kinds", arguments.kinds, KINDS)
    outputs = usage.names("--output", arguments.output, OUTPUTS)
    products = [(kind, output, usage.shape(text)) for text in arguments.shapes for kind in kinds for output in outputs]
    for kind, output, shape in products:
        if (reason := supports(kind, *shape, output)) is not None:
            raise UsageError(reason)
    import torch

    from quartet.cli.kernel_commands import tune_products
    from quartet.runtime.devices import absent

    device = torch.device("cuda", 0)
    missing = absent(device)
    if missing is None and arch_of(torch.cuda.get_device_capability(device)) is None:
        missing = f"this one is {torch.cuda.get_device_name(device)}"
    if missing is not None:
        raise UsageError(f"tune measures kernels on a Blackwell GPU, but {missing}")
    return tune_products(products, device)


def _calibrate(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.seconds <= 60:
        raise UsageError(f"--seconds {arguments.seconds} is not possible; use more than 0 and at most 60")
    if arguments.device < 0:
        raise UsageError(f"--device {arguments.device} is not possible; use 0 or more")
    usage.check_output(arguments.out)
    import torch

    from quartet.cli.calibrate import calibrate
    from quartet.lowering.rates.kept import unfit
    from quartet.runtime.devices import Target

    device = torch.device("cuda", arguments.device)
    if (reason := unfit(Target.of(device))) is not None:
        raise UsageError(f"`quartet calibrate` cannot measure this device: {reason}")
    return calibrate(device, arguments.seconds, arguments.out)


def _cache(arguments: argparse.Namespace) -> int:
    if arguments.action not in CACHE_ACTIONS:
        near = did_you_mean(arguments.action, CACHE_ACTIONS)
        raise UsageError(f"unknown action {arguments.action!r} of cache; {near}possible: {', '.join(CACHE_ACTIONS)}")
    if arguments.rates and arguments.action != "clear":
        raise UsageError("--rates goes with clear: `quartet cache clear --rates`")
    if arguments.json is not None and arguments.action != "list":
        raise UsageError("--json goes with list: `quartet cache list --json FILE`")
    from quartet.cli.kernel_commands import cache_data, clear_cache, list_cache
    from quartet.cli.output import show
    from quartet.kernels.build_cache import BuildError

    try:
        if arguments.action == "clear":
            print(clear_cache(arguments.rates))
        else:
            show(list_cache(), cache_data(), arguments.json)
    except BuildError as error:
        print(f"quartet: {error}", file=sys.stderr)
        return 1
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    import torch

    from quartet.cli.selftest.run import checks_of, selftest
    from quartet.runtime.devices import absent

    missing = absent(torch.device("cuda"))
    if missing is not None:
        raise UsageError(f"selftest compares the kernels of a GPU with the reference, but {missing}")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    print("quartet: compiling kernels and comparing them with the reference: minutes, the first time on a machine",
          file=sys.stderr)
    text, healthy = selftest(devices, checks_of)
    print(text)
    return 0 if healthy else 1


RUN: Mapping[str, Callable[[Any], int]] = {
    "doctor": _doctor, "explain": _explain, "bench": _bench, "diff": _diff, "suggest": _suggest,
    "replay": _replay, "recipes": _recipes, "build": _build, "tune": _tune, "calibrate": _calibrate, "cache": _cache,
    "selftest": _selftest,
}
