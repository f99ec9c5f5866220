"""Random flags and random images: whatever comes, a line or a right result."""

import io
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxcompute import config
from jaxcompute.data import sources
from jaxcompute.errors import BadInput

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(config.experiments(ROOT / "experiments"))
few = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

# -- flags -------------------------------------------------------------------------------------------------------------

# what a command line can hold: no NUL, and bytes that are no UTF-8 as Python shows them
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
BYTES = st.binary(max_size=6).map(lambda data: data.replace(b"\0", b"").decode(errors="surrogateescape"))
ODD = st.sampled_from(["", "-", "1e999", "0x1", "1,2", "--"])
NUMBER = st.one_of(st.integers().map(str), st.floats().map(str), ODD)
AWKWARD = st.sampled_from(["a\nb", "\r", "\u2028x", "\x1b[2J", "/", ".", "~", "/dev/null"])
VALUE = st.one_of(NUMBER, TEXT, BYTES, AWKWARD)
CONFIG = [f"config.{name}" for name in ("seed", "precision", "batch_size", "features", "dropout", "depth", "", "no")]
FIELDS = st.sampled_from([*CONFIG, "experiment", "mode", "workdir", "data_dir", "flagfile", "undefok", "help", "v"])
SWEPT = st.sampled_from(["seed=", "seed=x", "features=1,1", "speed=1", "=", ""])
FLAG = st.one_of(
    st.builds("--{}={}".format, FIELDS, VALUE),
    st.builds("-{}".format, FIELDS),
    st.builds("--{}={}".format, AWKWARD, VALUE),
    st.builds("--sweep={}".format, SWEPT),
    VALUE,
)


@settings(few, max_examples=150)
@given(name=st.sampled_from([*EXPERIMENTS, ""]), flags=st.lists(FLAG, max_size=4))
def test_any_flags_end_in_help_or_a_line(launcher, tmp_path_factory, name, flags):
    # no run is started: it asks for more devices than there are
    argv = [*([f"--experiment={name}"] if name else []), "--config.mesh_data=4096", *flags]
    here = tmp_path_factory.getbasetemp() / "fuzz"
    here.mkdir(exist_ok=True)
    ended = launcher(*argv, cwd=here)
    told = shlex.join(argv) + "\n" + ended.err
    assert ended.code in (0, 2), told
    if ended.code == 2:
        assert ended.err.count("\n") == 1 and ended.err.strip() and not ended.out, told
    else:
        assert not ended.err and "flags in, a run out" in ended.out, told
    assert not list(here.iterdir()), told


# -- images ------------------------------------------------------------------------------------------------------------


def encoded(kind: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


PICTURES = [encoded("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "1")]
PICTURES += [encoded("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [encoded("WEBP", "RGB"), encoded("BMP", "RGB")]


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A picture with bytes changed, cut out or put in, most often in its head."""
    data = bytearray(draw(st.sampled_from(PICTURES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, 64), st.integers(0, len(data))))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.one_of(st.none(), st.integers(0, len(data))))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    here = tmp_path_factory.mktemp("folders")
    for path in (here / "train/a/good.png", here / "eval/a/good.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(PICTURES[0])
    return here / "train", here / "eval"


@settings(few, max_examples=400)
@given(data=st.one_of(spoiled(), st.binary(max_size=64)), suffix=st.sampled_from([".png", ".jpg", ".webp", ".bmp"]))
@pytest.mark.filterwarnings("default")  # as for a user
def test_any_bytes_are_an_image_or_named(folders, data, suffix):
    given_ = folders[0] / f"a/given{suffix}"
    given_.write_bytes(data)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 200_000
    try:
        dataset = sources.folder(*folders, 16)
    except BadInput as told:
        assert str(given_) in str(told) and "\n" not in str(told)
    else:
        image = dataset.train["image"]
        assert image.shape == (2, 16, 16, 3) and image.dtype == np.uint8
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        given_.unlink()
