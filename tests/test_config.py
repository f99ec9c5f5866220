import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from absl import flags

from jaxcompute import config
from jaxcompute.config import Range
from jaxcompute.core import Run
from jaxcompute.errors import BadInput

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Run):
    learning_rate: Annotated[float, "peak"] = 0.1
    depth: Annotated[Literal[20, 32], "layers"] = 20
    widths: Annotated[tuple[int, ...], "units of the hidden layers"] = (64, 32)
    names: Annotated[tuple[str, ...], "classes"] = ()
    flip: Annotated[bool, "mirror half of the images"] = True
    train_dir: Annotated[str, "folder"] = ""
    dropout: Annotated[float, "share", Range(ge=0, lt=1)] = 0.0
    units: Annotated[tuple[int, ...], "of each layer", Range(gt=1, le=8)] = (2,)


def flag_values(cls: type = Config) -> flags.FlagValues:
    values = flags.FlagValues()
    config.define_flags(cls, values)
    return values


def given(*arguments: str) -> Config:
    values = flag_values()
    config.parse_flags(["launch.py", *arguments], flag_values=values)
    return config.from_flags(Config, flag_values=values)


def test_no_flags_give_the_defaults():
    assert given() == Config()


def test_flags_over_the_config_of_a_saved_run():
    saved, values = dataclasses.replace(Config(), seed=5, widths=(1,)), flag_values()
    config.parse_flags(["launch.py", "--config.seed=0"], flag_values=values)  # the default, but said
    assert config.from_flags(Config, saved, values) == dataclasses.replace(saved, seed=0)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--config.learning_rate=3e-2"], "learning_rate", 0.03),
        (["--config.learning_rate", "-0.5"], "learning_rate", -0.5),
        (["-config.learning_rate=.5"], "learning_rate", 0.5),
        (["--config.learning_rate=1", "--config.learning_rate=2"], "learning_rate", 2.0),  # the last counts
        (["--config.depth=32"], "depth", 32),
        (["--config.precision=bfloat16"], "precision", "bfloat16"),
        (["--config.widths=8"], "widths", (8,)),
        (["--config.widths="], "widths", ()),
        (["--config.names=ant,bee"], "names", ("ant", "bee")),
        (["--noconfig.flip"], "flip", False),
        (["--config.flip=false"], "flip", False),
        (["--config.train_dir=3.5"], "train_dir", "3.5"),
        (["--config.train_dir=a=b, c"], "train_dir", "a=b, c"),
        (["--config.dropout=0.999"], "dropout", 0.999),
        (["--config.units=8,2"], "units", (8, 2)),
    ],
)
def test_flag(arguments: list[str], field: str, value: Any):
    config_ = given(*arguments)
    assert getattr(config_, field) == value
    assert type(getattr(config_, field)) is type(value)
    assert config_ == dataclasses.replace(Config(), **{field: value})  # and no other field moved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.seed=3.5"], "flag --config.seed=3.5: must be an integer"),
        (["--config.seed=1_0"], "flag --config.seed=1_0: must be an integer"),
        (["--config.seed= 1"], "flag --config.seed= 1: must be an integer"),
        (["--config.seed=1e3"], "flag --config.seed=1e3: must be an integer"),
        (["--config.learning_rate="], "flag --config.learning_rate=: must be a finite number"),
        (["--config.learning_rate=nan"], "flag --config.learning_rate=nan: must be a finite number"),
        (["--config.learning_rate=1e999"], "flag --config.learning_rate=1e999: must be a finite number"),
        (["--config.flip=maybe"], "flag --config.flip=maybe: must be true or false"),
        (["--noconfig.flip=true"], "--noconfig.flip=true does not take an argument"),
        (["--noconfig.seed"], "unknown flag --noconfig.seed (did you mean --config.seed?)"),
        (["--config.depth=33"], "flag --config.depth=33: must be one of 20, 32"),
        (
            ["--config.widths=1,x"],
            "flag --config.widths=1,x: must be a list with commas between, each item an integer",
        ),
        (["--config.dropout=1"], "flag --config.dropout=1: must be a finite number at least 0 and below 1"),
        (["--config.dropout=-1e-9"], "flag --config.dropout=-1e-9: must be a finite number at least 0 and below 1"),
        (
            ["--config.units=2,9"],
            "flag --config.units=2,9: must be a list with commas between, each item an integer above 1 and at most 8",
        ),
        (
            ["--config.units=1"],
            "flag --config.units=1: must be a list with commas between, each item an integer above 1 and at most 8",
        ),
        (["--config.learning_rat=1"], "unknown flag --config.learning_rat (did you mean --config.learning_rate?)"),
        (["--ema=1"], "unknown flag --ema (did you mean --config.ema?)"),
        (["--zzzzzz=1"], "unknown flag --zzzzzz; --help lists them"),
        (["--config.seed"], "Missing value for flag --config.seed"),
        (["--config.flip", "no"], "'no' stands without a flag; write --name=value"),
        (["--flagfile=/nowhere"], "ERROR:: Unable to open flagfile: [Errno 2] No such file or directory: '/nowhere'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        given(*arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", message + "\n")


