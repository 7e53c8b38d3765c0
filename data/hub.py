"""Files of data sets on the Hugging Face hub, or the same files fetched by hand."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError


@dataclass(frozen=True)
class Source:
    """A local file, or one on the hub, which is fetched when its turn comes: name, repository, revision."""

    name: str
    repository: str = ""
    revision: str = ""

    def fetch(self, folder: Path) -> Path:
        """The file on this machine; below `folder` where it comes from the hub."""
        if not self.repository:
            return Path(self.name)
        import huggingface_hub

        try:
            path = huggingface_hub.hf_hub_download(
                self.repository, self.name, repo_type="dataset", revision=self.revision, local_dir=folder / "hub"
            )
        except Exception as error:  # its HTTP library's exceptions change from version to version
            raise unreachable(self.repository, error) from None
        return Path(path)


def parquet_files(repository: str, folder: str) -> list[Source]:
    """Those of a data set, in order; if its authors gave it in another format, the hub's own conversion of it."""
    import huggingface_hub

    for revision in ("main", "refs/convert/parquet"):
        try:
            names = huggingface_hub.list_repo_files(repository, repo_type="dataset", revision=revision)
        except Exception as error:
            raise unreachable(repository, error) from None
        found = sorted(n for n in names if n.startswith(f"{folder}/") and n.endswith(".parquet"))
        if found:
            return [Source(name, repository, revision) for name in found]
    raise DataError(f"{repository} has no parquet files in {folder}/ any more; give them with --input")


def unreachable(repository: str, error: Exception) -> DataError:
    return DataError(
        f"cannot fetch {repository} from the Hugging Face hub ({type(error).__name__}); where there is no network, "
        "fetch its parquet files elsewhere and give --input FOLDER"
    )
