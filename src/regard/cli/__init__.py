"""The command line: one thin command a file. Nothing here imports torch before a command runs, so help is quick."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence

__all__ = ["main"]

_COMMANDS = ("compare", "convert", "export", "bench", "simulate", "list", "doctor")
_DESCRIPTION = "Attention in vision: every token looks at the few others that matter."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `regard` and return its exit code: 0, 2 for a wrong call, 130 after Ctrl-C.

    Args:
        arguments: what follows `regard` on the command line; sys.argv's if None.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["--version"], ["-V"]):
        from regard import __version__

        print(f"regard {__version__}")
        return 0
    from regard.studies.settings import SettingsError

    try:
        return _read(arguments or ["--help"])()
    except SystemExit as stop:
        return _code(stop)
    except SettingsError as error:
        print(f"regard {arguments[0]}: {_option(arguments[0], error.setting)}: {error.problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output (head, a pager) has seen enough.
        sys.stderr.close()
        return 0


def _read(arguments: list[str]) -> Callable[[], int]:
    """The command asked for, its options bound.

    Raises:
        SystemExit: for help, and for a wrong call after telling what is wrong.
        SettingsError: an option's value is out of range.
    """
    import tyro

    from regard.cli.bench import Bench
    from regard.cli.compare import Compare
    from regard.cli.convert import Convert
    from regard.cli.doctor import Doctor
    from regard.cli.export import Export
    from regard.cli.listing import List
    from regard.cli.simulate import Simulate

    commands: dict[str, Callable[..., Callable[[], int]]]
    commands = {
        "compare": Compare,
        "convert": Convert,
        "export": Export,
        "bench": Bench,
        "simulate": Simulate,
        "list": List,
        "doctor": Doctor,
    }
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="regard",
                description=f"{_DESCRIPTION} `regard --version` tells the version.",
                args=_repeated(arguments, "--mechanisms"),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if _code(stop) != 0:
            print(_brief(said.getvalue(), arguments), file=sys.stderr)
        raise


def _repeated(arguments: list[str], option: str) -> list[str]:
    """`--option a --option=b` as `--option a b`, which is how tyro reads a sequence."""
    rest: list[str] = []
    values: list[str] = []
    taking = False
    for one in arguments:
        name, equals, value = one.partition("=")
        if name == option:
            taking = True
            values += [value] if equals else []
        elif taking and not one.startswith("-"):
            values.append(one)
        else:
            taking = False
            rest.append(one)
    return [*rest, option, *values] if values or len(rest) < len(arguments) else rest


def _brief(box: str, arguments: list[str]) -> str:
    """tyro's boxed message as one line: what is wrong, and where help stands."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in box.splitlines()]
    # The first line is the box's title, which the text below it repeats.
    text = " ".join(line.strip(" │┃|╭╮╰╯─━") for line in lines[1:])
    text = re.sub(r"(Argument helptext:|For full helptext).*", "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: (\S+)", r"expected a whole number, got \1", text)
    text = re.sub(r"could not convert string to float: (\S+)", r"expected a number, got \1", text)
    text = re.sub(r"Error parsing (--\S+):", r"\1:", " ".join(text.split()))
    command = arguments[0] if arguments and arguments[0] in _COMMANDS else ""
    prog = f"regard {command}".strip()
    return f"{prog}: {text or 'cannot read the options'} (see {prog} --help)"


def _option(command: str, setting: str) -> str:
    """How a setting is written on the command line."""
    positional = {
        ("convert", "model"): "MODEL",
        ("export", "model"): "MODEL",
        ("simulate", "grid"): "GRID",
        ("bench", "operators"): "OPERATOR",
    }
    return positional.get((command, setting)) or f"--{setting.replace('_', '-')}"


def _code(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