def test_launched(tmp_path: Path):
    """Through app.run in a process of its own: help, a wrong flag, a flag file."""
    program = tmp_path / "launch.py"
    program.write_text(
        textwrap.dedent("""
        import dataclasses, functools
        from typing import Annotated
        from absl import app, flags
        from jaxcompute import config

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Config:
            learning_rate: Annotated[float, "peak learning rate", config.Range(ge=0)] = 0.1

        MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "what to do")
        config.define_flags(Config)

        def main(argv):
            print(config.from_flags(Config), MODE.value)

        if __name__ == "__main__":
            app.run(main, flags_parser=functools.partial(config.parse_flags, usage="Trains."))
        """)
    )
    (tmp_path / "flags.txt").write_text("# faster\n--config.learning_rate=3\n--mode=evaluate\n")

    def launch(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, program, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        )
        return done.returncode, done.stdout, done.stderr

    assert launch(f"--flagfile={tmp_path / 'flags.txt'}", "--config.learning_rate=4") == (
        0,
        "Config(learning_rate=4.0) evaluate\n",
        "",
    )
    wrong = "flag --mode=fly: value should be one of <train|evaluate>\n"
    assert launch("--mode=fly") == (2, "", wrong)
    help_ = """\
Trains.

  --config.learning_rate=0.1        peak learning rate (at least 0)

  --mode=train                      <train|evaluate>: what to do
  --flagfile=                       read flags from this file, one a line
"""
    assert launch("--help", "--mode=fly") == (0, help_, "")


def test_json_round_trip():
    import json

    config_ = dataclasses.replace(Config(), widths=(7,), names=("a", "b,c"), learning_rate=1e-7, flip=False, depth=32)
    assert config.from_json(Config, json.loads(json.dumps(config.to_json(config_)))) == config_


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, "the config has no field sede (did you mean seed?)"),
        ({"seed": None}, "seed=None: must be an integer"),
        ({"seed": 1.0}, "seed=1.0: must be an integer"),
        ({"seed": True}, "seed=true: must be an integer"),
        ({"seed": "1"}, "seed=1: must be an integer"),
        ({"flip": 1}, "flip=1: must be true or false"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a finite number"),
        ({"learning_rate": 10**400}, "must be a finite number"),
        ({"depth": 20.0}, "depth=20.0: must be one of 20, 32"),
        ({"widths": [1, 2.0]}, "must be a list with commas between, each item an integer"),
        ({"names": "ab"}, "must be a list"),
        ({"dropout": 1}, "dropout=1: must be a finite number at least 0 and below 1"),
        ({"units": [2, 1]}, "each item an integer above 1 and at most 8"),
    ],
)
def test_json_is_checked(change: dict[str, Any], message: str):
    with pytest.raises(BadInput) as error:
        config.from_json(Config, {**config.to_json(Config()), **change})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_json_lacks_a_field():
    values = config.to_json(Config())
    del values["widths"]
    with pytest.raises(BadInput, match="lacks widths"):
        config.from_json(Config, values)
    assert type(config.from_json(Config, {**values, "widths": [], "learning_rate": 1}).learning_rate) is float


