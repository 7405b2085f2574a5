"""Texts of any size and number are labelled in order with flat memory, as they come; bad ones get
one sentence."""

import csv
import os
import shutil
import subprocess
import sys

from configurator import UserError

import pytest

import train
from labelling import label_file
from predict import Classifier, Config
from tests.conftest import ROOT, write_toy

MEASURED = (
    "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
    "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "finally:\n"
    "    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
    "    print('peak', peak, file=sys.stderr)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run's folder; its data set is gone."""
    folder = tmp_path_factory.mktemp("run")
    train.train(
        train.Config(
            dataset="toy",
            train_file=str(write_toy(folder / "toy.csv")),
            data_dir=str(folder / "data"),
            vocab_size=300,
            out_dir=str(folder / "out"),
            max_len=32,
            n_layer=1,
            d_model=32,
            n_head=2,
            batch_size=16,
            epochs=6.0,
            warmup_steps=3,
            learning_rate=0.003,
            wandb_mode="disabled",
            dtype="float32",
            device="cpu",
        )
    )
    shutil.rmtree(folder / "data")
    os.remove(folder / "toy.csv")
    return folder / "out"


def start(*args):
    command, pipe = (
        [sys.executable, "-c", MEASURED, str(ROOT / "predict.py"), *map(str, args)],
        subprocess.PIPE,
    )
    return subprocess.Popen(
        [*command, "--dtype=float32"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )


def peak(stderr):
    return int(stderr.split(b"peak ")[1])  # MiB


def test_lines_are_answered_before_the_next_is_written(run):
    process = start(run, "--text=-")
    for line, label in (
        (b"goal striker\n", b"sport"),
        (b"\nshares bank euro\r\n", b"money"),
        (b"laptop code", b"tech"),
    ):
        process.stdin.write(line)
        process.stdin.flush() if line.endswith(b"\n") else process.stdin.close()
        assert process.stdout.readline().startswith(label)
    assert process.wait() == 0


def test_memory_stays_flat_and_order_is_kept(run, tmp_path):
    base = peak(start(run, "--text=-").communicate(b"goal\n")[1])
    long = b"shares bank profit " * 550_000  # 10 MB
    out, err = start(run, "--text=-").communicate(b"goal striker\n" + long + b"\nlaptop chip\n")
    assert [line.split()[0] for line in out.splitlines()] == [b"sport", b"money", b"tech"]
    assert peak(err) < base + 100
    texts = [["goal match", "shares bank", "laptop chip"][i % 3] + f" {i}" for i in range(50_000)]
    texts[7], texts[8], texts[-1] = long.decode(), "", "goal striker " * 400_000
    with open(tmp_path / "in.csv", "w", newline="") as f:
        csv.writer(f).writerows([["text"], *([t] for t in texts)])
    process = start(run, f"--input={tmp_path}/in.csv", f"--output={tmp_path}/out.csv")
    out, err = process.communicate()
    assert process.returncode == 0 and b"50000 rows labelled" in out, err
    assert peak(err) < base + 150
    got = [r["label"] for r in csv.DictReader(open(tmp_path / "out.csv"))]
    assert got[:3] + got[7:8] + got[-2:] == ["sport", "money", "tech", "money", "sport", "sport"]
    assert got[9:3000] == [r["label"] for r in Classifier(run)(texts[9:3000])]


@pytest.mark.parametrize(
    "sent, says",
    [
        (
            b"goal\nshares\ncaf\xe9 bank\n",
            "standard input, line 3: not valid utf-8 (byte 0xe9 at column 3)",
        ),
        (b"", "standard input: holds no texts"),
        (b"\n \n", "standard input: holds no texts"),
    ],
)
def test_bad_standard_input(run, sent, says):
    process = start(run, "--text=-")
    out, err = process.communicate(sent)
    assert process.returncode == 2 and says in err.decode() and "Traceback" not in err.decode()
    assert len(out.splitlines()) == 2 * sent.startswith(b"goal")  # what came before it is answered


def test_standard_input_in_another_encoding(run):
    process = start(run, "--text=-", "--encoding=latin1")
    out, _ = process.communicate("goal caf\xe9 striker\n".encode("latin1"))
    assert process.returncode == 0 and "caf\xe9" in out.decode()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("e.csv", b"", "holds no rows"),
        ("e.csv", b"text\n", "holds no rows"),
        ("e.csv", b"body\na\n", "no column 'text'"),
        ("e.jsonl", b"{}\n", "line 1: there is no key 'text'"),
        ("e.csv", b"text\ncaf\xe9\n", "line 2: not valid utf-8"),
        ("e.csv.gz", b"text\n", "cannot be read"),
        ("e.pdf", b"x", "of files, .*.csv, .* can be read"),
    ],
)
def test_bad_files(run, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        label_file(
            Classifier(run), Config(input=str(tmp_path / name), output=str(tmp_path / "out.csv"))
        )
    assert not list(tmp_path.glob("out.csv*"))


def test_a_file_in_another_encoding(run, tmp_path):
    (tmp_path / "e.csv").write_bytes("text\ncafé striker goal\n".encode("cp1252"))
    settings = dict(input=str(tmp_path / "e.csv"), output=str(tmp_path / "out.csv"))
    label_file(Classifier(run), Config(**settings, encoding="utf-8,cp1252"))
    assert [r["label"] for r in csv.DictReader(open(tmp_path / "out.csv"))] == ["sport"]


def test_the_input_is_never_replaced_by_the_output(run, tmp_path):
    (tmp_path / "e.csv").write_text("text\ngoal\n")
    for output in (tmp_path / "e.csv", tmp_path / "x/../e.csv"):
        with pytest.raises(UserError, match="is the input, which it would replace"):
            label_file(Classifier(run), Config(input=str(tmp_path / "e.csv"), output=str(output)))
    (tmp_path / "f.csv").write_text("text\nshares\n")
    several = f"{tmp_path}/e.csv + {tmp_path}/f.csv", f"{tmp_path}/?.csv"
    for source in several:
        with pytest.raises(UserError, match="is the input, which it would replace"):
            label_file(Classifier(run), Config(input=source, output=str(tmp_path / "f.csv")))
    assert (tmp_path / "e.csv").read_text() == "text\ngoal\n"
    assert (tmp_path / "f.csv").read_text() == "text\nshares\n"


def test_rows_that_are_left_out_are_counted(run, tmp_path, capsys):
    (tmp_path / "e.jsonl").write_text('{"text": "goal"}\n{"body": "x"}\n{"text": "bank"}\n')
    label_file(
        Classifier(run),
        Config(input=f"{tmp_path}/e.jsonl", output=f"{tmp_path}/o.csv", drop_bad_rows=True),
    )
    assert "2 rows labelled; 1 left out, that could not be read" in capsys.readouterr().out


def test_a_users_own_temporary_file_is_left_alone(run, tmp_path):
    for name in ("o.tmp.csv", "e.csv"):
        (tmp_path / name).write_text("text\ngoal\n")
    for source in ("e.csv", "o.tmp.csv"):
        label_file(
            Classifier(run), Config(input=f"{tmp_path}/{source}", output=f"{tmp_path}/o.csv")
        )
        assert len(open(tmp_path / "o.csv").readlines()) == 2
    assert (tmp_path / "o.tmp.csv").read_text() == "text\ngoal\n"


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(text_pair_column="b"), "reads single texts: leave --text_pair_column out"),
        (dict(text_column=[]), "no column is named"),
        (dict(max_row_mb=0), "--max_row_mb=0 must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(run, tmp_path, changes, says):
    (tmp_path / "e.csv").write_text("text,b\ngoal,it\n")
    settings = dict(input=f"{tmp_path}/e.csv", output=f"{tmp_path}/o.csv")
    with pytest.raises(UserError, match=says):
        label_file(Classifier(run), Config(**settings | changes))


def test_kept_columns_of_any_name_go_into_parquet(run, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "e.csv").write_text("text,p_id,value\ngoal,a1,b2\n")
    settings = dict(input=f"{tmp_path}/e.csv", output=f"{tmp_path}/o.parquet")
    label_file(Classifier(run), Config(**settings, keep=["p_id", "value"], probabilities=True))
    (row,) = pyarrow.read_table(tmp_path / "o.parquet").to_pylist()
    assert (row["p_id"], row["value"], row["label"]) == ("a1", "b2", "sport")
    assert isinstance(row["p_tech"], float)


def test_one_thing_at_a_time(run):
    done = subprocess.run(
        [sys.executable, str(ROOT / "predict.py"), str(run), "--prompt=a", "--text=b"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "are four things to do: one at a time" in done.stderr
    done = subprocess.run(
        [sys.executable, str(ROOT / "predict.py"), str(run), "--text=b", "--output=o.csv"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "are for --input" in done.stderr
