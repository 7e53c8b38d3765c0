"""What convert.py writes for DeepSpeed, read by DeepSpeed itself."""

import shutil
import sys

import pytest
import torch

from tests.checkpoints import assert_same, run_folder
from tests.deepspeed_loads import SUB_GROUP_SIZE
from tests.running import run
from training.checkpoint import Checkpoints
from training.errors import UserError
from training.formats import zero
from training.formats.conversion import convert
from training.formats.options import Options
from training.formats.source import open_source


def test_deepspeed_loads_every_stage_and_the_universal_one(tmp_path, monkeypatch):
    """Weights, moments and counts of steps, on two ranks; and the model computes the same."""
    run_folder(tmp_path / "run")
    monkeypatch.setattr(zero, "SUB_GROUP_SIZE", SUB_GROUP_SIZE)
    for stage in (1, 2, 3):
        for dtype in ("float32", "bfloat16"):
            options = Options(stage=stage, ranks=2, dtype=dtype)
            convert(str(tmp_path / "run"), tmp_path / f"zero{stage}-{dtype}", "deepspeed", options)
    convert(str(tmp_path / "run"), tmp_path / "universal", "universal", Options())
    done = run("tests/deepspeed_loads.py", str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": equal") == 9, done.stdout


def test_deepspeeds_own_converter_reads_them(tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model, _ = run_folder(tmp_path / "run")
    for stage, ranks in ((1, 3), (2, 3), (3, 4)):
        folder = tmp_path / f"zero{stage}"
        convert(str(tmp_path / "run"), folder, "deepspeed", Options(stage=stage, ranks=ranks, dtype="bfloat16"))
        weights = get_fp32_state_dict_from_zero_checkpoint(folder / "checkpoints", "step_000003")
        assert weights.keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(weights[name], weight), f"{name} of stage {stage}"
        assert Checkpoints(str(folder)).newest()[1]["dtype"] == "bfloat16"


@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_made_universal_is_read(tmp_path, monkeypatch, stage):
    """By its own tool, of partitions that we wrote."""
    from deepspeed.checkpoint import ds_to_universal

    model, optimizer = run_folder(tmp_path / "run")
    convert(str(tmp_path / "run"), tmp_path / "zero", "deepspeed", Options(stage=stage, ranks=2))
    checkpoint, universal = tmp_path / "zero" / "checkpoints" / "step_000003", tmp_path / "universal"
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
    one = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    monkeypatch.setattr(sys, "argv", ["ds_to_universal", *folders, *one])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    with pytest.raises(UserError, match="does not say what model it is of; copy there"):
        open_source(str(universal), Options())
    shutil.copy(checkpoint / "checkpoint.json", universal)
    assert_same(open_source(str(universal), Options())[0], model, optimizer)
