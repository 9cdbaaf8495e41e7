"""Presets, the flags over them, and wrong usage."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass

import pytest

import train
import train_encoder
from config import RESUMES, exit_code, option, parse


@dataclass(frozen=True)
class Settings:
    batch: int = option(8, "images a step")
    r1_gamma: float = option(10, "weight")
    flip: bool = option(True, "mirror")
    noise: str = option("random", "noise", ("random", "const"))

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")


PRESETS = {"large": Settings(), "small": Settings(batch=2, flip=False)}


def read(*argv):
    return parse("A test.", PRESETS, lambda parser: parser.add_argument("--out", default="runs"), list(argv))


@pytest.mark.parametrize("wrong, message", [
    ({"tick_kimg": 0}, "--tick-kimg must be above 0, got 0"),
    ({"path_shrink": 0}, "--path-shrink must be at least 1, got 0"),
    ({"mixing": 7}, "--mixing must be at least 0 and at most 1, got 7"),
    ({"lr": float("nan")}, "--lr must be above 0, got nan"),
    ({"kimg": float("inf")}, "--kimg must be above 0, got inf"),
    ({"r1_every": -1}, "--r1-every must be at least 0, got -1"),
    ({"seed": -1}, "--seed must be at least 0 and at most 4294967295, got -1"),
    ({"size": 0}, "--size must be at least 1, got 0"),
    ({"style_dim": 0}, "--style-dim must be at least 1, got 0"),
    ({"channel_base": 0}, "--channel-base must be at least 1, got 0"),
    ({"channel_max": -1}, "--channel-max must be at least 1, got -1"),
    ({"channel_multiplier": float("inf")}, "--channel-multiplier must be above 0, got inf"),
    ({"ada_target": 60}, "--ada-target must be at least -2 and at most 1, got 60"),
    ({"ada_target": float("nan")}, "--ada-target must be at least -2 and at most 1, got nan"),
])
def test_a_training_that_cannot_be_meant_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        train.TrainConfig(**wrong)


def test_the_first_preset_is_the_default():
    config, args = read()
    assert config == Settings() and args.out == "runs"


def test_flags_lie_over_the_preset():
    config, args = read("--preset", "small", "--r1-gamma", "0.5", "--noise", "const", "--out", "here")
    assert config == Settings(batch=2, r1_gamma=0.5, flip=False, noise="const") and args.out == "here"
    assert read("--r1-gamma", "1", "--preset", "small")[0].batch == 2                  # in any order


@pytest.mark.parametrize("argv, flip", [(("--flip", "--preset", "small"), True), (("--no-flip",), False),
                                        ((), True), (("--preset", "small"), False)])
def test_a_truth_value_has_two_flags(argv, flip):
    assert read(*argv)[0].flip is flip


@pytest.mark.parametrize("argv, message", [
    (("--batch", "0"), "--batch must be at least 1, got 0"),
    (("--batch", "many"), "--batch: invalid int value: 'many'"),
    (("--noise", "none"), "--noise: invalid choice: 'none'"),
    (("--preset", "huge"), "--preset: invalid choice: 'huge'"),
    (("--depth", "3"), "unrecognized arguments: --depth 3"),
])
def test_wrong_usage_exits_2_and_names_the_flag(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script, required", [(train, ["--data", "x"]), (train_encoder, ["--data", "x", "--gan", "y"])])
def test_help_shows_every_option_of_the_training_scripts(script, required, capsys):
    with pytest.raises(SystemExit) as end:
        script.main([*required, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    kind = type(script.PRESETS["smoke32"])
    assert all("--" + field.name.replace("_", "-") in shown for field in dataclasses.fields(kind))


def test_a_dry_run_prints_the_resolved_configuration(capsys):
    assert train.main(["--data", "x", "--preset", "ct256", "--batch", "32", "--no-flip", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == dataclasses.asdict(dataclasses.replace(train.PRESETS["ct256"], batch=32, flip=False))


def test_the_paper_preset_is_the_papers():
    paper = train.PRESETS["paper512"]
    assert (paper.size, paper.style_dim, paper.lr, paper.r1_gamma, paper.r1_every) == (512, 512, 0.002, 10, 16)
    assert (paper.path_weight, paper.path_every, paper.mixing) == (2, 4, 0.9)
    assert paper.model().channels(512) == 64 and paper.model().channels(64) == 512
    encoder = train_encoder.PRESETS["paper512"]
    assert (encoder.epochs, encoder.perceptual_epochs, encoder.batch) == (65, 5, 8)
    assert (encoder.lr, encoder.lr_discriminator, encoder.adversarial, encoder.domain) == (1e-4, 1e-5, 0.05, 1)
    assert (encoder.r1_gamma, encoder.r1_every, encoder.erase, encoder.rotate) == (10, 16, 0.25, 0.25)


@pytest.mark.parametrize("raised, code, said", [
    (None, 0, ""), (FileNotFoundError("no such folder: x"), 2, "error: no such folder: x"),
    (ValueError("--size 3: too small"), 2, "error: --size 3: too small"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_exit_codes(raised, code, said, capsys):
    def command(args):
        if raised:
            raise raised

    assert exit_code(command, argparse.Namespace()) == code
    assert said in capsys.readouterr().err


def test_only_a_command_that_keeps_what_it_did_says_that_it_goes_on(capsys):
    def stopped(args):
        raise KeyboardInterrupt

    for what, said in (((), "stopped\n"), ((RESUMES,), "stopped; the same command goes on from here\n")):
        assert exit_code(stopped, argparse.Namespace(), *what) == 130
        assert capsys.readouterr().err == said


def test_a_command_may_have_its_own_exit_code_and_other_errors_are_not_hidden():
    assert exit_code(lambda args: args.left, argparse.Namespace(left=3)) == 3
    with pytest.raises(KeyError):
        exit_code(lambda args: {}[args.left], argparse.Namespace(left=3))
