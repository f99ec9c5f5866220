"""python launch.py --experiment=NAME: flags in, a run out.

    python launch.py --experiment=digits_cnn                                train
    python launch.py --experiment=digits_cnn --help                         every flag with its meaning
    python launch.py --experiment=digits_cnn --workdir=DIR --mode=evaluate  the best checkpoint, else the latest
    python launch.py --experiment=digits_cnn --workdir=DIR --mode=replay    the step that was not finite, layer by layer
    python launch.py --experiment=digits_cnn --mode=verify_resume           is a killed run the unbroken one?
    python launch.py --experiment=digits_cnn --sweep=seed=0,1,2             a run a value, and a table
    python launch.py --experiment=digits_cnn --launcher=slurm --time=60     the same as a job of Slurm, an array of jobs
    python launch.py --experiment=digits_cnn --mode=benchmark               what jit, precision, batch and devices give
    python launch.py --experiment=digits_cnn --mode=benchmark --inference   how fast its model answers, batch 1 to 256
    python launch.py --experiment=digits_cnn --mode=profile                 where a step's time goes, and what bounds it
    python launch.py --mode=doctor                                          is this machine fit to train?

Exit codes: 0 done; 1 a run failed, doctor found a fault, or verify_resume no equality; 2 bad input; 128 + n stopped by
signal n and saved.
"""

import datetime
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from jaxcompute import cache, log, stops
from jaxcompute import config as configs
from jaxcompute.errors import BadInput, Elsewhere, line_of

ROOT = Path(__file__).parent / "experiments"

