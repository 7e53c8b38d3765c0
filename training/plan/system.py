"""The machines of a plan: devices, nodes, links, and the numbers that its predictions rest on."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class System:
    """Rates in bytes a second, sizes in bytes, times in seconds; of a rank, where nothing else is said."""

    device: str
    kind: str  # cuda, cpu
    gpus: int  # of a node: ranks
    nodes: int
    dtype: torch.dtype
    memory: float
    flops: float  # FLOP/s of the matmul peak, or of the measured ceiling
    memory_rate: float
    node_link: float  # nominal
    link: float  # of a node, to the others
    achievable: float
    link_share: float
    latency: float
    overlap: float
    fragmentation: float
    baseline: float
    host_bandwidth: float  # of a node
    host_link: float
    nvme_bandwidth: float  # of a node
    host_memory: float = 0.0  # of a node; 0: unknown
    update_rate: float = 0.0  # bytes that AdamW reads and writes; 0: as fast as memory
    baselines: dict[str, float] = field(default_factory=dict)  # strategy -> measured
    overheads: dict[str, float] = field(default_factory=dict)  # strategy -> seconds a block and micro-step, measured
    origin: dict[str, str] = field(default_factory=dict)  # of an assumption that is none any more

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    def link_of(self, ranks: int) -> float:
        """Of a ring over so many neighbouring ranks: its slowest link, at the share that collectives reach."""
        slowest = self.node_link if ranks <= self.gpus else min(self.node_link, self.link)
        return slowest * self.link_share

    def of(self, table: str, strategy: str) -> float:
        """A measured number of a strategy, or of the one that is most like it."""
        found: dict[str, float] = getattr(self, table)
        for name in (strategy, strategy.split("_")[0], "ddp"):
            if name in found:
                return found[name]
        return self.baseline if table == "baselines" else 0.0
