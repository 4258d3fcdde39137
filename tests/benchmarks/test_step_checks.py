"""The commands that check the fast step: they pass what is right, and name what is wrong."""

import json

import pytest
import torch

from benchmarks.harness import ablation
from benchmarks.harness.rows import read_results
from benchmarks.prove import loss_curves, step_parity
from benchmarks.roofline import kernel_table
from benchmarks.roofline.profile_step import Event, Profile
from fastres.engine import machine
from fastres.errors import UsageError
from fastres.kernels.dispatch import force_backend
from fastres.kernels.reference import backend as reference
from tests.helpers.data_fixtures import image_folder

COMMANDS = (step_parity, loss_curves, kernel_table)
STEP = ["--model", "resnet8", "--batch-size", "4", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _settings_restored(plain, monkeypatch):
    """A command sets torch up for its process; the fused ops are not interpreted."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def test_two_equal_steps_are_right(capsys):
    assert step_parity.main([*STEP, "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "resnet8 batch 4, fp32: fused" in printed
    assert "twice     ok, 2 steps, " in printed
    assert "update    ok, loss " in printed
    assert ("captured  ok" in printed) == torch.cuda.is_available()


@pytest.fixture(scope="module")
def trained():
    """A step that was trained twice, to be changed and compared."""
    with force_backend(reference):
        return step_parity.train("resnet8", 4, 2, amp="off", graph="off")


@pytest.mark.parametrize(
    ("name", "step", "twice", "said"),
    [
        (
            "model.fc.weight",
            2,
            False,
            "twice     DIFFERS after step 2: model.fc.weight first, 1 of",
        ),
        ("optimizer.conv1.weight.momentum_buffer", 2, False, "buffer first, 1 of 432 values by up"),
        ("model.conv1.weight", 1, True, "update    WRONG the step is off by"),
    ],
)
def test_a_step_that_differs_or_is_wrong_is_named(
    trained, monkeypatch, capsys, name, step, twice, said
):
    """The last bit of one value in the second training, or all values in both."""
    built, states = trained
    done = []

    def changed(*_args, **_options):
        copies = [{key: tensor.clone() for key, tensor in state.items()} for state in states]
        values = copies[step - 1][name]
        if twice:
            values += 0.1
        elif done:
            values.view(torch.int32)[(0,) * values.ndim] ^= 1
        done.append(copies)
        return built, copies

    monkeypatch.setattr(step_parity, "train", changed)
    assert step_parity.main([*STEP, "--steps", "2"]) == 1
    printed = capsys.readouterr().out
    assert said in printed
    assert ("twice     ok" in printed) == twice


def test_bits_are_compared_and_not_values():
    nan, zero = torch.tensor([torch.nan]), torch.tensor([0.0])
    assert step_parity.difference([{"a": nan}], [{"a": nan.clone()}]) is None
    assert "after step 1: a first" in step_parity.difference([{"a": zero}], [{"a": -zero}])
    assert "b in one alone" in step_parity.difference([{"a": zero}], [{"a": zero, "b": zero}])


def test_curves_of_correct_trainings_are_right(tmp_path, capsys):
    images = str(image_folder(tmp_path / "images", per_class=2))
    words = [*STEP, "--steps", "3", "--data-dir", images, "--out", str(tmp_path)]
    assert loss_curves.main(words) == 0
    assert "ok: fused is " in capsys.readouterr().out
    found = read_results(tmp_path)
    assert found[0][1]["seeds"] == [0]
    rows = {(row.provider, row.metric): row for row, _ in found}
    curves = {provider for provider, metric in rows if metric == "loss_from_step_1"}
    plain = {"eager", "channels_last"}
    assert curves == {"fused", *plain, *(f"{name} reordered" for name in plain)}
    assert rows["fused", "loss_from_step_1"].n == 1
    assert rows["fused", "share_of_allowed"].median <= 1


def test_the_curve_of_a_wrong_gradient_is_wrong(tmp_path, monkeypatch, capsys):
    assemble = ablation.assemble

    def wrong(configuration, *args, **options):
        built = assemble(configuration, *args, **options)
        if configuration == "fast":
            built.model.layer2[0].conv1.weight.register_hook(lambda grad: 0.9 * grad)
        return built

    monkeypatch.setattr(ablation, "assemble", wrong)
    images = str(image_folder(tmp_path, per_class=2))
    assert loss_curves.main([*STEP, "--steps", "2", "--data-dir", images]) == 1
    assert "WRONG: fused is " in capsys.readouterr().out


def curves(fused, others=(0.01, 0.01, 0.01)):
    """A falling truth of three windows, correct trainings and a fused one, off by so much in each.

    They swing about the truth, so that the means of windows are equal.
    """
    steps = range(20 * len(others))
    truth = [2 - 0.01 * step for step in steps]

    def beside(offsets):
        return [truth[step] + offsets[step // 20] * (-1) ** step for step in steps]

    right = beside(others)
    return {"eager": truth, "eager reordered": right, "amp": right, "fused": beside(fused)}


def test_a_curve_may_be_off_by_what_correct_ones_are():
    assert loss_curves.judge([curves([0.0124] * 3)]).is_right
    assert not loss_curves.judge([curves([0.0126] * 3)]).is_right
    assert loss_curves.judge([curves([0.01] * 3), curves([0.014] * 3)]).is_right
    # An error of the first window is not lost among the larger distances of later ones.
    growing = (0.001, 0.02, 0.02)
    assert loss_curves.judge([curves([0.001, 0.015, 0.015], growing)]).is_right
    assert not loss_curves.judge([curves([0.004, 0.015, 0.015], growing)]).is_right
    # A NaN is no small distance.
    assert not loss_curves.judge([curves([0.01, 0.01, float("nan")])]).is_right


def test_the_operators_of_a_step_add_up_and_become_rows(tmp_path, capsys):
    words = [*STEP, "--steps", "2", "--compile", "off", "--estimate", "--out", str(tmp_path)]
    assert kernel_table.main(words) == 0
    printed = capsys.readouterr().out
    assert "resnet8 batch 4, fp32: " in printed
    assert "under the profiler" in printed
    rows = {(row.provider, row.metric): row for row, _ in read_results(tmp_path)}
    if not torch.cuda.is_available():
        assert "no estimate" in printed
        assert rows["aten::mkldnn_convolution", "launches"].median == 9
    times = sum(row.median for (_, metric), row in rows.items() if metric == "time")
    total = rows["step", "kernels"].median
    assert times == pytest.approx(total, rel=0.5)
    assert total <= rows["step", "profiled"].median


def test_inference_has_a_table_too(capsys):
    assert kernel_table.main([*STEP, "--steps", "1", "--phase", "inference"]) == 0
    printed = capsys.readouterr().out
    assert "fp32, inference: " in printed
    assert "convolution_backward" not in printed


CONV, APPLY = "_conv_strip_fprop_kernel", "_bn_apply_kernel"
CUDNN = "void cudnn::cnn::sm90_xmma_fprop_implicit_gemm_bf16<float, 3>(int)"


def two_steps(*, wall_us=200.0):
    """Two replays of two convolutions, a batch norm that starts 2 us early, and one of cuDNN."""
    events = []
    for start in (0.0, 100.0):
        events += [Event(CONV, start, 10.0), Event(CONV, start + 10, 12.0)]
        events += [Event(APPLY, start + 20, 30.0), Event(CUDNN, start + 50, 5.0)]
    return Profile(events, wall_us)


def test_kernels_stand_beside_their_estimates_the_largest_gap_first():
    report = {
        "rows": [
            {"name": "conv_strip_fprop", "launches": 1, "bound_us": 4.0},
            {"name": "conv_strip_fprop", "launches": 1, "bound_us": 6.0},
            {"name": "bn_apply", "launches": 1, "bound_us": 25.0},
            {"name": "torch convolution_backward dw", "launches": 2, "bound_us": 2.0},
        ]
    }
    estimates = kernel_table.estimates_by_kernel(report)
    table = kernel_table.make_table(two_steps(), 2, estimates, of_kernels=True)
    assert [kernel.name for kernel in table.kernels] == [CONV, APPLY, CUDNN]
    conv = table.kernels[0]
    assert (conv.launches, conv.step_us, conv.estimate_us, conv.above_us) == (2, [22, 22], 10, 12)
    assert table.missing == {"cuDNN convolutions": 4.0}
    assert (table.kernels_us, table.overlap_us, table.gap_us) == (57, 2, 45)
    assert kernel_table.problems(table) == []


def test_totals_that_do_not_add_up_are_a_problem():
    table = kernel_table.make_table(two_steps(wall_us=100), 2, {}, of_kernels=True)
    assert "kernels ran 55.0 us of a step of 50.0 us" in kernel_table.problems(table)[0]
    table = kernel_table.make_table(two_steps(), 2, {}, of_kernels=True)
    table.kernels[0].step_us[0] += 1
    assert "the rows add up to 57.5 us" in kernel_table.problems(table)[0]
    some = two_steps()
    del some.events[-1]
    table = kernel_table.make_table(some, 2, {}, of_kernels=True)
    assert "0.5 launches a step of sm90_xmma_fprop" in kernel_table.problems(table)[0]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (CONV, CONV),
        ("aten::addmm", "addmm"),
        (CUDNN, "sm90_xmma_fprop_implicit_gemm_bf16"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel"
            "<at::native::FusedSgdMathFunctor<float, 3> >(int)",
            "multi_tensor_apply_kernel<FusedSgdMathFunctor>",
        ),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        (
            "triton_" + "x" * 60 + "_native_norm_relu_3",
            "triton_xxxxxxxxxxxxxxxxxxxxxxxxx...ative_norm_relu_3",
        ),
    ],
)
def test_names_are_shortened_for_people(name, short):
    assert kernel_table.short_name(name) == short


def test_the_committed_count_is_there_for_its_steps_alone():
    wanted = {"step": "resnet20", "phase": "training", "batch": 512, "precision": "bf16"}
    estimates = kernel_table.recorded_estimates({**wanted, "arch": "sm_90"})
    assert 700 < sum(estimates.values()) < 900
    assert estimates["_sgd_kernel"] > 0
    for other in ({"arch": "sm_80"}, {"batch": 128}, {"step": "resnet8"}):
        assert kernel_table.recorded_estimates({**wanted, "arch": "sm_90", **other}) == {}


def test_an_estimate_of_another_step_is_refused(tmp_path):
    file = tmp_path / "step.json"
    report = {"step": "resnet8", "batch": 512, "rows": []}
    for content, said in ((json.dumps(report), "is of another step: batch 512"), ("[]", "no JSON")):
        file.write_text(content)
        with pytest.raises(UsageError, match=said):
            kernel_table.read_estimate(file, {"step": "resnet8", "batch": 4})


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_use_and_a_machine_without_a_compiler_are_one_sentence(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.setenv("FASTRES_DATA", str(image_folder(tmp_path, per_class=2)))
    for words, said in (
        (["--batch-size", "0"], "--batch-size must be"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--model", "resnet21"], "unknown model"),
    ):
        assert command.main([*STEP, *words]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(machine, "cxx_compiler", lambda: None)
    assert command.main([*STEP, "--compile", "on"]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nothing to run on this machine: --compile on needs a C++ compiler")
