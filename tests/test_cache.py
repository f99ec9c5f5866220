import pytest
from jax._src import compilation_cache

from jaxcompute import cache, checkpoint

SMALL = ["--experiment=digits_mlp", "--config.features=16", "--config.steps=4"]


@pytest.mark.parametrize("length", [0, 100])
def test_a_torn_entry_is_written_anew_and_told_once(launcher, tmp_path, length):
    folder = tmp_path / "cache"

    def run(name: str):
        ended = launcher(*SMALL, f"--workdir={tmp_path / name}", cwd=tmp_path, JAX_COMPILATION_CACHE_DIR=str(folder))
        assert ended.code == 0, ended
        return ended

    first = run("first")
    whole = {file.name: file.stat().st_size for file in folder.iterdir()}
    (torn,) = folder.glob("jit_call-*")
    torn.write_bytes(torn.read_bytes()[:length])
    second = run("second")
    assert f"compile cache: {torn} was torn and is written anew\n" in second.err
    assert "persistent" not in second.err  # jax's own warning
    assert {file.name for file in folder.iterdir()} == whole.keys() and torn.stat().st_size > whole[torn.name] // 2
    third = run("third")
    assert "cache" not in first.err + third.err
    assert len({checkpoint.manifest(tmp_path / name / "checkpoints", 4)["digest"] for name in ("first", "third")}) == 1


def test_an_entry_that_another_process_is_just_writing_is_left_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilation_cache, "LRUCache", compilation_cache.LRUCache)  # put back what `keep` sets
    cache.keep()
    kept = compilation_cache.LRUCache(str(tmp_path), max_size=-1)
    own, other = map(compilation_cache.compress_executable, [b"compiled here", b"compiled there"])
    entry = tmp_path / "jit_call-1-cache"
    entry.write_bytes(other[:9])
    assert kept.get("jit_call-1") is None and entry.read_bytes() == other[:9]
    entry.write_bytes(other)  # while this process compiled
    kept.put("jit_call-1", own)
    assert kept.get("jit_call-1") == entry.read_bytes() == other and not capsys.readouterr().err
