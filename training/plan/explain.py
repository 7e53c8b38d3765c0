"""The formulas of a plan with their sources, and what it assumes."""

from training.plan.assumptions import listing
from training.plan.system import System

FORMULAS = """\
P parameters, N ranks that share one copy, c = 2 or 4 bytes of the compute dtype, S bytes, n ranks of a collective;
s tokens a sequence, b sequences of a rank and micro-step, h width, L blocks, V vocabulary.

model state     (2 + 2 + 12) P bytes, less what is partitioned (ZeRO, arXiv:1910.02054, section 3.1), as this code has
                it: DDP, FSDP2 and fp32 4 + 4 + 8; ZeRO in half precision sums gradients in 4 bytes; its own copy of
                the weights is 4 of the 12 (training/memory.py, counted in results/zero_memory)
gathered        FSDP2: what reads out, and three blocks; all of it where it is kept for backward. ZeRO-3: 4/9 of P, what
                DeepSpeed has fetched for backward when forward ends, at most stage3_max_live_parameters; a run that
                begins without an evaluation keeps what is used within stage3_max_reuse_distance, too. autocast: 2 P,
                the copies of the weights in half precision
activations     a block 16 c s b h; by autocast 36 s b h; recomputed: its input only, c s b h. The paper
                (arXiv:2205.05198, section 4.1) has 34 s b h + 5 a s^2 b in half precision: 2 s b h of masks, which
                there are with dropout only, and 5 a s^2 b of the attention matrix, which flash attention never holds
                (arXiv:2205.14135). LLaMA's (10 h + 4 f) c s b, f the MLP's width. Then the logits, c s b V once, as
                their gradient takes their place (model.py: CrossEntropy), and their gradient's V h c
buffers         reduce_bucket_size (two with overlap_comm) and its flat copy; gradients of a partition as the optimizer
                wants them; allgather_bucket_size where gloo gathers; of FSDP2 a block's gradients; of DDP 4 P, its
                buckets, where gradients of several micro-steps add up beside them
malloc          of CPU ranks, what glibc keeps of freed memory is not counted. MALLOC_MMAP_THRESHOLD_=262144 in a run's
                environment has it given back, for slower steps: so results/plan_check was measured. --calibrate
                measures without it: its numbers hold what was kept in its short runs
host, NVMe      what is offloaded there, of all ranks of a node; on the way to NVMe buffer_count x buffer_size,
                max_in_cpu, and buffer_count sub-groups
computing       s b (6 P + 12 L h s) FLOPs (PaLM, arXiv:2204.02311, appendix B), a third more to recompute
communication   a ring sends 2 (n - 1) / n S in an all-reduce, half as much in an all-gather or reduce-scatter (Patarasu
                & Yuan, 2009); inside a node by its link, between nodes by the slower one. DDP, ZeRO-0: one all-reduce
                of 4 P a step. ZeRO-1, ZeRO-2: an all-reduce of c P, as DeepSpeed sends it, a step and a micro-step,
                and the updated weights, c P, a step. ZeRO-3: c P three times a micro-step: weights for forward and
                for backward, and gradients. FSDP2: the same, gradients in 4 P, over gloo by an all-reduce.
                Beside backward: DDP; on GPUs, ZeRO-1 and 2. Beside forward, too: ZeRO-3, which fetches ahead; on GPUs
                FSDP2
update          clipping and AdamW read and write 40 bytes a parameter of the rank's part, where its states are; NVMe
                gives and takes 12"""


def text(system: System) -> str:
    return "\n".join([FORMULAS, "", "assumptions:", *(f"  {line}" for line in listing(system))])