def test_replace_reads_what_text_writes():
    wanted = dataclasses.replace(Config(), widths=(1, 2), flip=False, learning_rate=1e-7, depth=32, precision="float32")
    overrides = {f.name: config.text(getattr(wanted, f.name)) for f in dataclasses.fields(wanted)}
    assert config.replace(Config(), overrides) == wanted
    with pytest.raises(BadInput, match=r"^seed=x: must be an integer$"):
        config.replace(Config(), {"seed": "x"})
    with pytest.raises(BadInput, match=r"^dropout=2: must be a finite number at least 0"):
        config.replace(Config(), {"dropout": "2"})
    with pytest.raises(BadInput, match="no field lr"):
        config.replace(Config(), {"lr": "1"})


def test_a_field_given_anew_keeps_its_meaning_and_its_bounds():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(Config):
        epochs: float = 20.0
        dropout: Annotated[float, "another share"] = 2.0

    base, own = config.fields(Config), config.fields(Longer)
    assert own["epochs"] == base["epochs"]._replace(default=20.0)
    assert (own["dropout"].kind, own["dropout"].meaning) == (float, "another share")
    with pytest.raises(BadInput, match="above 0"):
        config.replace(Longer(), {"epochs": "0"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Config):
        epochs: int = 20

    with pytest.raises(BadInput, match="say what it is"):
        config.fields(Other)


@pytest.mark.parametrize(
    ("hint", "default", "message"),
    [
        (float, 0.1, "Annotated"),
        (Annotated[list[int], "x"], (), "is no int"),
        (Annotated[int | None, "x"], None, "is no int"),
        (Annotated[tuple[int, int], "x"], (1, 2), "is no int"),
        (Annotated[int, "x"], 0.5, "its default must be an integer"),
        (Annotated[int, "x", Range(ge=1)], 0, "its default must be an integer at least 1"),
        (Annotated[int, "x"], dataclasses.MISSING, "its default must be an integer"),
    ],
)
def test_a_field_must_say_what_it_is(hint: Any, default: Any, message: str):
    field = dataclasses.field(default=default)
    cls = dataclasses.make_dataclass("Bad", [("x", hint, field)], kw_only=True)
    with pytest.raises(BadInput, match=message):
        config.define_flags(cls, flags.FlagValues())


def test_peek(tmp_path: Path):
    inner = tmp_path / "inner.txt"
    inner.write_text("--experiment=from_file\n")
    (tmp_path / "outer.txt").write_text(f"# a comment\n--mode=train\n--flagfile={inner}\n")
    file = f"--flagfile={tmp_path / 'outer.txt'}"
    for arguments, value in [
        (["--experiment=x"], "x"),
        (["-experiment=x"], "x"),
        (["--experiment", "x"], "x"),
        (["-experiment", "x", "--mode", "y"], "x"),
        (["--experiment=x=y"], "x=y"),
        (["--experiment=x", "--experiment=y"], "y"),
        ([file], "from_file"),
        (["--experiment", "x", file], "from_file"),
        ([file, "--experiment=x"], "x"),
        (["--", "--experiment=x"], None),
        (["--experiments=x", "--noexperiment"], None),
    ]:
        assert config.peek(["launch.py", *arguments], "experiment") == value, arguments
    for arguments in (["--experiment"], ["--flagfile=/nowhere"]):
        with pytest.raises(BadInput):
            config.peek(["launch.py", *arguments], "experiment")


def test_experiments_are_found_among_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "some_experiments"
    folder.mkdir()
    for file in ("digits_cnn.py", "digits_mlp.py", "_shared.py", "__init__.py", "notes.txt"):
        (folder / file).write_text("")
    (folder / "whole.py").write_text("class Config: ...\ndef experiment(config): ...\n")
    (tmp_path / "outside.py").write_text("raise SystemExit('it was executed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(config.experiments(folder)) == ["digits_cnn", "digits_mlp", "whole"]
    assert config.load("whole", folder).Config.__name__ == "Config"
    with pytest.raises(BadInput, match=r"defines no Config"):
        config.load("digits_cnn", folder)
    for name in ("../outside", "..outside", "outside", "", "whole.py", "_shared", str(folder / "whole")):
        with pytest.raises(BadInput, match=r"there are: digits_cnn, digits_mlp, whole$"):
            config.load(name, folder)
    with pytest.raises(BadInput, match="did you mean digits_cnn"):
        config.find("digit_cnn", folder)
