"""A setting of an unknown name or the wrong type is an error that names the way out, wherever it
comes from."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

from configurator import UserError, configure

import pytest

import eval as eval_script
import finetune
import train
from tests.conftest import ROOT
from tests.forks import script


@dataclass
class Config:
    rate: float = 0.1  # raise it when bored
    steps: int = 5
    name: str = "a"
    limit: int | None = 3
    flag: bool = False
    kind: Literal["x", "y"] = "x"
    sizes: list[int] = field(default_factory=list)
    column: str | int = "text"
    out: str = "out/{config}"


def test_values_arrive_as_their_types(tmp_path):
    c = configure(
        Config,
        [
            "--rate=1",
            "--steps=7",
            "--name=a=b",
            "--limit=None",
            "--flag=True",
            "--kind=y",
            "--sizes=[1, 2]",
            "--column=1",
        ],
    )
    assert c == Config(1.0, 7, "a=b", None, True, "y", [1, 2], 1, c.out) and type(c.rate) is float
    assert configure(Config, ["--name=None", "--column='1'", "--sizes=4", "--sizes=5"]).sizes == [
        4,
        5,
    ]
    assert configure(Config, ["--name=None"]).name == "None"
    assert configure(Config, ["--name='q'"]).name == "'q'"
    assert configure(Config, ["--column='1'"]).column == "1"


@pytest.mark.parametrize(
    "arg, says",
    [
        ("--rat=1", "did you mean 'rate'"),
        ("--flag=maybe", "True or False"),
        ("--steps=1.5", "steps='1.5'"),
        ("--rate=None", "float"),
        ("--kind=z", "'x' or 'y'"),
        ("--sizes=[1, 'a']", "list of int"),
        ("--flag=1", "True or False"),
        ("--steps", "--key=value"),
        ("-x=1", "--key=value"),
        ("nowhere.py", "does not exist"),
    ],
)
def test_errors_on_the_command_line(arg, says):
    with pytest.raises(UserError, match=says):
        configure(Config, [arg])


@pytest.mark.parametrize(
    "text, says",
    [
        ("rte = 1", "did you mean 'rate'"),
        ("steps = 'x'", r"steps='x' \(.*c.py\) is not int"),
        ("steps = = 1", "SyntaxError"),
        ("x = 1 / 0", "c.py:1 cannot be run: ZeroDivisionError"),
        ("flag = 1", "True or False"),
    ],
)
def test_errors_in_a_file(tmp_path, text, says):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=says):
        configure(Config, [str(tmp_path / "c.py")])


def test_files_compute_and_build_on_each_other_and_the_line_wins(tmp_path):
    (tmp_path / "base_of_test.py").write_text(
        "import math\nsteps = int(math.sqrt(81))\nrate = 2\n_hidden = 5\n"
    )
    (tmp_path / "more.py").write_text(
        "from base_of_test import *\nname = 'n' * 3\ndef helper(): pass\n"
    )
    c = configure(Config, ["--rate=3", str(tmp_path / "more.py")])
    assert (c.steps, c.rate, c.name, c.out) == (9, 3.0, "nnn", "out/more")


@pytest.mark.parametrize(
    "cls, comment",
    [
        (Config, "raise it when bored"),
        (train.Config, "more for large models or rates"),
        (train.Config, "your name for the files below"),
        (eval_script.Config, "at the end"),
    ],
)
def test_help_shows_every_field_with_its_comment(capsys, cls, comment):
    with pytest.raises(SystemExit) as e:
        configure(cls, ["--help"])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and comment in shown
    assert all(f"--{name}=" in shown for name in cls.__dataclass_fields__)


def test_help_of_settings_that_fine_tuning_changes(capsys):
    with pytest.raises(SystemExit):
        configure(finetune.Config, ["--help"])
    shown = capsys.readouterr().out
    for setting, says in (
        ("weight_decay=0.01", "on matrices"),
        ("beta2=0.999", "for large batches"),
        ("schedule='linear'", "trapezoid: flat"),
    ):
        assert says in shown.partition(f"--{setting}")[2].partition("--")[0]
    assert "the recipe" not in shown.partition("--mlp")[2].partition("--seed")[0]


def test_a_sweep_runs_as_wandbs_agent_calls_it(toy, tmp_path):
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")  # what fills in the command
    sweep = pytest.importorskip("yaml").safe_load(open(ROOT / "config/sweep.yaml"))
    assert set(sweep["parameters"]) <= set(train.Config.__dataclass_fields__)
    for name in ("train.py", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    for trial in ("first", "second"):
        chosen = {
            k: v["values"][-1] if "values" in v else v["min"]
            for k, v in sweep["parameters"].items()
        }
        settings = {k: v for k, v in toy.items() if k not in chosen and k != "out_dir"}
        filled = agent.create_sweep_command_args(
            {"args": {k: {"value": v} for k, v in (chosen | settings).items()}}
        )
        filled["program"] = [sweep["program"]]
        command = [
            part
            for c in agent.create_sweep_command(sweep["command"])
            for part in (filled[c[2:-1]] if c.startswith("${") else [c])
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"WANDB_RUN_ID": trial, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        config = json.load(open(tmp_path / f"out/sweep-{trial}/config.json"))
        assert {k: config[k] for k in chosen} == chosen and config[
            "crop"
        ] == 128  # and config/textcls.py's own


def test_the_preparation_script_checks_a_whole_config_file(tmp_path, toy):
    """Settings of training may stand in it, also those of finetune.py; misspelt ones may not."""
    (tmp_path / "c.py").write_text("epochs = 3\nlora_rank = 8\ncrop = None\n")
    options = [f"--{k}={toy[k]}" for k in ("dataset", "train_file", "data_dir", "vocab_size")]
    done = script("data.py", str(tmp_path / "c.py"), *options)
    assert done.returncode == 0 and "toy: 3 classes" in done.stdout, done.stderr
    for text, says in (("epoch = 3", "did you mean 'epochs'"), ("epochs = 'x'", "is not float")):
        (tmp_path / "c.py").write_text(text)
        done = script("data.py", str(tmp_path / "c.py"), *options)
        assert done.returncode == 2 and says in done.stderr
    shown = script("data.py", "--help").stdout
    assert "--split_seed" in shown and "--epochs" not in shown


@pytest.mark.parametrize("option", ["--text=goal", "--input=a.csv", "--output=b.csv"])
def test_eval_says_where_labelling_went(option):
    done = script("eval.py", "out/a", option)
    expected = f"labelling has moved: python predict.py out/textcls {option}"
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(crop=-1), "--crop=-1 must be above 0"),
        (dict(max_steps=0), "--max_steps=0 must be above 0"),
        (dict(patience=0), "--patience=0 must be above 0"),
        (dict(n_layer=-1), "--n_layer=-1 must be 0 or more"),
        (dict(learning_rate=-1.0), "--learning_rate=-1.0 must be 0 or more"),
        (dict(seed=-1), "--seed=-1 must be 0 or more"),
        (dict(split_seed=-1), "--split_seed=-1 must be 0 or more"),
        (dict(beta1=2.0), "--beta1=2.0 must be from 0 to below 1"),
        (dict(weight_decay=-1.0), "--weight_decay=-1.0 must be 0 or more"),
        (dict(mixup=-1.0), "--mixup=-1.0 must be from 0 to 1"),
        (dict(cooldown=3.0), "--cooldown=3.0 must be from 0 to 1"),
        (dict(dataset="mnist5k", train_file=None, objective="clm"), "needs text, not --kind=image"),
        (
            dict(kind="features", target="number", mixup=0.5),
            "are for classes, not for --target=number",
        ),
        (dict(huber_delta=1.0), "--huber_delta is for --target=number"),
        (dict(teacher_spans=5), "texts that a --teacher labels: there is none"),
        (dict(unlabelled_file="more.txt"), "texts that a --teacher labels: there is none"),
        (dict(folds=2, lr_find=True), "are three things to do: one at a time"),
        (dict(min_lr=0.1), "is above --learning_rate=0.003"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(toy, change, says):
    with pytest.raises(UserError, match=says):
        train.train(train.Config(**toy | change))
    assert not os.path.exists(toy["data_dir"]) and not os.path.exists(toy["out_dir"])


def test_ctrl_c_before_a_script_has_begun_is_no_error():
    """As while torch is being imported."""
    program = (  # what was started in the background ignores it
        "import configurator, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.raise_signal(signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.endswith(": interrupted\n")
    assert "Traceback" not in done.stderr
