"""python -m tools.plan as it is called: tables, the lines to paste, the curve, measured machines, wrong input."""

import dataclasses
import json
import re

import pytest

from tests.running import ROOT, message, run
from tools.plan import Request, build_request, command, config_lines, draw, header, print_report
from tools.plan_formulas import Candidate, best_of_each, simplest
from training.errors import UserError

GPT2 = "--model=gpt2"
MEASURED = "--measured=results/speed_124m/benchmark.json"
WRONG = {
    "unknown strategy": ([GPT2, "--strategies=zero4"], "strategy 'zero4': unknown; did you mean zero"),
    "unknown model": (["--model=gpt2-xxl"], "did you mean gpt2-xl?"),
    "no model": ([], "give a model, --model=gpt2-xl, or a recipe"),
    "model and recipe": ([GPT2, "config/train_gpt2.py"], "and not both"),
    "model and setting": ([GPT2, "--n_layer=3"], "and not both"),
    "setting": (["config/train_gpt2.py", "--n_layr=3"], "unknown key; did you mean n_layer?"),
    "unknown device": ([GPT2, "--device=H10"], "device = 'H10': unknown; did you mean H100?"),
    "a device not in the table": ([GPT2, "--device=TPU"], "name a similar one and your --tflops"),
    "a CPU": ([GPT2, "--device=cpu"], "needs --measured=benchmark.json and the memory of a rank"),
    "no link": ([GPT2, "--nodes=2", "--link=0"], "link = 0.0 (command line): must be from 0.001 to 1,000,000"),
    "link with a unit": ([GPT2, "--nodes=2", "--link=400Gb"], "link = '400Gb' (command line): must be a number"),
    "batch that ranks do not divide": ([GPT2, "--global-batch=12"], "divisible by the 8 ranks; set 8"),
    "batch below the ranks": ([GPT2, "--global_batch=7"], "set 8"),
    "no GPU": ([GPT2, "--gpus=0"], "gpus = 0 (command line): must be from 1 to 100,000"),
    "one GPU for several": (
        [GPT2, "--gpus=1", "--strategies=ddp"],
        "strategies: not possible with 1 ranks on 1 nodes",
    ),
    "memory that is none": ([GPT2, "--gpu-memory=much"], "gpu_memory = 'much' (command line): must be a number"),
    "share": ([GPT2, "--achievable=50"], "achievable = 50.0 (command line): must be from 0.01 to 1"),
    "option": (
        [GPT2, "--gpu-memmory=80"],
        "(command line): unknown key; did you mean gpu_memory?",
    ),
    "dtype": ([GPT2, "--dtype=int8"], "must be one of bfloat16, float16, float32"),
    "dtype of the device": ([GPT2, "--device=V100"], "V100 lacks it; use --dtype=float16 or float32"),
    "recipe": (["config/train_gtp2.py"], "no such config file; did you mean config/train_gpt2.py?"),
    "a number": ([GPT2, "--tflops=many"], "must be a number"),
    "negative": ([GPT2, "--tflops=-1"], "tflops = -1.0 (command line): must not be negative"),
    "curve": ([GPT2, "--curve=x.pdf"], "must be table, or a .png file"),
    "folder of the curve": ([GPT2, "--curve=none/x.png"], "in a folder that exists"),
    "no benchmark": ([GPT2, "--measured=none.json"], "must be a benchmark.json with timed rows, as tools.benchmark"),
    "not a benchmark": ([GPT2, "--measured=results/convert/convert.json"], "must be a benchmark.json with timed rows"),
    "untimed benchmark": ([GPT2, "--measured=results/zero_links/1gbit/benchmark.json"], "must be a benchmark.json"),
    "memory of CPU ranks": ([GPT2, MEASURED], "and the memory of a rank, --gpu_memory=8"),
    "dtype not measured": ([GPT2, MEASURED, "--gpu-memory=8", "--dtype=float32"], "has bfloat16; use or measure it"),
}


def request(*arguments: str) -> Request:
    return build_request(list(arguments))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_ends_in_one_message(name):
    arguments, text = WRONG[name]
    with pytest.raises(UserError) as error:
        print_report(build_request(arguments))
    assert text in str(error.value)


def test_settings_belong_to_the_recipe():
    found = request("config/train_gpt2.py", "--n-layer=24", "--block_size=2048", "--ranks=2", "--global-batch=8")
    assert (found.model.n_layer, found.model.block_size, found.cfg.gpus, found.global_batch) == (24, 2048, 2, 8)
    line = "./launch_traditional_ddp.sh 2 config/train_gpt2.py --n_layer=24 --block_size=2048 config/planned.py"
    ddp = next(c for c in found.candidates() if c.strategy.name == "ddp")
    assert command(found, ddp) == line
    assert request("--n_layer=3").model.n_layer == 3, "of train.py's defaults"
    assert request("config/train_gpt2_fsdp.py", "--shard_ranks=1").recipes == [
        "config/train_gpt2_fsdp.py",
        "--shard_ranks=1",
    ]


