# shellcheck shell=bash
# All of a launch script that trains: source launch/train.sh STRATEGY [N] [ARGUMENTS]
source "${BASH_SOURCE[0]%/*}/common.sh"
zero() { script=train_deepspeed.py settings=(--deepspeed_config="deepspeed_configs/$1_config.json" "${@:2}"); }
config=config/train_gpt2.py
case $1 in
    ddp) script=train.py settings=(--strategy=ddp) ;;
    fsdp) script=train.py settings=(--strategy=fsdp) config=config/train_gpt2_fsdp.py ;;
    3d) zero zero1 --tensor_parallel=2 --pipeline_parallel=2 --compile=False ;;
    moe) zero zero1 --expert_parallel=2 && config=config/train_gpt2_moe.py ;;
    long) zero zero2 --sequence_parallel=2 && config=config/train_gpt2_long.py ;;
    *) zero "$1" && config=config/train_gpt2_deepspeed_$1.py ;;
esac
usage "${2:-}" "[N] [config/x.py ...] [--key=value ...]" \
    "N ranks on this machine; default: one per GPU, or 2 CPU ranks. HOSTFILE=FILE before it: on all hosts of that file." \
    "Default config: $config. Keys: python $script --help"
environment requirements.txt
launch "$script" "$config" "${@:2}"