flags.DEFINE_string("experiment", None, "name of a file of experiments/")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "replay", "verify_resume", "doctor", "benchmark", "profile"],
    "train; evaluate the best checkpoint, else the latest; replay the step that was not finite and say what was first; "
    "verify_resume: kill a short run at random and compare it with an unbroken one, bit for bit; "
    "doctor: a page of checks of this machine, each with its mend, and some seconds of measurement; "
    "benchmark: what jit, precision, batch size and devices give this experiment's step; "
    "profile: a trace of a few steps for TensorBoard, time by operation and layer, and what bounds them (roofline)",
)
flags.DEFINE_string("workdir", None, "where the run is left and goes on from; default runs/<experiment>/<time>")
flags.DEFINE_string("data_dir", None, "where data sets are; default $JAXCOMPUTE_DATA_DIR, else in the user's cache")
flags.DEFINE_bool("allow_changes", False, "go on in a work directory with other steps, periods, meshes, code or data")
flags.DEFINE_multi_string("sweep", [], "field=v1,v2: a run for each value; given again, for each combination")
flags.DEFINE_integer("point", None, "of a sweep only this run, counted from 0, as the tasks of an array do", 0)
flags.DEFINE_integer("memory_limit", None, "bytes a device that a run may use; default what the device has", 1)
flags.DEFINE_bool("fit_memory", False, "cut the batch into as few micro-batches (accumulate) as fit the memory")
flags.DEFINE_bool("inference", False, "benchmark: the model's answers in place of its training step")
flags.DEFINE_bool("json", False, "doctor: print JSON")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where a launcher does not tell jax")
flags.DEFINE_integer("processes", None, "how many there are; with --coordinator")
flags.DEFINE_integer("process", None, "which one this is, from 0; with --coordinator")
flags.DEFINE_float("heartbeat_timeout", 100, "seconds after which a process that is dead or stopped ends the run", 10)
flags.DEFINE_float("step_timeout", 600, "seconds a step of several processes may take, else the run ends; 0: any", 0)
flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "slurm: as a job, a sweep as an array, and follow its log")
flags.DEFINE_integer("nodes", 1, "slurm: machines", 1)
flags.DEFINE_integer("gpus_per_node", 0, "slurm: a process for each; 0: no GPUs, and a process a node", 0)
flags.DEFINE_string(
    "time", "60", "slurm: of a turn, MINUTES, H:MM:SS or D-H:MM:SS; a longer run goes on in another turn"
)
flags.DEFINE_multi_string("sbatch", [], "slurm: another option of sbatch, partition=gpu; may be given again")
flags.DEFINE_bool("dry_run", False, "slurm: print the batch script and submit nothing")
OF_SLURM = ("nodes", "gpus_per_node", "time", "sbatch", "dry_run")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    if FLAGS.workdir:
        FLAGS.workdir = os.path.expanduser(FLAGS.workdir)  # no shell does in --workdir=~/runs
    if FLAGS.data_dir:
        os.environ["JAXCOMPUTE_DATA_DIR"] = FLAGS.data_dir
    if FLAGS.mode == "doctor":
        if FLAGS.launcher == "slurm":
            raise BadInput("--mode=doctor looks at this machine: srun python launch.py --mode=doctor looks at another")
        doctor()  # before jax, which may be what is ill
    import jax

    from jaxcompute import distributed, sharding
    from jaxcompute.sweep import grid

    logging.set_verbosity(logging.WARNING)  # jax tells of every backend that it does not find
    if not FLAGS.experiment:
        raise BadInput(f"say which: --experiment=NAME; there are: {', '.join(configs.experiments(ROOT))}")
    if FLAGS.mode in ("evaluate", "replay") and not FLAGS.workdir:
        raise BadInput(f"--mode={FLAGS.mode}: say which run, --workdir=DIR")
    if FLAGS.inference and FLAGS.mode != "benchmark":
        raise BadInput(f"--mode={FLAGS.mode} --inference: inference is measured by --mode=benchmark")
    if FLAGS.mode != "train" and FLAGS.sweep:
        raise BadInput(f"--mode={FLAGS.mode} --sweep: a sweep trains; take its runs one by one, --workdir=DIR")
    if FLAGS.point is not None and not FLAGS.sweep:
        raise BadInput(f"--point={FLAGS.point}: of which sweep? add its --sweep=field=value,value")
    if FLAGS.launcher == "slurm":
        if FLAGS.point is not None:
            raise BadInput(f"--launcher=slurm --point={FLAGS.point}: a job runs all points; narrow the --sweep instead")
        slurm()
    if of_slurm := [f"--{name}" for name in OF_SLURM if FLAGS[name].present and FLAGS[name].value]:
        raise BadInput(f"{' and '.join(of_slurm)}: of a job; add --launcher=slurm")
    limits = FLAGS.heartbeat_timeout, FLAGS.step_timeout
    distributed.start(FLAGS.coordinator, FLAGS.processes, FLAGS.process, *limits)
    if FLAGS.mode == "train" and FLAGS.workdir and not distributed.several():
        log.check_free(Path(FLAGS.workdir))  # told before the experiment is built; `fit` takes the lock
    whole_sweep = FLAGS.sweep and FLAGS.point is None
    alone = ("replay", "verify_resume", "benchmark", "profile")
    if distributed.several() and (whole_sweep or FLAGS.mode in alone):
        raise BadInput(f"a sweep and --mode={', '.join(alone)} are of one process; start it once")
    workdir, point = Path(FLAGS.workdir or distributed.share(new_workdir())), {}
    with distributed.together():
        module = configs.load(FLAGS.experiment, ROOT)
        # of a run that goes on: its config, and the flags that are given
        config = configs.from_flags(module.Config, config_of(workdir, module.Config))
        if FLAGS.point is not None:
            point = grid.point(config, FLAGS.sweep, FLAGS.point)
            own = workdir.name == grid.name(point) and log.read_config(workdir) is not None  # as it told, to go on with
            workdir = workdir if own else workdir / grid.name(point)
            config = configs.replace(configs.from_flags(module.Config, config_of(workdir, module.Config)), point)
    cache.keep()
    jax.config.update("jax_enable_x64", config.precision == "float64")

    if whole_sweep:
        sweep(module, config, workdir)
        return
    if FLAGS.mode == "verify_resume":
        verify_resume()
    with distributed.together():
        sharding.check_batch(sharding.make_mesh(config), config)  # told before any data is read
        exp = module.experiment(config)
    if FLAGS.mode == "train":
        train(exp, workdir, command_again(workdir, point))
        return
    modes = {"evaluate": evaluate, "replay": replay, "benchmark": benchmark, "profile": profile}
    modes[FLAGS.mode](exp, workdir)


def new_workdir() -> str:
    """With the process, as two runs may start in one second."""
    return f"runs/{FLAGS.experiment}/{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def doctor() -> NoReturn:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.folder()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    from jaxcompute.compute import doctor
    from jaxcompute.data import sources

    logging.set_verbosity(logging.WARNING)
    sys.exit(doctor.run(cache.folder(), Path(FLAGS.workdir or "runs"), sources.data_dir(), FLAGS.json))


