"""plan.py as it is called: tables, JSON, the curve, calibration, and one message for what is wrong."""

import json
import re
from dataclasses import replace

import pytest

from tests.running import ROOT, message, run
from training.errors import UserError
from training.plan import calibrate, check, machine_file, probe, request
from training.plan.case import Case
from training.plan.choice import best_of_each, options, recommended
from training.plan.footprint import footprint
from training.plan.options import parse
from training.plan.strategies import STRATEGIES
from training.plan.timing import timing

GPT2 = "--model=gpt2"
MACHINE = machine_file.Measured(
    device="a CPU",
    kind="cpu",
    ranks=2,
    dtype="float32",
    memory=8e9,
    flops=1e11,
    achievable=0.5,
    memory_rate=1e10,
    update_rate=5e9,
    link=1e9,
    latency=1e-4,
    baselines={"ddp": 3e8, "zero2": 5e8, "zero3": 5e8},
    overheads={"ddp": 0.0, "zero2": 1e-4, "zero3": 1e-3},
    n_embd=256,
    block_size=128,
)
WRONG = {
    "unknown strategy": ([GPT2, "--strategies=zero4"], "strategies: 'zero4': unknown; did you mean zero"),
    "unknown model": (["--model=gpt2-xxl"], "model = 'gpt2-xxl': unknown; did you mean gpt2-xl?"),
    "no model": ([], "no model; write --model=gpt2-xl, or --parameters=7.5e9"),
    "two models": ([GPT2, "--parameters=1e9"], "contradict each other"),
    "unknown device": ([GPT2, "--device=H10"], "did you mean h100? Or write its numbers, --tflops="),
    "device without a table": ([GPT2, "--device=TPU"], "not in the table; write its numbers, --tflops="),
    "unknown link": ([GPT2, "--nodes=2", "--link=ndrr"], "did you mean ndr? Or write a number, --link=400Gb"),
    "link without nodes": ([GPT2, "--link=400Gb"], "is between nodes, and there is one; add --nodes=2"),
    "batch that ranks do not divide": ([GPT2, "--global-batch=12"], "divisible by the 8 ranks, under every strategy"),
    "batch below the ranks": ([GPT2, "--global-batch=7"], "take 8"),
    "micro-batch": ([GPT2, "--global-batch=32", "--batch_size=3"], "take one of 1, 2, 4"),
    "no GPU": ([GPT2, "--gpus=0"], "gpus = 0: must be above 0"),
    "one GPU for several": ([GPT2, "--gpus=1", "--strategies=ddp"], "strategies: ddp: not possible on 1 ranks"),
    "impossible memory": ([GPT2, "--gpu-memory=80"], "80 bytes are no device's or host's memory; write 80GB"),
    "memory that is none": ([GPT2, "--gpu-memory=much"], "--gpu-memory = 'much': must be a size above 0"),
    "share": ([GPT2, "--achievable=50"], "achievable = '50': is a share, above 0 and at most 1"),
    "option": ([GPT2, "--gpu-memmory=80GB"], "--gpu-memmory: unknown option; did you mean --gpu-memory?"),
    "dtype": ([GPT2, "--device=V100"], "dtype = bfloat16: V100-32GB lacks it; use --dtype=float16"),
    "machine and device": ([GPT2, "--machine=m.json", "--device=H100"], "leave --device"),
    "no machine": ([GPT2, "--machine=none.json"], "No such file or directory; --calibrate=none.json measures"),
    "shape": (["--n_layer=2", "--n_head=3", "--n_embd=64"], "n_embd divisible by n_head"),
    "parameters": (["--parameters=many"], "must be a number from 1e5 to 1e13"),
    "tokens": ([GPT2, "--tokens=-1"], "tokens = -1.0: must be above 0"),
}


def wish(*arguments: str):
    args = parse(list(arguments), "")
    return request.wish(args, request.shape(args), request.system(args))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_ends_in_one_message(name):
    arguments, text = WRONG[name]
    with pytest.raises(UserError) as error:
        wish(*arguments).batches()
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_device_by_its_numbers():
    numbers = ["--device=X1", "--tflops=500", "--gpu-memory=96GB", "--memory-bandwidth=3TB", "--node-link=100GB"]
    system = wish(GPT2, *numbers).system
    assert (system.device, system.flops, system.memory, system.node_link) == ("X1", 500e12, 96e9, 100e9)
    assert system.memory_rate == 3e12


def test_larger_models_need_higher_stages():
    taken = {}
    for model in ("gpt2", "llama2-7b", "llama2-13b"):
        found = recommended(best_of_each(list(options(wish(f"--model={model}")))))
        assert found, model
        taken[model] = found.case.strategy.name
    assert taken["gpt2"] == "ddp"
    for model in ("llama2-7b", "llama2-13b"):
        assert taken[model] in ("zero1", "zero2", "zero3", "fsdp", "fsdp_grad_op")
    crowded = best_of_each(list(options(wish("--model=llama-65b"))))
    found = recommended(crowded)
    assert found and found.case.strategy.offloads, "65 billion parameters on 8 GPUs"


def test_room_is_left_where_there_is_a_choice():
    """ZeRO-2 with 2 sequences would fill an 80 GB device of LLaMA-2 7B to the last gigabyte."""
    asked = ("--model=llama2-7b", "--strategies=zero2", "--activation-checkpointing=False")
    found = list(options(wish(*asked)))
    assert [option.batch for option in found if option.fits()] == [1, 2] and not found[1].roomy()
    assert recommended(best_of_each(found)) is found[0]
    alone = list(options(wish(*asked, "--batch_size=2")))
    assert recommended(best_of_each(alone)) is alone[0], "what fits is refused"


