"""Compares meshes: tokens per second and device, memory, collectives, and what was predicted.

Each mesh runs `step_time.py` in a process of its own. One that fails, or for which no time is
left, has a line with the reason. The lines are JSON; each is printed as it is known and
appended to `--out`.

    python benchmarks/scaling.py B --meshes data=1 data=2 fsdp=2 tensor=2
    python benchmarks/scaling.py B --meshes data=1 fsdp=2 -- --base-dtype nf4

What follows `--` is given to `step_time.py`. `of_linear` is the rate for each device divided by
that of the first mesh, which should be one device. `predicted` is the same by the plan's model
(`jlora.train.step_time_model`): a step takes the time that was measured of one device, and that
of the collectives beside which nothing else can run. It is null on devices that the model does not
know.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from step_time import WORKLOADS

STEP_TIME = Path(__file__).with_name("step_time.py")
RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"


def measured(
    name: str, mesh: str, options: list[str], limit_s: float
) -> dict[str, Any]:
    """Returns the line of `step_time.py` for a mesh, or why there is none."""
    axes = [part for axis in mesh.split(",") for part in f"--{axis}".split("=")]
    command = [sys.executable, str(STEP_TIME), name, *axes, *options]
    if limit_s <= 0:
        return {"error": "not run: no time left"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit_s:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": " | ".join(lines[-3:])[-600:], "exit_status": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures one mesh after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--meshes", nargs="+", default=["data=1", "data=2", "fsdp=2"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--limit-s", type=float, default=math.inf, help="of all meshes together"
    )
    args, options = parser.parse_known_args()
    options = [option for option in options if option != "--"]
    end, one = time.monotonic() + args.limit_s, None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    options += ["--out", str(args.out.with_suffix(".step_time.jsonl"))]
    for mesh in args.meshes:
        limit_s = min(end - time.monotonic(), 3600)
        found = measured(args.workload, mesh, options, limit_s)
        devices = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
        line: dict[str, Any] = {"workload": args.workload, "mesh": mesh} | found
        if "error" not in found:
            rate = found["tokens_per_second"] / devices
            line["tokens_per_second_per_device"] = round(rate, 1)
            one = one or found | {"rate": rate}
            seconds = one["step_ms"] / 1e3
            exposed = found["exposed_ms"]
            line["of_linear"] = round(rate / one["rate"], 3)
            line["predicted"] = (
                None
                if exposed is None
                else round(seconds / (seconds + exposed / 1e3), 3)
            )
        text = json.dumps(line)
        print(text, flush=True)
        with args.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
