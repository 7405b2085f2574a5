"""Environments that we have not: variables of launchers, clusters and notebooks; closed streams;
files that may not be read."""

import netrc
import os
import shutil
import subprocess
import sys

import configurator
from configurator import UserError

import pytest

import data
import runs
import train
from tests.conftest import ROOT, write_toy
from tests.forks import script
from weights import load_checkpoint

AS_A_USER = ["setpriv", "--inh-caps=-dac_override,-dac_read_search",
             "--bounding-set=-dac_override,-dac_read_search"]  # fmt: skip


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(RANK="", WORLD_SIZE="2"), None),
        (dict(WORLD_SIZE="8"), None),
        (dict(RANK="1"), None),
        (dict(RANK="0", WORLD_SIZE="1"), None),
        (dict(RANK="a", WORLD_SIZE="2"), "RANK=a and WORLD_SIZE=2"),
        (
            dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost"),
            "unset them, or start the script",
        ),
        (dict(RANK="0", WORLD_SIZE="2"), "not all that torchrun sets"),
    ],
)
def test_what_a_launcher_has_left_is_no_run_of_several(toy, monkeypatch, given, says):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if says:
        with pytest.raises(UserError, match=says):
            train.train(train.Config(**toy))
    else:
        train.train(train.Config(**toy | dict(max_steps=2)))
        assert load_checkpoint(f"{toy['out_dir']}/last.pt")["finished"]


def test_a_script_says_so_too(toy, monkeypatch):
    toy |= dict(max_steps=2)
    monkeypatch.setenv("RANK", "")
    assert script("train.py", **toy).returncode == 0
    monkeypatch.setenv("RANK", "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = script("train.py", **toy)
    assert done.returncode == 2 and "RANK=a and WORLD_SIZE=2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("other", ["d-raw/a.csv", "d2/a.csv", "a.csv"])
def test_an_error_of_a_file_that_is_read_is_not_said_to_be_of_writing(tmp_path, other):
    with pytest.raises(FileNotFoundError, match="a.csv"):
        with configurator.scratch_folder(tmp_path / "d"):
            open(tmp_path / other)


def test_a_network_that_is_not_there_is_named(toy, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    done = script("train.py", processes=2, **toy)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the processes do not find each other" in done.stderr and "eth9" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_closed_streams(toy, closed):
    options = " ".join(f"--{key}={value}" for key, value in (toy | dict(max_steps=2)).items())
    command = f"{sys.executable} {ROOT}/train.py {options} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(f"{toy['out_dir']}/last.pt")["finished"]


def test_a_notebooks_way_to_draw_is_not_asked_for(toy, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    train.train(train.Config(**toy))
    done = script("eval.py", toy["out_dir"], "--wandb_mode=disabled")
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
@pytest.mark.parametrize("what", ["label", "table", "table among several", "checkpoint"])
def test_what_may_not_be_read_is_named(toy, tmp_path, what):
    folder = tmp_path / "labels"
    for label in ("neg", "pos", "mid"):
        (folder / label).mkdir(parents=True)
        for i in range(20):
            (folder / label / f"{i}.txt").write_text(f"{label} text {i}")
    build = [str(ROOT / "data.py"), "--dataset=d", f"--data_dir={tmp_path}/d"]
    if what == "label":
        secret, command = folder / "mid", [*build, f"--train_file={folder}"]
    elif what == "checkpoint":
        train.train(train.Config(**toy | dict(max_steps=2)))
        secret = tmp_path / "out/best.pt"
        command = [str(ROOT / "predict.py"), toy["out_dir"], "--text=goal"]
    else:
        secret = write_toy(tmp_path / "secret.csv")
        several = " + ".join([toy["train_file"], str(secret)])
        source = secret if what == "table" else several
        command = [*build, f"--train_file={source}"]
    os.chmod(secret, 0)
    done = subprocess.run([*AS_A_USER, sys.executable, *command], capture_output=True, text=True)
    if "setpriv:" in done.stderr:
        pytest.skip(done.stderr)
    os.chmod(secret, 0o700)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert f"{secret}" in line and "Permission denied" in line and "overwrite" not in line
    assert "cannot be written" not in line and not (tmp_path / "d/d/meta.json").exists()


def test_a_changed_source_with_an_old_date_is_noticed(toy, tmp_path):
    cfg = train.Config(**toy)
    data.open_or_build(cfg)
    other = write_toy(tmp_path / "other.csv", seed=1)
    os.utime(other, (0, 0))
    os.replace(other, cfg.train_file)
    with pytest.raises(UserError, match="has changed since"):
        data.open_or_build(cfg)


def test_a_login_to_wandb_is_seen(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    login = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(login))
    assert not runs.has_wandb_login()
    program = "import wandb; wandb.login(key='0123456789' * 4, verify=False)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert netrc.netrc(login).hosts and runs.has_wandb_login(), wandb.__version__
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not runs.has_wandb_login()
    login.write_text("machine wandb.example.org:8080\nlogin user\npassword secret\n")
    assert runs.has_wandb_login()
    login.write_text("machine wandb.example.org:8080\nlogin user\n")
    assert not runs.has_wandb_login()
    login.write_bytes(b"machine \xff\n")
    assert not runs.has_wandb_login()


def test_without_a_network_a_run_is_kept_offline(toy, monkeypatch):
    """Also on a machine where one is logged in; but not where --wandb_mode=online was asked for."""
    pytest.importorskip("wandb")
    monkeypatch.setattr(runs, "WANDB_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    toy |= dict(max_steps=2)
    train.train(train.Config(**toy | dict(wandb_mode="auto")))
    assert list((runs.Path(toy["out_dir"]) / "wandb").glob("offline-run-*"))
    with pytest.raises(UserError, match="--wandb_mode=online: .*--wandb_mode=offline"):
        train.train(train.Config(**toy | dict(wandb_mode="online", overwrite=True)))
    monkeypatch.setenv("WANDB_DISABLED", "true")
    shutil.rmtree(toy["out_dir"])
    train.train(train.Config(**toy | dict(wandb_mode="auto")))
    assert not (runs.Path(toy["out_dir"]) / "wandb").exists()


def test_a_message_in_another_encoding_than_its_file(capsys, monkeypatch):
    def fail():
        raise UserError("no such file: \udcc3\udcbc.csv")

    with pytest.raises(SystemExit, match="2"):
        configurator.run(fail)
    assert r"\udcc3\udcbc.csv" in capsys.readouterr().err


def test_folders_with_links_that_go_round(tmp_path):
    for label in ("neg", "pos"):
        (tmp_path / "texts" / label).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "texts" / label / f"{i}.txt").write_text(f"{label} text {i}")
    (tmp_path / "texts/pos/back").symlink_to(tmp_path / "texts")
    (tmp_path / "texts/other").symlink_to(tmp_path / "texts/neg")  # a label's folder may be a link
    cfg = train.Config(dataset="d", train_file=f"{tmp_path}/texts", data_dir=f"{tmp_path}/data")
    cfg.dedup = False
    assert data.build(cfg)["label_names"] == ["neg", "other", "pos"]
