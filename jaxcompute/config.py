"""A dataclass of plain values, as absl flags, as JSON and as text: one parser for all three.

An experiment's `Config` is a flat frozen dataclass whose fields are `Annotated[T, "meaning"]`, with T one of int,
float, str, bool, Literal[...] or tuple[T, ...]; a number may have bounds, `Annotated[T, "meaning", Range(ge=1)]`. Each
field becomes the flag `--config.<field>`. Nothing is coerced: 3.5 is no int, nan and inf are no float.
"""

import contextlib
import dataclasses
import difflib
import importlib
import math
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from absl import flags

from jaxcompute.errors import BadInput

PREFIX = "config."
C = TypeVar("C")


# -- fields: what a config is made of ----------------------------------------------------------------------------------


class Range(NamedTuple):
    """Bounds of a number, or of each item of a tuple: >=, >, <=, <."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def admits(self, value: Any) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return all(self.ge <= v <= self.le and self.gt < v < self.lt for v in values)

    def __str__(self) -> str:
        words = zip(("at least", "above", "at most", "below"), self, strict=True)
        return " and ".join(f"{word} {bound}" for word, bound in words if math.isfinite(bound))


class Field(NamedTuple):
    name: str
    kind: Any  # int, float, str, bool, Literal[...] or tuple[T, ...]; inside Annotated[..., Range] where it has bounds
    meaning: str
    default: Any


def fields(cls: type) -> dict[str, Field]:
    """The fields of a Config class by name. Raises BadInput where one lacks its type, meaning or default.

    A field that a subclass gives anew as `epochs: float = 8.0` keeps its meaning and its bounds.
    """
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            if typing.get_origin(hint) is Annotated or hint != getattr(hints.get(name), "__origin__", None):
                hints[name] = hint
    found = {}
    for field in dataclasses.fields(cls):
        where = f"{cls.__module__}.{cls.__name__}.{field.name}"
        hint = hints[field.name]
        if typing.get_origin(hint) is not Annotated or not isinstance(hint.__metadata__[0], str):
            raise BadInput(f'{where}: say what it is: {field.name}: Annotated[type, "meaning"] = default')
        meaning, *bounds = hint.__metadata__
        kind = Annotated[hint.__origin__, bounds[0]] if bounds else hint.__origin__
        try:
            found[field.name] = Field(field.name, kind, meaning, check(kind, field.default))
        except KeyError:
            raise BadInput(f"{where}: {kind} is no int, float, str, bool, Literal[...] or tuple[T, ...]") from None
        except ValueError as error:
            raise BadInput(f"{where}: its default must be {error}") from None
    return found


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,)


def _item(kind: Any) -> Any:
    return typing.get_args(kind)[0]


def allowed(kind: Any) -> str:
    """What a value of this kind may be, in words."""
    if typing.get_origin(kind) is Annotated:
        return f"{allowed(kind.__origin__)} {kind.__metadata__[0]}"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(text(choice) for choice in typing.get_args(kind))
    if _is_tuple(kind):
        return f"a list with commas between, each item {allowed(_item(kind))}"
    return {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}[kind]


def parse(kind: Any, given: str) -> Any:
    """Text to a value. Raises ValueError whose message is what is allowed."""
    if typing.get_origin(kind) is Annotated:
        return _within(kind, parse(kind.__origin__, given))
    if kind is str:
        return given
    if kind is int and re.fullmatch(r"[+-]?[0-9]{1,99}", given):  # Python reads 4,300 digits at most
        return int(given)
    if kind is float and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", given):
        return check(float, float(given))  # 1e999 is inf
    if kind is bool and given.lower() in ("true", "false", "1", "0"):
        return given.lower() in ("true", "1")
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if text(choice) == given:
                return choice
    if _is_tuple(kind):
        with contextlib.suppress(ValueError):  # the message is of the whole list
            return tuple(parse(_item(kind), item) for item in given.split(",")) if given else ()
    raise ValueError(allowed(kind))


def check(kind: Any, value: Any) -> Any:
    """A Python or JSON value as this kind: an int may stand for a float, a list for a tuple. Else ValueError."""
    if typing.get_origin(kind) is Annotated:
        return _within(kind, check(kind.__origin__, value))
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # no nan, no inf
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if type(choice) is type(value) and choice == value:
                return choice
    if _is_tuple(kind) and isinstance(value, list | tuple):
        with contextlib.suppress(ValueError):
            return tuple(check(_item(kind), item) for item in value)
    raise ValueError(allowed(kind))


def _within(kind: Any, value: Any) -> Any:
    if not kind.__metadata__[0].admits(value):
        raise ValueError(allowed(kind))
    return value


def text(value: Any) -> str:
    """A value as the text that `parse` reads back."""
    if isinstance(value, tuple):
        return ",".join(text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- JSON and overrides ------------------------------------------------------------------------------------------------


def to_json(config: Any) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}


def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
    """Raises BadInput on an unknown, missing or wrongly typed key."""
    known = fields(cls)
    for name in values:
        _field(known, name)
    missing = [name for name in known if name not in values]
    if missing:
        raise BadInput(f"the config lacks {', '.join(missing)}")
    return cls(**{name: _convert(check, known[name], value) for name, value in values.items()})


def replace(config: C, overrides: Mapping[str, str]) -> C:
    """The config with some fields read from text. Raises BadInput on an unknown field or a value it cannot take."""
    known = fields(type(config))
    values = {name: _convert(parse, _field(known, name), given) for name, given in overrides.items()}
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def value(cls: type, name: str, given: str) -> Any:
    """One field's value from text, whatever the others are. Raises as `replace`."""
    return _convert(parse, _field(fields(cls), name), given)


