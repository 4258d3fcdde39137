"""What a step takes at least, by its launches: sums under bounds, and the launch that grew named.

All figures are ESTIMATES of lower bounds on one H100 SXM, batch 512, bf16, counted in machine code.
step_bounds.json holds what the launches of each step added when the bounds were last set; written
anew by `TRITON_INTERPRET=0 python tests/kernels/test_step_report.py --record`. Without the option
the file is the program of the processes that compile: the tests' own interprets kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.kernels.tools.networks import NETWORKS
from fastres.kernels.tools.step_report import count_step

REPO = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("step_bounds.json")

# Microseconds: the sum over launches of max(issue / 0.7, bytes, arithmetic). Those of inference are
# 5 % above what was counted, 172 and 839: all launches of ResNet-20 were bound by their bytes, and
# nearly all of ResNet-18 by bytes or products, so fewer instructions have nothing more to give.
BOUNDS = {
    "resnet20 training": 900,
    "resnet18 training": 4200,
    "resnet20 inference": 180,
    "resnet18 inference": 880,
}
MAX_LAUNCHES = {"resnet20 training": 90, "resnet18 training": 121}

# A launch has grown when its sum is more than this above what is recorded, in microseconds.
TOLERANCE = 1.0


def compiling_environment():
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}


def count(name):
    """The report of one step."""
    network, phase = name.split()
    return count_step("sm_90", network, "bf16", 512, phase, jobs=1).record()


def sums_of(report):
    """{layer, kernel and form: what its launches add to the step}."""
    sums = {}
    for row in report["rows"]:
        name = " | ".join([row["layer"], row["name"], *filter(None, [row.get("variant")])])
        sums[name] = sums.get(name, 0) + row["launches"] * row["bound_us"]
    return sums


def grown(sums, recorded):
    """What adds more than is recorded, in words, the most first."""
    more = {name: value - recorded.get(name, 0.0) for name, value in sums.items()}
    return [
        f"{name}: {sums[name]:.1f} us, recorded {recorded.get(name, 0.0):.1f}"
        for name in sorted(more, key=more.get, reverse=True)
        if more[name] > TOLERANCE
    ]


@pytest.fixture(scope="module")
def reports():
    """Every report, the networks in two processes side by side."""
    found = {}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *(name for name in BOUNDS if name.startswith(network))],
            env=compiling_environment(),
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        for network in NETWORKS
    ]
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0
        found |= json.loads(output)
    return found


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_stays_under_its_bound(reports, name):
    report = reports[name]
    launches = grown(sums_of(report), json.loads(RECORDED.read_text())[name])
    assert report["bound_us"] <= BOUNDS[name], "\n".join(launches)
    assert report["launches"] <= MAX_LAUNCHES.get(name, 1000)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_sums_are_those_of_the_rows(reports, name):
    report = reports[name]
    rows = report["rows"]
    assert report["launches"] == sum(row["launches"] for row in rows)
    for time in ("issue_us", "bytes_us", "arithmetic_us", "bound_us"):
        assert report[time] == pytest.approx(sum(r["launches"] * r[time] for r in rows), abs=0.5)
    for row in rows:
        times = (row["issue_us"] / 0.7, row["bytes_us"], row["arithmetic_us"])
        is_convolution = row["name"].startswith("torch convolution")
        assert is_convolution or row["bound_us"] == pytest.approx(max(times), abs=1e-3)
        assert row["name"].startswith("torch ") or row["programs_per_multiprocessor"] > 0
    assert "ESTIMATE of a lower bound" in report["kind"]


def test_a_launch_that_grew_is_named():
    recorded = {"stage1 | conv_fprop": 10.0, "stage2 | conv_fprop": 5.0}
    sums = {"stage1 | conv_fprop": 10.9, "stage2 | conv_fprop": 9.0, "head | new": 30.0}
    assert grown(sums, recorded) == [
        "head | new: 30.0 us, recorded 0.0",
        "stage2 | conv_fprop: 9.0 us, recorded 5.0",
    ]


def test_the_command_prints_one_object():
    command = [sys.executable, "-m", "fastres.kernels.tools.codegen", "--step", "resnet20"]
    command += ["--phase", "inference", "--batch", "64", "--arch", "sm_90", "--jobs", "1", "--json"]
    done = subprocess.run(
        command, env=compiling_environment(), cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["step"], report["batch"], report["gpu"]) == ("resnet20", 64, "H100 SXM")
    # A stem, 18 convolutions of 3x3, two projections, the head.
    assert report["launches"] == 22
    assert report["bound_us"] >= report["bytes_us"] > 0


def record() -> int:
    recorded = {}
    for name in BOUNDS:
        report = count(name)
        sums = sums_of(report)
        recorded[name] = {row: round(us, 1) for row, us in sorted(sums.items()) if us >= TOLERANCE}
        print({key: value for key, value in report.items() if key != "rows"})
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    return 0


def main(names) -> int:
    if names == ["--record"]:
        return record()
    print(json.dumps({name: count(name) for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