def first_lines(*arguments: str) -> str:
    return header(request(*arguments))


def test_defaults_are_shown():
    assert first_lines(GPT2).splitlines()[1:] == [
        "8 GPUs, A100, 80.0 GB each, bfloat16",
        "a step: 512 sequences of 1,024 = 524,288 tokens; the run: 2.49e+09 tokens",
    ]
    lines = first_lines(GPT2, "--gpus=4", "--nodes=2", "--device=H100").splitlines()
    assert lines[1] == "2 nodes of 4 GPUs, H100, 80.0 GB each, bfloat16, 400 Gbit/s between them"


def test_larger_models_need_higher_stages():
    taken = {}
    for model in ("gpt2", "gpt3-6.7b", "gpt3-175b"):
        found = simplest(best_of_each(request(f"--model={model}", "--gpus=8", "--nodes=2").candidates()))
        assert found, model
        taken[model] = found
    assert taken["gpt2"].strategy.name == "ddp"
    assert taken["gpt3-6.7b"].strategy.stage > 0 and not taken["gpt3-6.7b"].offloads
    assert taken["gpt3-175b"].offloads, "175 billion parameters on 16 GPUs"


def test_room_is_left_where_there_is_a_choice():
    asked = ("--model=gpt3-6.7b", "--strategies=zero2")

    def without_checkpointing(*options: str) -> list[Candidate]:
        return [c for c in request(*asked, *options).candidates() if not c.checkpointing]

    needed = without_checkpointing()[1].memory / 0.97e9  # 2 sequences would fill such a device to 97 %
    found = without_checkpointing(f"--gpu_memory={needed:.3f}")
    assert [c.batch for c in found if c.spare >= 0] == [1, 2] and simplest(best_of_each(found)) == found[0]
    assert simplest(best_of_each(found[1:])) == found[1], "what fits is refused"


def test_a_recipe_gives_model_batch_and_run(tmp_path):
    (tmp_path / "six.py").write_text("n_layer = 6\n")
    found = request("config/train_gpt2.py", f"{tmp_path}/six.py", "--dtype=float32")
    assert (found.model.n_layer, found.model.vocab_size, found.model.bias) == (6, 50304, False)
    assert (found.global_batch, found.tokens) == (480, 600000 * 480 * 1024)
    taken = found.candidates()[0]
    lines = config_lines(found, taken)
    assert f"batch_size = {taken.batch}" in lines and not any("n_layer" in line for line in lines)
    line = "./launch_traditional_ddp.sh 8 config/train_gpt2.py"
    assert command(found, taken) == f"{line} {tmp_path}/six.py config/planned.py"