def _convert(how: Callable[[Any, Any], Any], field: Field, value: Any) -> Any:
    try:
        return how(field.kind, value)
    except ValueError as error:
        raise BadInput(f"{field.name}={text(value)}: must be {error}") from None


def _field(known: Mapping[str, Field], name: str) -> Field:
    if name not in known:
        raise BadInput(f"the config has no field {name}{did_you_mean(name, known)}; it has {', '.join(known)}")
    return known[name]


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """' (did you mean X?)' or nothing."""
    words = list(words)
    close = [other for other in words if other.endswith("." + word.lstrip("-"))]  # the prefix forgotten
    close = close or difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# -- flags -------------------------------------------------------------------------------------------------------------


class _Parser(flags.ArgumentParser):
    """Ours in place of absl's own, which take nan, hexadecimal and spaces."""

    def __init__(self, kind: Any):
        self.kind = kind
        self.syntactic_help = allowed(kind)

    def parse(self, argument: Any) -> Any:
        try:
            return parse(self.kind, argument) if isinstance(argument, str) else check(self.kind, argument)
        except ValueError as error:
            raise ValueError(f"must be {error}") from None


class _Serializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        return text(value)


def define_flags(cls: type, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define `--config.<field>` for each field of a Config class; of a flag given twice the last counts."""
    for name, kind, meaning, default in fields(cls).values():
        if typing.get_origin(kind) is Literal:
            meaning = f"<{'|'.join(text(choice) for choice in typing.get_args(kind))}>: {meaning}"
        if typing.get_origin(kind) is Annotated:
            meaning = f"{meaning} ({kind.__metadata__[0]})"
        flag = flags.Flag(_Parser(kind), _Serializer(), PREFIX + name, default, meaning, boolean=kind is bool)
        flags.DEFINE_flag(flag, flag_values)


def from_flags(cls: type[C], base: C | None = None, flag_values: flags.FlagValues = flags.FLAGS) -> C:
    """The config that the flags give; with a base, only of those on the command line, and the rest from the base."""
    given = {name: flag_values[PREFIX + name] for name in fields(cls)}
    values = {name: flag.value for name, flag in given.items() if base is None or flag.present}
    return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]


def parse_flags(argv: Sequence[str], usage: str = "", flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """For `app.run(main, flags_parser=...)`. A wrong flag is one line and exit 2; `--help` is short and exit 0.

    Args:
        argv: the program and its arguments.
        usage: printed at the head of `--help`.
    """
    try:
        given = flag_values.read_flags_from_files(argv[1:])
        if {"--help", "-help", "--helpshort", "--helpfull", "-h", "-?"}.intersection(given):
            print(help_text(usage, argv[0], flag_values))
            sys.exit(0)
        left = flag_values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        name, names = f"--{error.flagname}", [f"--{name}" for name in flag_values]
        _refuse(f"unknown flag {name}{did_you_mean(name, names) or '; --help lists them'}")
    except (flags.Error, ValueError) as error:
        _refuse(str(error))
    if left:
        _refuse(f"{left[0]!r} stands without a flag; write --name=value")
    return [argv[0]]


def _refuse(message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def help_text(usage: str, program: str, flag_values: flags.FlagValues = flags.FLAGS) -> str:
    """The experiment's flags, then those the program itself defines; absl's own hundreds stay out."""
    config = [flag_values[name] for name in flag_values if name.startswith(PREFIX)]
    own = [flag for flag in flag_values.get_key_flags_for_module(program) if not flag.name.startswith(PREFIX)]
    flagfile = f"{'  --flagfile=':<34}  read flags from this file, one a line"
    groups = [usage.strip(), "\n".join(map(_flag_help, config)), "\n".join([*map(_flag_help, own), flagfile])]
    return "\n\n".join(group for group in groups if group)


def _flag_help(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, []) else (flag.default_as_str or "").strip("'")
    head = f"  --[no]{flag.name} ({default})" if flag.boolean else f"  --{flag.name}={default}"
    width = max(shutil.get_terminal_size((100, 1)).columns, 60)
    body = textwrap.fill(" ".join(flag.help.split()), width, initial_indent=" " * 36, subsequent_indent=" " * 36)
    return f"{head:<34}  {body.lstrip()}" if len(head) <= 34 else f"{head}\n{body}"


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag before any is defined, out of `--flagfile` files too; of several the last."""
    value = None
    arguments = iter(expand(argv))
    for argument in arguments:
        if argument == "--":
            break
        if argument in (f"--{name}", f"-{name}"):
            value = next(arguments, None)
            if value is None:
                raise BadInput(f"--{name} needs a value: --{name}=...")
        elif argument.startswith((f"--{name}=", f"-{name}=")):
            value = argument.split("=", 1)[1]
    return value


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments after the program, flag files read in."""
    try:
        return flags.FlagValues().read_flags_from_files(argv[1:])
    except UnicodeDecodeError as error:
        named = " ".join(argument for argument in argv[1:] if "flagfile" in argument)
        raise BadInput(f"{named}: {error}; a flag file is UTF-8 text, a flag a line") from None
    except (flags.Error, ValueError) as error:
        raise BadInput(" ".join(str(error).split())) from None


# -- experiments: a name is looked up among the files, never followed as a path ----------------------------------------


def experiments(root: Path) -> dict[str, Path]:
    """Name to file of the experiments in a folder."""
    return {file.stem: file for file in sorted(root.glob("*.py")) if not file.stem.startswith("_")}


def find(name: str, root: Path) -> Path:
    """The file of an experiment. Raises BadInput that lists those there are."""
    there = experiments(root)
    if name not in there:
        raise BadInput(f"no experiment {name!r}{did_you_mean(name, there)}; there are: {', '.join(there) or 'none'}")
    return there[name]


def load(name: str, root: Path) -> ModuleType:
    """Import `experiments.<name>`. Raises BadInput where it is not there or defines no Config and experiment."""
    file = find(name, root)
    module = importlib.import_module(f"{root.name}.{name}")
    for word in ("Config", "experiment"):
        if not hasattr(module, word):
            raise BadInput(f"{file} defines no {word}")
    return module
