"""What a shell offers behind `fastres`; bash is asked, the others where they are installed."""

import shutil
import subprocess

import pytest

from fastres import completion
from fastres.__main__ import COMMANDS
from fastres.config import Config

CASES = [
    (["ev"], ["evaluate"]),
    (["train", "--label"], ["--label-smoothing"]),
    (["train", "--model", "resnet3"], ["resnet32", "resnet34"]),
    (["train", "--fast", "--optimizer", "m"], ["muon"]),
    (["convert", "--from", "ku"], ["kuangliu"]),
    (["recipe", "qu"], ["quick"]),
    (["completion", "fi"], ["fish"]),
    # Run folders and images are files, which the shell completes itself.
    (["evaluate", "ru"], []),
    (["predict", "RUN", ""], []),
    (["parity", "--h"], ["--help"]),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    def written(shell):
        file = tmp_path_factory.mktemp("completion") / shell
        file.write_text(completion.script(shell))
        return file

    return written


def ran(command, *words):
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_offers(script):
    ask = 'source "$0"; COMP_WORDS=(fastres "$@"); COMP_CWORD=$#; _fastres; echo "${COMPREPLY[@]}"'
    file = script("bash")
    for words, offered in CASES:
        assert ran(["bash", "-c", ask, str(file)], *words) == offered, words


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_offers(script):
    file = script("fish")
    for words, offered in CASES:
        found = ran(["fish", "-c", f'source {file}; complete -C "fastres {" ".join(words)}"'])
        assert set(offered) <= set(found), words


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_the_script(script):
    file = script("zsh")
    assert ran(["zsh", "-f", "-c", f"source {file}; echo $_comps[fastres]"]) != []


def test_every_option_of_training_is_offered():
    words = completion.words_of("train")
    for name in Config().to_json():
        assert f"--{name.replace('_', '-')}" in words, name
    assert words["--no-whiten"] is None
    assert words["--lr"] == ()


def test_every_command_is_described(capsys):
    for command in COMMANDS:
        assert "--help" in completion.words_of(command)
    assert completion.main(["bash"]) == 0
    assert "complete -o default -F _fastres fastres\n" in capsys.readouterr().out


def test_an_unknown_shell_is_wrong_use(capsys):
    with pytest.raises(SystemExit) as ended:
        completion.main(["csh"])
    assert ended.value.code == 2
    assert "csh" in capsys.readouterr().err
