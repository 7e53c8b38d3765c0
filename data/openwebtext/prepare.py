"""OpenWebText: 8 million documents, 9 billion tokens of GPT-2. Takes up to 45 GB of disk, and 18 GB when it is done."""

import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.errors import DataError
from data.prepare import find_files, run, tokenize_files
from data.tokenizer import BPETokenizer


def main(parser: ArgumentParser, repository: str, folder: str) -> None:
    """Tokenize, for GPT-2, the parquet files in a folder of a data set on the Hugging Face hub."""
    parser.add_argument("--input", type=Path, nargs="+", help="parquet files or folders of them; default: download")
    parser.add_argument("--folder", default=folder, help=f"folder on the hub (default: {folder})")
    parser.add_argument("--files", type=int, default=0, help="use only the first N parquet files; 0: all")
    args = parser.parse_args()
    if args.input:
        files = find_files(args.input)[: args.files or None]
    else:
        files = download_parquet(repository, args.folder, args.files, args.out / "hub")
    tokenize_files(files, args.out, f"{repository}, {args.folder}", BPETokenizer("gpt2"), val_fraction=0.0005)
    shutil.rmtree(args.out / "hub", ignore_errors=True)


def download_parquet(repository: str, folder: str, count: int, target: Path) -> list[Path]:
    """Download the first `count` parquet files (0: all): the authors' own, or the hub's conversion of theirs."""
    import huggingface_hub as hub

    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=5)  # without a network, it fails at once
        for revision in ("main", "refs/convert/parquet"):
            where: dict = {"repo_type": "dataset", "revision": revision}
            names = hub.list_repo_files(repository, **where)
            names = sorted(n for n in names if n.startswith(f"{folder}/") and n.endswith(".parquet"))[: count or None]
            if names:
                hub.snapshot_download(repository, **where, allow_patterns=names, local_dir=target)
                return [target / name for name in names]
    except Exception as error:  # the hub's HTTP library raises other types in other versions
        fix = "without a network, download its parquet files elsewhere and pass --input FOLDER"
        raise DataError(f"cannot download {repository} from Hugging Face ({type(error).__name__}); {fix}") from None
    raise DataError(f"{repository} has no parquet files in {folder}/; pass --input FOLDER with copies of them")


if __name__ == "__main__":
    run(lambda parser: main(parser, "Skylion007/openwebtext", "plain_text"), __file__, __doc__)
