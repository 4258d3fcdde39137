"""What a step takes at least, by its launches: sums under bounds, and what changed named.

All figures are ESTIMATES of lower bounds on one H100 SXM, batch 512, bf16, counted in machine code.
kernels/tools/step_bounds.json holds the launches of each step, how many there are of each and what
they add, so that nothing grows and nothing is forgotten. After a change that is meant, it is
written anew by `TRITON_INTERPRET=0 python tests/kernels/test_step_report.py --record`. Another
release of Triton makes other machine code: there the launches and the bounds alone are compared.
Without the option the file is the program of the processes that compile: the tests' own interprets
kernels.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fastres.kernels.tools.networks import NETWORKS
from fastres.kernels.tools.step_report import RECORDED_PATH, count_step, recorded_steps

REPO = Path(__file__).resolve().parents[2]

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

ARCH, PRECISION, BATCH = "sm_90", "bf16", 512

# How far a sum may be from what is recorded, in microseconds.
TOLERANCE = 1.0

# What is recorded of each launch, of all its repetitions together.
TIMES = ("issue_us", "bytes_us", "arithmetic_us", "bound_us")


def compiling_environment():
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}


def count(name):
    """The report of one step."""
    network, phase = name.split()
    return count_step(ARCH, network, PRECISION, BATCH, phase, jobs=1).record()


def totals_of(report):
    """{layer, kernel and form: launches and the sum of each of TIMES}."""
    totals = {}
    for row in report["rows"]:
        name = " | ".join([row["layer"], row["name"], *filter(None, [row.get("variant")])])
        of_row = [row["launches"], *(row["launches"] * row[time] for time in TIMES)]
        totals[name] = [a + b for a, b in zip(totals.get(name, [0] * 5), of_row, strict=True)]
    return {name: [totals[name][0], *(round(us, 2) for us in totals[name][1:])] for name in totals}


def other_launches(totals, recorded):
    """Launches that are not those recorded, or not as many, in words."""
    counts, before = ({name: row[0] for name, row in of.items()} for of in (totals, recorded))
    return [
        f"{name}: {counts.get(name, 0)} launches, recorded {before.get(name, 0)}"
        for name in sorted(counts.keys() | before.keys())
        if counts.get(name) != before.get(name)
    ]


def other_sums(totals, recorded):
    """Sums that are above or below those recorded, in words, the furthest first."""
    found = []
    for name in totals.keys() | recorded.keys():
        pairs = zip(totals.get(name, [0] * 5)[1:], recorded.get(name, [0] * 5)[1:], strict=True)
        found += [
            (-abs(us - before), f"{name}: {time} {us:.1f}, recorded {before:.1f}")
            for time, (us, before) in zip(TIMES, pairs, strict=True)
            if abs(us - before) > TOLERANCE
        ]
    return [text for _, text in sorted(found)]


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


@pytest.fixture(scope="module")
def recorded():
    return recorded_steps()


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_stays_under_its_bound(reports, recorded, name):
    report = reports[name]
    changed = other_sums(totals_of(report), recorded["steps"][name])
    assert report["bound_us"] <= BOUNDS[name], "\n".join(changed)
    assert report["launches"] <= MAX_LAUNCHES.get(name, 1000)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_launches_are_those_recorded(reports, recorded, name):
    changed = other_launches(totals_of(reports[name]), recorded["steps"][name])
    assert not changed, "\n".join(changed)


@pytest.mark.parametrize("name", BOUNDS)
def test_what_launches_add_is_what_is_recorded(reports, recorded, name):
    if version("triton") != recorded["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}, here is {version('triton')}")
    changed = other_sums(totals_of(reports[name]), recorded["steps"][name])
    assert not changed, "\n".join(changed)


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
        # What the launch table chooses is as good as what the rules do.
        is_good = row.get("programs_per_multiprocessor", 0) > 0 and not row["violations"]
        assert row["name"].startswith("torch ") or is_good, row
    assert "ESTIMATE of a lower bound" in report["kind"]


def test_what_changed_is_named():
    recorded = {
        "stage1 | conv_fprop": [2, 5.0, 10.0, 1.0, 10.0],
        "stage2 | conv_fprop": [1, 2.0, 5.0, 1.0, 5.0],
        "update | torch copy_": [2, 0.0, 3.2, 0.0, 3.2],
    }
    totals = {
        "stage1 | conv_fprop": [2, 5.9, 9.1, 1.0, 9.1],
        # Bound by its bytes as before: the lost instructions are seen in their own sum.
        "stage2 | conv_fprop": [2, 0.1, 5.0, 1.0, 5.0],
        "head | new": [1, 30.0, 0.5, 0.0, 42.9],
    }
    assert other_launches(totals, recorded) == [
        "head | new: 1 launches, recorded 0",
        "stage2 | conv_fprop: 2 launches, recorded 1",
        "update | torch copy_: 0 launches, recorded 2",
    ]
    assert other_sums(totals, recorded) == [
        "head | new: bound_us 42.9, recorded 0.0",
        "head | new: issue_us 30.0, recorded 0.0",
        "update | torch copy_: bound_us 0.0, recorded 3.2",
        "update | torch copy_: bytes_us 0.0, recorded 3.2",
        "stage2 | conv_fprop: issue_us 0.1, recorded 2.0",
    ]
    assert other_launches(recorded, recorded) == other_sums(recorded, recorded) == []


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


def as_json(steps):
    """What is recorded, one launch a line: how many there are, then the sums of TIMES."""
    texts = []
    for name, totals in steps.items():
        rows = (f"   {json.dumps(row)}: {json.dumps(totals[row])}" for row in sorted(totals))
        texts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    head = {"triton": version("triton"), "arch": ARCH, "precision": PRECISION, "batch": BATCH}
    lines = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    return "{\n" + lines + ' "steps": {\n' + ",\n".join(texts) + "\n }\n}\n"


def test_the_file_is_as_it_would_be_written(recorded):
    of_this = recorded["triton"] == version("triton")
    text = as_json(recorded["steps"])
    assert not of_this or text == RECORDED_PATH.read_text()


def record() -> int:
    steps = {}
    for name in BOUNDS:
        report = count(name)
        steps[name] = totals_of(report)
        print({key: value for key, value in report.items() if key != "rows"})
    RECORDED_PATH.write_text(as_json(steps))
    return 0


def main(names) -> int:
    if names == ["--record"]:
        return record()
    print(json.dumps({name: count(name) for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