def config_of(workdir: Path, cls: type):
    """The config of the run that a work directory holds, or None."""
    saved = log.read_config(workdir)
    if saved is None:
        return None
    values, known, mend = saved["config"], configs.fields(cls), "take another --workdir"
    try:
        if saved.get("experiment", FLAGS.experiment) != FLAGS.experiment:
            raise BadInput(f"it is of --experiment={saved['experiment']}, not {FLAGS.experiment}")
        if values.keys() != known.keys():  # the code has gained or lost a field since
            mend = f"--allow_changes goes on with the fields there are, or {mend}"
        if FLAGS.allow_changes:
            values = {name: values.get(name, field.default) for name, field in known.items()}
        return configs.from_json(cls, values)
    except BadInput as error:
        raise BadInput(f"{workdir / 'config.json'}: {error}; {mend}") from None


def command_again(workdir: Path, point: dict[str, str]) -> str:
    """The command that goes on with this run; a point of a sweep goes on as a run of its own."""
    from jaxcompute.sweep import grid

    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
    own = grid.flags_of_children(sys.argv, ("sweep", "point", "workdir"))
    return shlex.join([python, sys.argv[0], *own, *grid.flags(point), f"--workdir={workdir}"])


def train(exp, workdir: Path, again: str) -> None:
    """`again` is the command that goes on with it."""
    import jax

    from jaxcompute import distributed, sharding
    from jaxcompute import train as trainer
    from jaxcompute.compute import energy, memory, peaks

    first = jax.process_index() == 0  # of several processes it alone speaks
    show, say = log.console(exp.steps) if first else (quiet, quiet)
    seen: dict[str, float] = {}

    def write(step: int, values: dict[str, float]) -> None:
        if not values and not sys.stderr.isatty():
            return  # between log periods only a terminal's line moves
        seen.update(values)
        shown = {tag: seen[tag] for tag in ("train/loss", "train/accuracy", "eval/accuracy") if tag in seen}
        show(step, shown, seen.get("perf/examples_per_sec", 0.0))

    try:
        if FLAGS.fit_memory:
            exp = memory.fit(exp, FLAGS.memory_limit, say)
        with energy.meter(sharding.make_mesh(exp.config).local_devices) as joules:
            instruments = trainer.Instruments(peaks.flops, joules, FLAGS.memory_limit)
            options = {"write": write, "say": say, "allow_changes": FLAGS.allow_changes}
            trainer.fit(exp, workdir, instruments=instruments, **options)
    except trainer.OutOfMemory as error:
        if distributed.several():
            raise BadInput(line_of(error)) from None
        raise BadInput(memory.advice(exp, error.with_traceback(None))) from None  # the traceback holds arrays
    except trainer.Recompile as error:
        say(line_of(error))
        sys.exit(1)
    except trainer.Preempted as stop:
        for signum in stops.STOPS:
            signal.signal(signum, signal.SIG_IGN)  # it is on its way out, with the first one's exit code
        say(f"{line_of(stop)}\nto go on: {again}")
        sys.exit(128 + stop.signum)
    except trainer.NonFinite as error:
        say(f"{line_of(error)}; to see where it began: {again} --mode=replay")
        sys.exit(1)
    except OSError as error:  # a full disk, say; what was saved before stands
        say(f"{line_of(error)}; once that is mended, to go on: {again}")
        sys.exit(1)
    if first and exp.classes:
        say(log.evaluation_table(log.read_json(workdir / "evaluation.json") or {}))
    if first:
        say(log.hardware(workdir))
    say(f"to evaluate: {again} --mode=evaluate")


def evaluate(exp, workdir: Path) -> None:
    import jax

    from jaxcompute import train as trainer

    first = jax.process_index() == 0
    found = trainer.evaluate_checkpoint(exp, workdir, print if first else quiet)
    if first:
        print(log.evaluation_table(found))


def say(text: str) -> None:
    """Progress, beside what is printed as the result."""
    print(text, file=sys.stderr, flush=True)


def quiet(*_) -> None:
    """What is said where another process speaks."""


def replay(exp, workdir: Path) -> None:
    from jaxcompute import replay as replayer

    replayer.replay(exp, workdir)


def benchmark(exp, workdir: Path) -> None:
    from jaxcompute.compute import benchmark, inference

    make(workdir)
    if FLAGS.inference:
        answers = inference.run(exp, say)
        print(inference.text(answers))
        leave(exp, workdir, "inference", inference.to_json(answers), lambda: inference.picture(answers))
        return
    found = benchmark.run(exp, say)
    print(benchmark.text(found))
    leave(exp, workdir, "benchmark", benchmark.to_json(found), lambda: benchmark.picture(found))


