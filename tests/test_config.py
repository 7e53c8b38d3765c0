"""Settings: nanoGPT's files and command lines, --help, and the recipes."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from itertools import takewhile

import pytest

from model import GPTConfig
from tests.running import ROOT, run
from training.config import PlainTrainConfig, TrainConfig, parse
from training.deepspeed_config import DeepSpeedTrainConfig, read, strategy_of
from training.errors import ConfigError

RECIPES = sorted((ROOT / "config").glob("*.py"))
# in the manner of nanoGPT's config files
NANOGPT = """
# launch: torchrun --standalone --nproc_per_node=8 train.py
import time

out_dir = 'out-mine'
wandb_log = False  # feel free to turn on — naïvely
wandb_run_name = 'ft-' + str(time.time())
init_from = 'gpt2-xl'  # this is the largest
gradient_accumulation_steps = 5 * 8
learning_rate = 1e-3
min_lr = 0 # an int where a float is meant
always_save_checkpoint = False
compile = False
# device = 'cpu'
beta2 = 0.99
"""


def settings(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "")


def problems(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        settings(*argv)
    return str(error.value)


def test_nanogpts_files_and_command_lines(tmp_path):
    (tmp_path / "mine.py").write_text(NANOGPT)
    line = "--device=cpu --compile=False --eval_iters=20 --block_size=64 --dropout=0.0 --max_iters=2000 --dtype=float32"
    cfg = settings(str(tmp_path / "mine.py"), *line.split())
    assert (cfg.out_dir, cfg.gradient_accumulation_steps, cfg.min_lr, cfg.device) == ("out-mine", 40, 0.0, "cpu")
    assert (cfg.block_size, cfg.dropout, cfg.compile, cfg.wandb_run_name[:3]) == (64, 0.0, False, "ft-")


def test_what_deepspeeds_launcher_and_its_users_add():
    file = str(ROOT / "deepspeed_configs" / "zero1_config.json")
    argv = ["--local_rank=1", str(RECIPES[0]), "--deepspeed", "--deepspeed_config", file]
    assert parse(DeepSpeedTrainConfig, argv, "").deepspeed_config == file
    assert settings("--local-rank=0", "--batch-size=3").batch_size == 3
    assert "belongs to train_deepspeed.py" in problems("--deepspeed", "--deepspeed_config", "a.json")


def test_a_json_is_not_a_config_file(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    path = tmp_path / "ds.json"
    fix = f"{path}: is not a config file; write train_deepspeed.py --deepspeed_config={path}"
    assert fix in problems(str(path))


def test_a_config_file_that_overrides_the_command_line_says_so(tmp_path, capsys):
    (tmp_path / "x.py").write_text("batch_size = 4\nblock_size = 8\n")
    assert settings("--batch_size=2", str(tmp_path / "x.py"), "--block_size=16").batch_size == 4
    note = f"note: {tmp_path / 'x.py'}:1 sets batch_size = 4 after the command line did; the later one wins\n"
    assert capsys.readouterr().out == note


def test_nanogpts_keys_have_its_defaults():
    """As its train.py gives them; those that it detects from the machine are `auto` here."""
    theirs = {
        **{"eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False, "init_from": "scratch"},
        **{"always_save_checkpoint": True, "wandb_log": False, "dataset": "openwebtext"},
        **{"gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024, "n_layer": 12, "n_head": 12},
        **{"n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600000},
        **{"weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True},
        **{"warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "compile": True, "out_dir": "out"},
    }
    ours = dataclasses.asdict(settings())
    assert {key: ours[key] for key in theirs} == theirs


def test_the_later_one_wins(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 1\nn_layer = 2\n")
    (tmp_path / "b.py").write_text("batch_size = batch_size + 1\n")  # it sees what was set before
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    assert settings(a, b).batch_size == 2
    assert settings(a, "--batch_size=7").batch_size == 7
    assert settings("--batch_size=7", a).batch_size == 1
    assert settings("--batch_size=7", b).batch_size == 8


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().batch_size = 3  # type: ignore[misc]


def test_help_lists_every_key_with_type_default_and_meaning():
    for script, count in [("train.py", len(dataclasses.fields(PlainTrainConfig))), ("sample.py", 12)]:
        done = run(script, "--help")
        assert done.returncode == 0 and done.stderr == ""
        lines = re.findall(r"^  --\w+ +(?:str|int|float|bool) +\S* +\S.*$", done.stdout, re.M)
        assert len(lines) == count
        assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("script", ["train.py", "train_deepspeed.py", "sample.py"])
def test_help_whose_reader_has_gone_ends_without_a_traceback(script):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


ABOVE_0 = "eval_interval eval_iters log_interval keep_checkpoints gradient_accumulation_steps batch_size block_size"
ABOVE_0 += " n_layer n_head n_embd n_active learning_rate muon_lr max_iters steps sequence_parallel"
FROM_0 = "weight_decay grad_clip warmup_iters lr_decay_iters min_lr seed max_minutes hang_minutes"
FROM_0 += " n_hidden n_kv_head head_size rope_theta n_expert expert_balance"
RANGES = {
    **dict.fromkeys(ABOVE_0.split(), ("0", "must be above 0")),
    **dict.fromkeys(FROM_0.split(), ("-1", "must not be negative")),
    **dict.fromkeys(["dropout", "beta1", "beta2"], ("1", "must be at least 0 and below 1")),
}


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_range_is_told(key):
    value, rule = RANGES[key]
    told = problems(f"--{key}={value}")
    assert told.count("\n") == 1 and re.search(rf"{key} = {value}(\.0)? \(command line\): {rule}$", told)


def test_every_number_has_a_range_whose_lowest_value_is_good():
    numbers = {f.name for f in dataclasses.fields(TrainConfig) if type(f.default) in (int, float)}
    assert numbers == RANGES.keys()
    assert settings(*(f"--{key}=0" for key in RANGES if key not in ABOVE_0.split())).beta2 == 0


@pytest.mark.parametrize(
    "argument, rule",
    [
        ("--dtype=fp16", "must be one of auto, float32, bfloat16, float16"),
        ("--backend=mpi", "must be one of auto, nccl, gloo"),
        ("--norm=rms_norm", "must be one of layernorm, rmsnorm; did you mean rmsnorm?"),
        ("--mlp=swigelu", "must be one of gelu, swiglu, relu2; did you mean swiglu?"),
        ("--n_kv_head=5", "must divide n_head = 12, or be 0 for as many"),
        ("--beta1=-0.1", "must be at least 0 and below 1"),
        ("--learning_rate=nan", "must be a finite number"),
        ("--learning_rate=inf", "must be a finite number"),
        ("--compile=yes", "must be True or False (bool)"),
        ("--batch_size=True", "must be a whole number (int)"),
        ("--dropout=", "must be a number (float)"),
        ("--batch_size=1000000000000000000", "must be at most 2,147,483,647"),
        ("--hang_minutes=1e300", "must be at most 525,600 (a year); 0: no limit"),
        ("--max_minutes=1e300", "must be at most 525,600 (a year); 0: no limit"),
    ],
)
def test_rules(argument, rule):
    key = argument.removeprefix("--").split("=")[0]
    assert f"{key} = " in problems(argument) and f"(command line): {rule}" in problems(argument)


NULL = "FILE:1:" if sys.version_info >= (3, 11, 4) else "FILE: ValueError:"  # a SyntaxError since then


@pytest.mark.parametrize(
    "text, told",
    [
        ("n_layer = True", "n_layer = True (FILE:1): must be a whole number (int)"),
        ("\nn_layer = int", "n_layer = <class 'int'> (FILE:2): must be a whole number (int)"),
        ("import sys\nsys.exit()", "FILE:2: SystemExit"),
        ("caf\xe9 = 1", "FILE: UnicodeDecodeError: 'utf-8' codec can't decode"),
        ("import broken", "FOLDER/broken.py:3: invalid syntax"),
        ("a = 1\n\0", f"{NULL} source code string cannot contain null bytes"),
        ("n_layer = list(range(10**6))", f"n_layer = {str(list(range(100)))[:200]} (FILE:1): must be a whole number"),
        ("class E(Exception):\n __str__ = None\nraise E", "FILE:3: <run_path>.E: <exception str() failed>"),
        ("n_layer = " + "1+" * 50_000 + "1", "FILE: RecursionError: maximum recursion depth exceeded"),
        ("def f(): f()\nf()", "FILE:1: RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_what_a_config_file_cannot_do(tmp_path, monkeypatch, text, told):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("\n\nx = = 1")
    path = tmp_path / "a.py"
    path.write_text(text, encoding="latin-1")
    assert told.replace("FILE", str(path)).replace("FOLDER", str(tmp_path)) in problems(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(tmp_path, make):
    make(tmp_path / "a.py")
    assert problems(str(tmp_path / "a.py")) == f"1 problem in the settings\n  {tmp_path}/a.py: no such config file"


@pytest.mark.parametrize(
    "text, told",
    [
        ("[1]", "config.json: is damaged; remove it, and give the run's settings yourself"),
        ("[" * 100_000, "config.json: is damaged; remove it, and give the run's settings yourself"),
        ("\xff", "config.json: is damaged; remove it, and give the run's settings yourself"),
        ('{"n_layer": "2"}', "n_layer = '2' (FOLDER/config.json): must be a whole number (int)"),
        ('{"n_layer": null}', "n_layer = None (FOLDER/config.json): must be a whole number (int)"),
        ('{"beta1": [NaN]}', "beta1 = [nan] (FOLDER/config.json): must be a number (float)"),
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_config_of_the_resumed_run(tmp_path, text, told):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert told.replace("FOLDER", str(tmp_path)) in problems("--init_from=resume", f"--out_dir={tmp_path}")


def test_a_setting_without_its_dashes():
    assert "batch_size=4: no such config file; did you mean --batch_size=4?" in problems("batch_size=4")


def test_accumulation_is_divided_by_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "must be divisible by the number of ranks, 3; set 39 or 42" in problems()
    assert settings("--gradient_accumulation_steps=42").gradient_accumulation_steps == 42


def test_large_vocabularies_are_padded():
    assert settings().model_config(50257).vocab_size == 50304
    assert settings().model_config(65).vocab_size == 65


def test_the_model_gets_all_its_settings():
    line = "--n_layer=3 --n_head=4 --n_embd=20 --block_size=7 --dropout=0.5 --bias=True --activation_checkpointing=True"
    model = settings(*line.split()).model_config(65)
    assert model == GPTConfig(7, 65, 3, 4, 20, 0.5, True, "none", True)
    assert not settings("--bias=False").model_config(65).bias


def test_a_settings_file_may_compute_but_helpers_are_marked(tmp_path):
    text = "_width = 64\nn_embd = 12 * _width\ndef f(): pass\ng = lambda: 1\n"
    (tmp_path / "a.py").write_text(text)
    assert settings(str(tmp_path / "a.py")).n_embd == 768
    (tmp_path / "a.py").write_text("from string import digits as out_dir")
    assert settings(str(tmp_path / "a.py")).out_dir == "0123456789"
    (tmp_path / "a.py").write_text("width = 64\n")
    assert "a.py:1): unknown key" in problems(str(tmp_path / "a.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes(path):
    cls = DeepSpeedTrainConfig if "deepspeed" in path.name else PlainTrainConfig
    cfg = parse(cls, [str(path)], "")
    if isinstance(cfg, DeepSpeedTrainConfig):
        assert strategy_of(read(cfg.deepspeed_config)) == path.stem.removeprefix("train_gpt2_deepspeed_")
        assert (cfg.n_layer, cfg.max_iters) == (12, 600000), "it is another recipe than config/train_gpt2.py"
    assert cfg.lr_decay_iters <= cfg.max_iters or not cfg.decay_lr
    lines = path.read_text().splitlines()
    comment = "\n".join(takewhile(lambda line: line.startswith("#"), lines))
    assert f"config/{path.name}" in comment, "it does not say how it is launched"
    assert re.search(r"loss|gpt2", comment), "it does not say what it should reach"
    assert max(map(len, lines)) <= 120
