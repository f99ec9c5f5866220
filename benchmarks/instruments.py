"""What do the instruments cost the loop? Their time a log period beside the period's own.

    taskset -c 0 python benchmarks/instruments.py

The loop reads the clocks once a log period: a rate, a share of peak, a meter of joules. That is timed by itself, many
times, beside the period of the smallest experiment there is, whose steps are the shortest. The meter here is a
stand-in that costs nothing: a GPU's own is to be measured where one is.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from experiments import digits_mlp
from jaxcompute import log, sharding, train


def main() -> None:
    config = digits_mlp.Config()
    mesh = sharding.make_mesh(config)
    program = train.compile(train.resolve(digits_mlp.experiment(config), mesh), mesh)
    period = config.log_every
    clocks = {
        name: train.Clock(program, 0, instruments)
        for name, instruments in {
            "without": train.Instruments(),
            "with": train.Instruments(peak=lambda kind, precision: 1e12, joules=time.perf_counter),
        }.items()
    }
    costs: dict[str, list[float]] = {name: [] for name in clocks}
    periods = []
    state, sums, call = program.init(), program.sums(), program.steps(1)
    for turn in range(60):
        began = time.perf_counter()
        for at in range(period):
            state, sums = call(state, sums, program.feed(at))
        jax.block_until_ready(state.params)
        periods.append(time.perf_counter() - began)
        for name, clock in clocks.items():
            began = time.perf_counter()
            for i in range(1, 101):
                clock.rates(period * (100 * turn + i), clock.read(), 0.0)
            costs[name].append((time.perf_counter() - began) / 100)
    cost = {name: statistics.median(times) for name, times in costs.items()}
    result = {
        "experiment": "digits_mlp",
        "log_every": period,
        "period_ms": 1e3 * statistics.median(periods[5:]),
        "rates_alone_us_a_period": 1e6 * cost["without"],
        "with_peak_and_meter_us_a_period": 1e6 * cost["with"],
        "share_of_the_loop": cost["with"] / statistics.median(periods[5:]),
    }
    print(log.table([*result.items()], ("what", "value")))
    file = Path(__file__).parent / "results" / "instruments.json"
    log.write_json(file, log.describe({}, device=jax.devices()[0].device_kind, **result))


if __name__ == "__main__":
    main()