def profile(exp, workdir: Path) -> None:
    from jaxcompute.compute import profile, roofline

    make(workdir)
    found = profile.run(exp, workdir)
    print(profile.text(found), end="\n\n", flush=True)
    roof = roofline.run(found)
    print(roofline.text(roof))
    facts = profile.to_json(found) | {"roofline": roofline.to_json(roof)}
    leave(exp, workdir, "profile", facts, lambda: roofline.picture(roof))
    print(f"to see the trace: pip install xprof, and tensorboard {shlex.quote(f'--logdir={workdir}')}")


def make(workdir: Path) -> None:
    """Before minutes are spent on what could not be left there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--workdir={workdir}: {error.strerror}; give a folder that can be written") from None


def leave(exp, workdir: Path, name: str, facts: dict, picture) -> None:
    """What was measured, as JSON and as a picture."""
    log.write_json(workdir / f"{name}.json", log.describe(configs.to_json(exp.config), **facts))
    left = [f"{name}.json"]
    try:
        picture().savefig(workdir / f"{name}.png", dpi=120)
        left.append(f"{name}.png")
    except ModuleNotFoundError:
        print("no picture, as matplotlib is not installed: pip install -e '.[notebook]'")
    print(f"left in {workdir}: {', '.join(left)}")


def verify_resume() -> None:
    from jaxcompute import verify

    sys.exit(0 if verify.resume([sys.executable, __file__], sys.argv[1:]) else 1)


def sweep(module, config, workdir: Path) -> None:
    import jax

    from jaxcompute.sweep import grid

    points = grid.points(config, FLAGS.sweep)
    grid.check(workdir, config, points)
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the runs are to have the whole GPU
    best = module.experiment(configs.replace(config, points[0])).best  # without its swept fields it may be none
    command = [sys.executable, __file__, *grid.flags_of_children(sys.argv)]
    sys.exit(grid.run(workdir, command, points, best))


def slurm() -> NoReturn:
    """Submit a job and follow it; or follow the one that this work directory's run is under way in."""
    from jaxcompute.sweep import grid, slurm

    module = configs.load(FLAGS.experiment, ROOT)
    workdir = Path(FLAGS.workdir or new_workdir()).absolute()
    # what is wrong with it is told before a job waits for its turn
    config = configs.from_flags(module.Config, config_of(workdir, module.Config))
    points = grid.points(config, FLAGS.sweep) if FLAGS.sweep else []
    grid.check(workdir, config, points)
    missing = grid.missing(workdir, points)

    folder = workdir / "slurm" / FLAGS.mode
    asked = FLAGS.nodes, FLAGS.gpus_per_node, FLAGS.time, FLAGS.sbatch
    job = slurm.executor(folder, FLAGS.experiment, *asked, missing)
    own = grid.flags_of_children(sys.argv, ("launcher", "workdir", *OF_SLURM))
    command = shlex.join([sys.executable, "-u", os.path.abspath(__file__), *own, f"--workdir={workdir}"])
    if points:
        command += " --point=$SLURM_ARRAY_TASK_ID"
    if FLAGS.dry_run:
        print(job.script(command))
        sys.exit(0)

    def tell(task: slurm.Task) -> None:
        where = grid.name(points[int(task.number)]) if task.number.isdecimal() else task.number
        why = f" ({task.reason})" if task.reason else ""
        say(f"job {number}{where and f', {where}'}: {task.state.lower()}{why}")

    code = None
    if missing or not points:
        number = slurm.submit(job, command, folder)
        logs = f"{number}_*_0_log.out" if points else f"{number}_0_log.out"
        say(f"job {number}, log in {folder / logs}; Ctrl-C leaves it alone")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = slurm.follow(number, tell, None if points else folder / logs)
        except KeyboardInterrupt:
            again = shlex.join([*sys.argv, *([] if FLAGS.workdir else [f"--workdir={workdir}"])])
            say(f"job {number} goes on; to follow it: python {again}; to end it: scancel {number}")
            sys.exit(128 + signal.SIGINT)
    if points:
        sys.exit(grid.finish(workdir, points, module.experiment(configs.replace(config, points[0])).best))
    sys.exit(int(log.read_status(workdir).get("state") != "done") if code is None else code)


def launch() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training sees to it, Ctrl-C ends it at once and without a word
    try:
        name = configs.peek(sys.argv, "experiment")
        if name:
            configs.define_flags(configs.load(name, ROOT).Config)
        app.run(main, flags_parser=lambda argv: configs.parse_flags(argv, __doc__ or ""))
    except BadInput as error:
        print(line_of(error), file=sys.stderr)  # a line, whatever stands in a path
        sys.exit(2)
    except Elsewhere as error:  # told there
        sys.exit(error.code)
    except BrokenPipeError:  # whoever read what we print, head say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    launch()
