"""What test_distributed runs in two processes, and in its own for comparison.

python worker.py FOLDER --coordinator=HOST:PORT --processes=N --process=I
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def augmented(fields: dict):
    """The batches of three steps and their dropout masks, on the host: order, crop, flip, mix-up and dropout."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import tiny

    from jaxcompute import sharding, train
    from jaxcompute.data import augment

    exp = tiny.mlp(**fields)
    mesh = sharding.make_mesh(exp.config)

    def batch(feed, at):
        batch = sharding.split(mesh, exp.train.batch(feed, at))
        key, mix_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(1), at), 3)
        image = batch["image"].astype(jnp.float32) / 255
        image = augment.per_example(key, image, lambda k, x: augment.flip(k, augment.crop(k, x, 2)))
        image, label = augment.mixup(mix_key, image, jax.nn.one_hot(batch["label"], 3), 0.4)
        kept = nn.Dropout(0.5, deterministic=False).apply({}, jnp.ones((len(image), 16)), rngs={"dropout": dropout_key})
        return {"image": image, "label": label, "kept": kept}

    whole = jax.sharding.NamedSharding(mesh, sharding.WHOLE)
    feed = train.compile(train.resolve(exp, mesh), mesh).feed
    jitted = jax.jit(batch, out_shardings=whole)
    return {
        f"{name} {at}": array
        for at in (0, 3, 9)
        for name, array in jax.device_get(jitted(feed(at), jnp.int32(at))).items()
    }


def split_run(folder: Path, **fields):
    """Six steps of an MLP whose first kernel is split; its State."""
    import tiny

    from jaxcompute import train

    exp = tiny.mlp(tiny.MLP((512,), 3), **({"steps": 6, "log_every": 1, "save_every": 3} | fields))
    return train.fit(dataclasses.replace(exp, classes=()), folder, say=lambda text: None, allow_changes=True)


def losses(precision: str, pictures: Path | None = None, **fields):
    """Of each of 20 steps of an MLP, and of the evaluation after them; of images that are streamed, where some are."""
    import jax
    import numpy as np
    import tiny
    from jax.sharding import PartitionSpec

    from jaxcompute import sharding, train
    from jaxcompute.data import sources, stream

    seen: dict[int, float] = {}

    def write(at: int, values: dict[str, float]) -> None:
        seen.update({at: values["train/loss"]} if "train/loss" in values else {})
        seen.update({21: values["eval/loss"]} if "eval/loss" in values else {})

    with jax.enable_x64(precision == "float64"):
        exp = tiny.mlp(steps=20, log_every=1, eval_every=20, precision=precision, **fields)
        if pictures:
            records, fit, workers = sources.files(pictures, pictures)[0], stream.whole(6), stream.Workers(1)
            exp = dataclasses.replace(
                exp,
                train=stream.shuffled(records, 8, 0, fit, workers),
                eval=stream.in_order(records, 8, fit, workers),
                rule=sharding.by_pattern({"Dense_0/kernel": PartitionSpec(None, "model")}),
            )
        train.fit(exp, write=write, say=lambda text: None)
    return np.array([seen[at] for at in range(1, 22)])


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    import numpy as np

    from jaxcompute import distributed

    folder, flags = Path(sys.argv[1]), [argument.partition("=")[2] for argument in sys.argv[2:]]
    distributed.start(flags[0], int(flags[1]), int(flags[2]))
    bits = augmented({}) | {precision: losses(precision) for precision in ("float64", "float32")}
    bits["streamed"] = losses("float64", folder / "pictures")
    bits["streamed, whole to each"] = losses("float64", folder / "pictures", mesh_data=1, mesh_model=2)
    if jax.process_index() == 0:
        np.savez(folder / "bits.npz", **bits)
    state = split_run(folder / "new", mesh_fsdp=2)
    split_run(folder / "half", mesh_fsdp=2)
    print(state.params["Dense_0"]["kernel"].addressable_shards[0].data.shape)


if __name__ == "__main__":
    main()
