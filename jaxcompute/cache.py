"""What was compiled is kept in jax's persistent cache, so that the next run starts in seconds."""

import os
import sys
from pathlib import Path

from jaxcompute.errors import BadInput


def folder() -> str:
    """Of this user, or what jax's own variable says, a URL perhaps. Raises BadInput where there is no home folder."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return os.environ["JAX_COMPILATION_CACHE_DIR"]
    try:
        return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcompute" / "xla")
    except RuntimeError:  # a container's user, say
        raise BadInput("this user has no home folder: set XDG_CACHE_HOME to a folder for caches") from None


def keep() -> None:
    """Keep there whatever this process compiles from now on.

    A process that is killed as it writes an entry leaves a part of it. jax would warn of it at each start and leave it
    as it is; here it counts as none, and is written anew, which is told.
    """
    import jax
    from jax._src import compilation_cache, lru_cache  # private: jax has no public door to how an entry is read

    class Whole(lru_cache.LRUCache):
        def get(self, key: str) -> bytes | None:
            entry = super().get(key)
            try:
                if entry is not None:
                    compilation_cache.decompress_executable(entry)
            except Exception:  # zlib's, or zstandard's
                return None
            return entry

        def put(self, key: str, value: bytes) -> None:
            file = self.path / f"{key}-cache"
            torn = file.exists() and self.get(key) is None  # read again: it may be another's that was just written
            if torn:
                file.unlink(missing_ok=True)
            super().put(key, value)
            if torn:
                print(f"compile cache: {file} was torn and is written anew", file=sys.stderr, flush=True)

    compilation_cache.LRUCache = Whole  # pyright: ignore[reportPrivateImportUsage]
    jax.config.update("jax_compilation_cache_dir", folder())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