COMMANDS = {
    "fsdp_hsdp": "HOSTFILE=hostfile ./launch_fsdp.sh config/planned.py --shard_ranks=8",
    "fsdp_grad_op": "HOSTFILE=hostfile ./launch_fsdp.sh config/planned.py --reshard_after_forward=False",
    "zero1": "HOSTFILE=hostfile ./launch_deepspeed_zero1.sh config/planned.py",
    "zero3_nvme": "HOSTFILE=hostfile ./launch_deepspeed_zero3_nvme.sh config/planned.py --nvme_path=/local_nvme",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_a_strategy(name):
    asked = request(GPT2, "--nodes=2", f"--strategies={name}")
    taken = asked.candidates()[0]
    assert command(asked, taken) == COMMANDS[name]
    other = dataclasses.replace(taken.strategy, name="mine", arguments=("--deepspeed_config=mine.json",))
    taken.strategy = other
    assert "--deepspeed_config=mine.json" in command(asked, taken), (
        "a JSON of the user's, with the launcher of its stage"
    )


def test_what_was_measured_takes_the_place_of_table_and_assumptions(tmp_path):
    found = request(GPT2, MEASURED, "--gpus=2", "--gpu_memory=8").cfg
    row = json.loads((ROOT / "results/speed_124m/benchmark.json").read_text())["rows"][0]
    assert not found.on_gpu and found.tflops == row["ceiling_flops"] / 2e12 and found.gpu_memory == 8
    assert found.baseline == row["memory"]["interpreter"] / 1e9 and 0.4 < found.achievable < 0.6
    (tmp_path / "short.py").write_text("block_size = 256\n")
    its_step = ("config/train_gpt2.py", f"{tmp_path}/short.py", "--global_batch=4")
    candidates = request(*its_step, MEASURED, "--gpus=2", "--gpu_memory=8").candidates()
    predicted = next(c.computing for c in candidates if c.batch == 2)
    measured = sum(row["breakdown_ms"][part] for part in ("forward", "backward")) / 1e3
    assert predicted == pytest.approx(measured, rel=0.05), "it is the step that was measured"
    benchmark = json.loads((ROOT / "results/speed_124m/benchmark.json").read_text())
    benchmark["machine"] = {"matmul_flops": {"bfloat16": 3e11, "float32": 1e11}, "link_bytes_per_second": 2e9}
    benchmark["machine"]["process_bytes"] = 3e8
    (tmp_path / "benchmark.json").write_text(json.dumps(benchmark))
    mine = (f"--measured={tmp_path}/benchmark.json", "--gpus=2", "--gpu_memory=8")
    found = request(GPT2, *mine, "--dtype=float32").cfg
    assert (found.tflops, found.node_link, found.link_share, found.baseline) == (0.1, 16, 1, 0.3)
    found = request(GPT2, *mine, "--baseline=1", "--achievable=0.9", "--tflops=0.5").cfg
    assert (found.tflops, found.baseline, found.achievable) == (0.5, 1, 0.9), "what is given goes before it"


def test_a_benchmark_of_gpus(tmp_path):
    benchmark = json.loads((ROOT / "results/speed_124m/benchmark.json").read_text())
    benchmark["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    for row in benchmark["rows"]:
        row["peak_device_bytes"] = 10**9
    (tmp_path / "benchmark.json").write_text(json.dumps(benchmark))
    found = request(GPT2, f"--measured={tmp_path}/benchmark.json").cfg
    assert (found.device, found.gpu_memory, found.baseline, found.node_link) == ("H100", 80, 1.5, 3600)
    assert found.tflops == benchmark["rows"][0]["ceiling_flops"] / 2e12


def test_the_command_says_what_to_paste():
    done = run("-m", "tools.plan", "--model=gpt2-xl", "--gpus=8", "--gpu-memory=80")
    assert done.returncode == 0, done.stderr
    keys = dict(re.findall(r"^(\w+) = (\S+)", done.stdout, re.M))
    assert int(keys["batch_size"]) * int(keys["gradient_accumulation_steps"]) * 1024 == 2**19
    assert "\n./launch_" in done.stdout


def test_the_page_shows_what_is_printed():
    text = (ROOT / "docs/plan.md").read_text()
    pairs = re.findall(r"```sh\npython ([^\n]*)\n```\n\n```\n(.*?)```", text, re.S)
    assert len(pairs) == 2
    for line, shown in pairs:
        assert run(*line.split()).stdout == shown


def test_what_fits_nowhere_is_an_error():
    done = run("-m", "tools.plan", "--model=gpt3-175b", "--gpus=2", "--strategies=zero2,zero3")
    nothing = r"nothing fits: zero3 (\w\wp?2 )?comes nearest and lacks .* per rank; take more or larger"
    assert re.search(nothing, message(done))
    assert "config/planned.py" not in done.stdout


def test_a_curve_leaves_out_what_is_impossible():
    asked = request("--model=gpt3-6.7b", "--strategies=ddp", "--curve=table")
    assert not asked.at(1).candidates() and {c.strategy.name for c in asked.at(2).candidates()} == {"ddp"}


def test_the_curve(tmp_path):
    """Tokens/s per GPU of five strategies; DDP begins with one process, and 6.7 billion parameters never fit it."""
    figure = tmp_path / "curve.png"
    done = run("-m", "tools.plan", "--model=gpt3-6.7b", f"--curve={figure}")
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *([\d,]+|GPUs)  ", line)]
    assert head == ["GPUs", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]
    assert [int(row[0].replace(",", "")) for row in rows] == [2**power for power in range(11)]
    assert all(row[1] == "-" for row in rows) and rows[0][4] == "-" and rows[-1][4] != "-"
    assert figure.stat().st_size > 20_000
    shown = run("-m", "tools.plan", GPT2, "--curve=table", "--strategies=zero1,fsdp").stdout
    assert len(shown.splitlines()) == 3 + 1 + 2 + 1 + 11, "without a file, the table only"
    assert "\n GPUs    zero1     fsdp\n    1  " in shown
    one = request(GPT2, "--gpus=1", "--strategies=fsdp").candidates()
    rate = max(c.tokens_per_second for c in one)
    assert re.search(rf"\n +1 +[\d,]+ +{rate:,.0f}\n", shown), "fsdp on one GPU"


def test_lines_of_the_curve_have_names():
    """In the line's color, to the right of all lines."""
    rates = {"a": {1: 5.0, 2: 1.0}, "b": {1: 5.0, 2: 1.01}, "none fits": {}}
    figure = draw("one\ntwo\nthree", rates)
    figure.canvas.draw()
    (axes,) = figure.axes
    texts = axes.get_legend().get_texts()
    assert {text.get_text() for text in texts} == {"a", "b"}
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    assert all(text.get_color() == colors[text.get_text()] for text in texts)
    assert axes.get_legend().get_window_extent().x0 >= axes.bbox.x1


def test_wrong_input_ends_with_status_2():
    assert "did you mean gpt2-xl?" in message(run("-m", "tools.plan", "--model=gpt2-xxl"))
    done = run("-m", "tools.plan", "-h")
    assert done.returncode == 0 and "--gpu_memory" in done.stdout and "Assumptions:" in done.stdout