def test_host_memory_is_counted_where_it_is_known():
    crowded = best_of_each(list(options(wish("--model=llama-65b", "--host-memory=64GB", "--strategies=zero3_offload"))))
    assert recommended(crowded) is None


def test_the_table_of_7b_is_the_planners():
    text = (ROOT / "docs/from_fsdp.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) tokens.* \| (kept|recomputed) \| (.*) \|$", text, re.M)
    assert len(rows) == 3, "the guide's table of LLaMA-2 7B"
    for tokens, activations, numbers in rows:
        asked = [f"--block_size={tokens.replace(',', '')}", f"--activation_checkpointing={activations == 'recomputed'}"]
        asked += ["--model=llama2-7b", "--batch_size=1", "--global-batch=8", "--strategies=fsdp,zero3"]
        found = list(options(wish(*asked)))
        predicted = [f"{option.memory.total() / 1e9:.1f}" for option in found]
        assert [*predicted, *(f"{option.time.step():.2f}" for option in found)] == numbers.split(" | "), tokens


def test_the_command_says_what_to_paste():
    done = run("plan.py", "--model=gpt2-xl", "--gpus=8", "--gpu-memory=80GB", "--explain")
    assert done.returncode == 0, done.stderr
    keys = dict(re.findall(r"^(\w+) = (\S+)", done.stdout, re.M))
    assert int(keys["batch_size"]) * int(keys["gradient_accumulation_steps"]) * 1024 == 2**19
    assert "\n./launch_" in done.stdout and "arXiv:1910.02054" in done.stdout and "arXiv:2205.05198" in done.stdout
    assert "--achievable=0.5" in done.stdout


def test_what_fits_nowhere_ends_with_the_number_of_gpus_that_do():
    done = run("plan.py", "--model=llama-65b", "--gpus=2", "--strategies=zero2,zero3", "--json")
    assert re.search(r"nothing fits: zero3 comes nearest, and lacks .* take \d+ GPUs \(zero3 fits\)", message(done))
    assert json.loads(done.stdout)["recommended"] is None


def test_the_curve(tmp_path):
    figure = tmp_path / "curve.png"
    done = run("plan.py", "--model=llama2-7b", f"--curve={figure}")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *\d+ ", line)]
    assert [int(row[0]) for row in rows] == [2**power for power in range(11)]
    assert figure.stat().st_size > 20_000


def test_a_machine_file_is_read_back_and_checked(tmp_path):
    path = tmp_path / "machine.json"
    MACHINE.write(path)
    system = wish(GPT2, "--gpus=2", f"--machine={path}").system
    assert (system.flops, system.kind, system.of("baselines", "zero2_offload")) == (1e11, "cpu", 5e8)
    for text in ("{}", "no JSON", path.read_text().replace("1e11", "-1").replace("100000000000.0", "-1")):
        path.write_text(text)
        with pytest.raises(UserError, match="measure it"):
            machine_file.read(str(path))


def test_a_rank_of_the_calibration(tmp_path):
    """What `--calibrate` starts on each rank; here on one, which has no link."""
    note, shape = tmp_path / "probe.json", ["--n_layer=1", "--n_head=2", "--n_embd=64", "--block_size=64"]
    done = run("plan.py", f"--probe={note}", "--batch_size=2", "--vocab_size=257", *shape)
    assert done.returncode == 0, done.stderr
    found = json.loads(note.read_text())
    assert found["flops"] > 1e8 and 0 < found["achievable"] <= 1 and found["link"] == 0
    assert min(found[name] for name in ("memory", "memory_rate", "update_rate", "sample")) > 1e8


def test_calibration_takes_apart_what_short_runs_took():
    """From runs as a machine of known numbers would have them, those numbers."""
    system, sample = MACHINE.system({"gpus": 2, "nodes": 1, "link": 1e12}, ""), probe.sample(calibrate.DEFAULT)
    runs, batch = {}, 4
    for name in ("ddp", "zero2", "zero3"):
        case = Case(sample, STRATEGIES[name], system)
        time = timing(case, batch, False, calibrate.MICRO_STEPS)
        runs[name] = footprint(case, batch, False, calibrate.MICRO_STEPS).total(), time.step()
        alone = time.computing / calibrate.MICRO_STEPS - 5 * system.overheads[name]
    found = calibrate.fitted(replace(MACHINE, baselines={}, overheads={}), sample, batch, runs, alone, 0.0)
    for what in ("baselines", "overheads"):
        assert getattr(found, what) == pytest.approx(getattr(MACHINE, what), rel=1e-6, abs=1e-9), what


def test_a_check_keeps_what_it_does_not_measure(tmp_path):
    sizes = {"model_state": 2e6, "peak_memory": 3e6}
    about = {"predicted": sizes, "measured": sizes}
    rows = [{"model": "25M", "strategy": name, "ranks": 2, **about} for name in ("zero1", "fsdp")]
    rows = [{"model": "25M", "strategy": "single", "ranks": 1, **about}, *rows]
    assert sorted(reversed(rows), key=check.place) == rows
    machines = {ranks: {"ranks": ranks, "baselines": {"fsdp": 1.0}} for ranks in (1, 2)}
    check.write(tmp_path, "check", rows, list(machines.values()))
    asked = {2: ["fsdp"], 4: ["fsdp"]}
    assert check.others(tmp_path / "check.json", asked, ["25M"]) == (rows[:2], machines)
    assert check.others(tmp_path / "check.json", asked, ["57M"]) == (rows, machines)
    *_, last = (tmp_path / "check.md").read_text().splitlines()
    assert last == "| 25M | fsdp | 2 | 2.0 | 2.0 | 1.00 | 3.0 | 3.0 | 1.00 |"
